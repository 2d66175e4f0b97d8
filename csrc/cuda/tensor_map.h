// Tensor maps: how the copy engine of Hopper (TMA) finds boxes of a tensor in global memory. Made on the host, passed
// to a kernel by value as `const __grid_constant__ TensorMap`, used by tensor_load and tensor_store of ptx_hopper.cuh.
//
// Beside launch.h the only door from host code to CUDA: the encoder belongs to the driver, whose library is not linked
// but asked for at run time. The emulator has its own (tests/emulator/tensor.cc), which records the same parameters.
#pragma once

#include <stdint.h>

#include <string>

namespace fusedseq {

// Opaque to all but the encoder and the copy engine; the size and alignment of the driver's CUtensorMap.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// How rows of a box lie in shared memory: the 16-byte chunk c of a row of 32, 64 or 128 bytes is found at the chunk c
// XOR (address / 128), so that eight chunks of a column lie in different banks.
enum class Swizzle { none, bytes32, bytes64, bytes128 };

inline uint32_t swizzle_bytes(Swizzle swizzle) { return swizzle == Swizzle::none ? 0 : 16u << int(swizzle); }

// A tensor of 2-byte elements and the box of it that one copy moves; dimensions innermost first.
struct BoxedTensor {
  static constexpr int kMaxRank = 5;
  const void* data;
  bool bf16;  // else float16
  int rank;
  uint64_t size[kMaxRank];    // elements
  uint64_t stride[kMaxRank];  // bytes between neighbours; the innermost dimension's is not looked at, it is 2
  uint32_t box[kMaxRank];     // elements
  Swizzle swizzle;
};

// What the driver would refuse without a reason, in words; empty where all is well. The innermost row of a swizzled box
// must fill the swizzle's width: what lies between shorter rows would be anybody's guess.
inline std::string check(const BoxedTensor& t) {
  const auto wrong = [](const char* what, int dimension, uint64_t got) {
    return std::string(what) + " of dimension " + std::to_string(dimension) + ": got " + std::to_string(got);
  };
  if (t.rank < 2 || t.rank > BoxedTensor::kMaxRank)
    return "a tensor map takes 2 to 5 dimensions, got " + std::to_string(t.rank);
  if (reinterpret_cast<uintptr_t>(t.data) % 16) return "a tensor map needs data at a multiple of 16 bytes";
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] < 1 || t.size[i] > uint64_t(1) << 32)
      return wrong("a tensor map takes 1 to 2^32 elements", i, t.size[i]);
    if (t.box[i] < 1 || t.box[i] > 256) return wrong("a box takes 1 to 256 elements", i, t.box[i]);
    if (i && (t.stride[i] % 16 || t.stride[i] >= uint64_t(1) << 40))
      return wrong("a tensor map needs strides that are multiples of 16 bytes and below 2^40", i, t.stride[i]);
  }
  const uint32_t row = t.box[0] * 2;
  if (row % 16) return wrong("the rows of a box must be multiples of 16 bytes, 8 elements", 0, t.box[0]);
  if (t.swizzle != Swizzle::none && row != swizzle_bytes(t.swizzle))
    return wrong("the rows of a swizzled box must be as long as the swizzle", 0, t.box[0]);
  return "";
}

}  // namespace fusedseq

#ifdef FSQ_EMULATE
#include "emulated_tensor_map.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

namespace fusedseq {

namespace detail {

// The driver's encoder, or why there is none.
struct Encoder {
  decltype(&cuTensorMapEncodeTiled) entry = nullptr;
  std::string error;

  Encoder() {
    constexpr unsigned since = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, since, cudaEnableDefault, &result);
    entry = reinterpret_cast<decltype(entry)>(found);
    if (e)
      error = std::string("cannot ask the CUDA driver for cuTensorMapEncodeTiled: ") + cudaGetErrorString(e);
    else if (result != cudaDriverEntryPointSuccess || !entry)
      error = "the CUDA driver has no cuTensorMapEncodeTiled";
  }
};

}  // namespace detail

// The map of a tensor, or the text of what is wrong with it.
inline std::string encode(TensorMap& map, const BoxedTensor& t) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "one layout");
  static_assert(
      int(Swizzle::bytes128) == CU_TENSOR_MAP_SWIZZLE_128B && int(Swizzle::bytes64) == CU_TENSOR_MAP_SWIZZLE_64B &&
          int(Swizzle::bytes32) == CU_TENSOR_MAP_SWIZZLE_32B && int(Swizzle::none) == CU_TENSOR_MAP_SWIZZLE_NONE,
      "one numbering");
  const std::string error = check(t);
  if (!error.empty()) return error;
  static const detail::Encoder encoder;
  if (!encoder.error.empty()) return encoder.error;
  // A thread that has not yet done any work on the device has no context, which the driver asks for.
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaSetDevice(device);
  if (e) return std::string("cannot enter the CUDA device: ") + cudaGetErrorString(e);
  uint32_t steps[BoxedTensor::kMaxRank] = {1, 1, 1, 1, 1};
  const CUresult result = encoder.entry(
      reinterpret_cast<CUtensorMap*>(&map), t.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      unsigned(t.rank), const_cast<void*>(t.data), reinterpret_cast<const cuuint64_t*>(t.size),
      reinterpret_cast<const cuuint64_t*>(t.stride + 1), t.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CUtensorMapSwizzle(int(t.swizzle)), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result ? "cuTensorMapEncodeTiled refuses the tensor: CUDA driver error " + std::to_string(int(result)) : "";
}

}  // namespace fusedseq
#endif  // FSQ_EMULATE
