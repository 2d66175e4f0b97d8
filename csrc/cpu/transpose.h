// Shuffles across lanes.
#pragma once
#include "cpu/vec.h"

namespace fusedseq {
namespace FSQ_ISA {

// Interleaves the low (kHigh: high) halves of two vectors.
#if defined(__clang__)
template <class T, T... i>
struct Lanes {};
template <bool kHigh, class V, int... i>
FSQ_INLINE V shuffled(V a, V b, Lanes<int, i...>) {
  constexpr int L = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 2 + (i % 2) * L + kHigh * (L / 2))...);
}
template <bool kHigh, class S>
FSQ_INLINE Vec<S> interleave(Vec<S> a, Vec<S> b) {
  return shuffled<kHigh>(a, b, __make_integer_seq<Lanes, int, kLanes<S>>());
}
#else
template <bool kHigh, class S>
FSQ_INLINE Vec<S> interleave(Vec<S> a, Vec<S> b) {
  constexpr int L = kLanes<S>;
  typename VecOf<S>::bits from{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) from[i] = i / 2 + (i % 2) * L + kHigh * (L / 2);
  return __builtin_shuffle(a, b, from);
}
#endif

// In-register transpose of kLanes rows: log2(lanes) perfect shuffles of the first half with the second.
template <class S>
FSQ_INLINE void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int L = kLanes<S>;
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    Vec<S> out[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      out[2 * i] = interleave<false, S>(rows[i], rows[i + L / 2]);
      out[2 * i + 1] = interleave<true, S>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = out[i];
  }
}

// Lanes of a where bit `half` of the lane is 0, else of b; kSwap: from the lane across, `half` away.
#if defined(__clang__)
template <int half, bool kSwap, class V, int... i>
FSQ_INLINE V selected(V a, V b, Lanes<int, i...>) {
  constexpr int L = sizeof...(i);
  return __builtin_shufflevector(a, b, ((kSwap ? i ^ half : i) + (i & half ? L : 0))...);
}
template <int half, bool kSwap, class S>
FSQ_INLINE Vec<S> select_half(Vec<S> a, Vec<S> b) {
  return selected<half, kSwap>(a, b, __make_integer_seq<Lanes, int, kLanes<S>>());
}
#else
template <int half, bool kSwap, class S>
FSQ_INLINE Vec<S> select_half(Vec<S> a, Vec<S> b) {
  constexpr int L = kLanes<S>;
  typename VecOf<S>::bits from{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) from[i] = (kSwap ? i ^ half : i) + (i & half ? L : 0);
  return __builtin_shuffle(a, b, from);
}
#endif

// The sums of kLanes vectors, in order. Each step adds the halves of two vectors: what lies across moves (one shuffle),
// what lies right is blended.
template <class S, int half = kLanes<S> / 2>
FSQ_INLINE Vec<S> fold(Vec<S> (&v)[kLanes<S>]) {
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i)
    v[i] = select_half<half, false, S>(v[i], v[i + half]) + select_half<half, true, S>(v[i], v[i + half]);
  if constexpr (half > 1)
    return fold<S, half / 2>(v);
  else
    return v[0];
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
