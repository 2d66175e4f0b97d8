// The attention kernels' launchers, and what they share. Errors are text, empty where all is well.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

inline std::string describe(const AttentionParams& p) {
  std::string text = p.dtype == DType::bf16 ? "bfloat16" : "float16";
  const auto add = [&](const char* name, int64_t n) { text += std::string(" ") + name + "=" + std::to_string(n); };
  add("B", p.B), add("Hq", p.Hq), add("Hkv", p.Hkv), add("L", p.L), add("S", p.S), add("E", p.E), add("Ev", p.Ev);
  return text;
}

// f(e, w): e of the element type, decltype(w)::value the columns that both head sizes are padded to.
template <class F>
auto for_heads(const AttentionParams& p, F f) {
  const int64_t size = p.E > p.Ev ? p.E : p.Ev;
  const auto widths = [&](auto e) {
    if (size <= 64) return f(e, std::integral_constant<int, 64>());
    if (size <= 128) return f(e, std::integral_constant<int, 128>());
    return f(e, std::integral_constant<int, 256>());
  };
  return p.dtype == DType::bf16 ? widths(__nv_bfloat16()) : widths(__half());
}

// Whether every row of a tensor begins at a multiple of 16 bytes.
inline bool aligned(const Heads& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.sb % 8 == 0 && t.sh % 8 == 0 && t.sn % 8 == 0;
}

// Whether tensor copies can read the tensor.
inline bool boxes(const Heads& t, int64_t n, int64_t heads, int64_t batch) {
  const int64_t size[] = {n, heads, batch}, stride[] = {t.sn, t.sh, t.sb};
  for (int i = 0; i < 3; ++i)
    if (size[i] > 1 && stride[i] <= 0) return false;
  return aligned(t);
}

// How many pairs' keys and values stay in L2 while their tiles run.
inline int64_t section(const AttentionParams& p) {
  constexpr int64_t kBytes = 16 << 20;
  const int64_t pairs = (p.cu_q ? 1 : p.B) * p.Hkv, bytes = 2 * p.S * (p.E + p.Ev);
  const int64_t fit = bytes ? kBytes / bytes : pairs;
  return fit < 1 ? 1 : fit < pairs ? fit : pairs;
}

// Of the parts that attention_forward has left.
std::string attention_merge_parts(const CudaAttentionParams& c);

}  // namespace FSQ_ISA
}  // namespace fusedseq
