// The few functions of the vendor's library that csrc/bind/cuda/library.cc calls, on a CPU: as its documentation has
// them, by columns, refusing what it refuses, and refusing a workspace that is not the caller's.
#include <stdint.h>
#include <string.h>

#include <atomic>

namespace {

enum Status { kOk = 0, kNotInitialised = 1, kInvalidValue = 7, kNotSupported = 15 };
enum Type { kF32 = 0, kF64 = 1, kF16 = 2, kBf16 = 14 };

struct Connection {
  void* stream;
  bool has_workspace;
};

std::atomic<int64_t> products{0}, rounded{0};

double read(const void* p, int type, int64_t at) {
  if (type == kF32) return static_cast<const float*>(p)[at];
  if (type == kF64) return static_cast<const double*>(p)[at];
  if (type == kF16) return double(static_cast<const _Float16*>(p)[at]);
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[at]) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x1000) & ~uint32_t(0x1fff);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// What the documentation's table of types has a row for, of those that are asked for.
bool supported(int a, int b, int c, int compute) {
  if (a != b) return false;
  if (compute == 70) return a == kF64 && c == kF64;
  if (compute == 77) return a == kF32 && c == kF32;
  return compute == 68 && a != kF64 && c == kF32;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Connection** handle) {
  *handle = new Connection{nullptr, false};
  return kOk;
}
// Gives up the workspace, as the real one does.
int cublasSetStream_v2(Connection* handle, void* stream) {
  if (!handle) return kNotInitialised;
  *handle = {stream, false};
  return kOk;
}
int cublasSetWorkspace_v2(Connection* handle, void* memory, size_t bytes) {
  if (!handle) return kNotInitialised;
  if (!memory || uintptr_t(memory) % 256 || bytes < 1 << 20) return kInvalidValue;
  handle->has_workspace = true;
  return kOk;
}

int cublasGemmEx(Connection* handle, int a_op, int b_op, int m, int n, int k, const void* alpha, const void* a,
                 int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                 int ldc, int compute, int algorithm) {
  if (!handle) return kNotInitialised;
  if (!handle->has_workspace || algorithm != -1 || a_op < 0 || a_op > 1 || b_op < 0 || b_op > 1) return kInvalidValue;
  if (m < 0 || n < 0 || k < 0 || lda < (a_op ? k : m) || ldb < (b_op ? n : k) || ldc < m || lda < 1 || ldb < 1)
    return kInvalidValue;
  if (!supported(a_type, b_type, c_type, compute)) return kNotSupported;
  const double one = c_type == kF64 ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
  const double zero = c_type == kF64 ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t t = 0; t < k; ++t) {
        double x = read(a, a_type, a_op ? t + i * lda : i + t * lda);
        double y = read(b, b_type, b_op ? j + t * ldb : t + j * ldb);
        if (compute == 77) x = to_tf32(float(x)), y = to_tf32(float(y));
        sum += x * y;
      }
      const int64_t at = i + j * int64_t(ldc);
      sum = one * sum + (zero ? zero * read(c, c_type, at) : 0);
      if (c_type == kF64)
        static_cast<double*>(c)[at] = sum;
      else
        static_cast<float*>(c)[at] = float(sum);
    }
  ++products;
  rounded += compute == 77;
  return kOk;
}

int64_t stand_in_products() { return products; }
int64_t stand_in_rounded() { return rounded; }

}  // extern "C"
