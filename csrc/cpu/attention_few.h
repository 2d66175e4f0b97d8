// Pairs of few rows (decoding), and their products with keys as they lie in memory.
#pragma once
#include "cpu/attention.h"
#include "cpu/lane_sums.h"

namespace fusedseq {
namespace FSQ_ISA {

// kThin rows at most read keys part by part; from kPacking on it pays to lay a block of keys out for products that have
// keys in their lanes, whose sums need no folding.
constexpr int64_t kThin = 8, kPacking = 4;

// What a row computes may depend on L and S, not on the batch.
template <class P>
bool has_few_rows(const AttentionView<P>& view) {
  return !view.p.cu_q && view.p.L * view.groups() <= kThin && !view.picks;
}
template <class P>
bool has_unpacked_keys(const AttentionView<P>& view) {
  return has_few_rows(view) && view.p.L * view.groups() < kPacking;
}

// out[row][key] of m rows, `pitch` apart, and vectors [v0, v1) of a block of keys; out with rows of kKeys. Backward
// takes them as well: logits that differ from those in lse by rounding would show in every probability.
template <class P>
void dot_products(const AttentionView<P>& view, const Pair& a, const KeyBlock<typename P::Sum>& k,
                  const typename P::Sum* rows, int64_t pitch, int m, int v0, int v1, typename P::Sum* out) {
  typedef typename P::Sum S;
  constexpr int L = kLanes<S>;
  alignas(64) static const S zero[L] = {};
  const AttentionParams& p = view.p;
  const char* const keys =
      static_cast<const char*>(p.k.data) + AttentionView<P>::key_at(p.k, a, k, 0) * dtype_size(p.dtype);
  for (int v = v0; v < v1; ++v) {
    LaneSums<S> sums{{{rows, pitch, keys, p.E, p.k.sn}}, 1, p.dtype, 1};
    sums.row[0] = v * L;
    sums.lanes[0] = min64(L, k.n - v * L);
    sums.bias = zero;
    lane_sums<S>(sums, 0, m, out + v * L, kKeys);
  }
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
