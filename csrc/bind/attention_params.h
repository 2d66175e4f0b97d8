// Attention's arguments as the modules of both cores take them: sizes, tensors by address and strides, numbers.
#pragma once
#include "bind/call.h"

namespace fusedseq {

inline Heads heads(const pybind11::handle& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0};
  const pybind11::tuple t = pybind11::reinterpret_borrow<pybind11::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

inline Table table(const pybind11::handle& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0, 0};
  const pybind11::tuple t = pybind11::reinterpret_borrow<pybind11::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

// (dtype, bias dtype, causal, left, right, scale, softcap, threshold or None, keep_scale, seed)
inline void numbers(AttentionParams& p, const pybind11::tuple& t) {
  p.dtype = DType(t[0].cast<int>());
  p.bias_dtype = DType(t[1].cast<int>());
  p.causal = t[2].cast<int>();
  p.left = t[3].cast<int64_t>();
  p.right = t[4].cast<int64_t>();
  p.scale = t[5].cast<double>();
  p.softcap = t[6].cast<double>();
  p.dropout = !t[7].is_none();
  p.threshold = p.dropout ? t[7].cast<uint32_t>() : 0;
  p.keep_scale = t[8].cast<double>();
  p.seed = t[9].cast<uint64_t>();
}

inline AttentionParams attention_params(int threads, const pybind11::tuple& sizes, const pybind11::tuple& tensors,
                                        const pybind11::tuple& options) {
  AttentionParams p{};
  p.threads = threads < 1 ? 1 : threads;
  int64_t* const into[] = {&p.B, &p.Hq, &p.Hkv, &p.L, &p.S, &p.E, &p.Ev, &p.N};
  for (size_t i = 0; i < 8; ++i) *into[i] = sizes[i].cast<int64_t>();
  p.q = heads(tensors[0]);
  p.k = heads(tensors[1]);
  p.v = heads(tensors[2]);
  p.out = heads(tensors[3]);
  p.lse = pointer(tensors[4]);
  p.bias = table(tensors[5]);
  p.alibi_slopes = pointer(tensors[6]);
  p.sinks = pointer(tensors[7]);
  p.dense = table(tensors[8]);
  p.key_lengths = static_cast<const int64_t*>(pointer(tensors[9]));
  p.cu_q = static_cast<const int64_t*>(pointer(tensors[10]));
  p.cu_k = static_cast<const int64_t*>(pointer(tensors[11]));
  p.global_keys = static_cast<const uint8_t*>(pointer(tensors[12]));
  p.global_sb = tensors[13].cast<int64_t>();
  numbers(p, options);
  return p;
}

}  // namespace fusedseq
