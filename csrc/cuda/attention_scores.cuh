// From products of queries and keys to logits, and the online softmax over them (Dao et al. 2022, arXiv:2205.14135;
// Milakov & Gimelshein 2018, arXiv:1805.02867), for the accumulators of mma.sync: of MT tiles of 16 rows a thread has
// the rows lane / 4 and lane / 4 + 8, of tiles of 8 columns the columns 2 (lane % 4) and the one after.
//
// Logits are in units of ln 2, so that their exponential is one ex2. Where a logit is no more than a product times a
// positive scale ("plain"), scale and maximum go into one multiply-add.
#pragma once
#include "cuda/attention_mask.cuh"
#include "cuda/philox.cuh"
#include "cuda/value.cuh"
//
#include "cells/math.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Whether a logit is more than a scaled product.
FSQ_BOTH bool altered_logits(const AttentionParams& p) { return p.softcap || p.bias.data || p.alibi_slopes; }
// Whether only structure near the diagonal and a positive scale make the weights.
FSQ_BOTH bool plain_logits(const AttentionParams& p) {
  return !altered_logits(p) && !p.dense.data && !p.dropout && !picks(p) && p.scale > 0;
}

FSQ_DEVICE float infinity() { return __int_as_float(0x7f800000); }
FSQ_DEVICE Random random_of(const CudaAttentionParams& c) {
  return {c.a.dropout ? uint64_t(*c.seed) : 0, c.a.threshold};
}
// Of the row r of an accumulator's tile (0: lane / 4, 1: lane / 4 + 8) that begins at `first`.
FSQ_DEVICE int accumulator_row(int first, int r) { return first + int(ptx::lane()) / 4 + 8 * r; }
// Element i of an accumulator of the columns 8 n ...
FSQ_DEVICE int accumulator_column(int n, int i) { return 8 * n + int(ptx::lane()) % 4 * 2 + i % 2; }

// A tile of up to 64 keys: those from j0 on, or (j0 < 0) those of the list of global keys from `at` on.
struct KeyTile {
  int j0, at;

  FSQ_DEVICE bool picked() const { return j0 < 0; }
  FSQ_DEVICE int key(const GlobalKeys& far, int column) const { return picked() ? far.key(at + column) : j0 + column; }
};

// The keys of one tile of rows, SIZE at a time: those near the diagonal, then, with FAR, the global ones beyond.
template <bool FAR, int SIZE>
struct KeyWalk {
  Range near;
  KeyTile tile;
  int far_end;

  FSQ_DEVICE bool picked() const { return FAR && tile.picked(); }
  FSQ_DEVICE bool done() const { return FAR ? picked() && tile.at >= far_end : tile.j0 >= near.last; }
  FSQ_DEVICE int key(const GlobalKeys& far, int column) const { return FAR ? tile.key(far, column) : tile.j0 + column; }
  FSQ_DEVICE void settle(const GlobalKeys& far) {
    if (FAR && !tile.picked() && tile.j0 >= near.last) tile = {-1, far.first};
  }
  FSQ_DEVICE void step(const GlobalKeys& far) {
    (picked() ? tile.at : tile.j0) += SIZE;
    settle(far);
  }
};

// Where a row of a table of logits lies; entries of keys past the sequence's last are never read.
FSQ_DEVICE int64_t table_row(const Table& t, const Sequence& s, const Query& q) {
  return s.b * t.sb + q.h * t.sh + int64_t(s.q0 + q.i) * t.sl + s.k0 * t.ss;
}
FSQ_DEVICE float bias_at(const AttentionParams& p, int64_t at) {
  if (p.bias_dtype == DType::f32) return static_cast<const float*>(p.bias.data)[at];
  if (p.bias_dtype == DType::bf16) return widen(static_cast<const __nv_bfloat16*>(p.bias.data)[at]);
  return widen(static_cast<const __half*>(p.bias.data)[at]);
}

// One row of a tile of keys: which of this thread's 2 NT columns the row sees, as bits 2 n + e.
template <int NT>
FSQ_DEVICE uint32_t visible_keys(const AttentionParams& p, const Sequence& s, const Query& q, const GlobalKeys& far,
                                 const KeyTile& tile, bool edge) {
  static_assert(NT <= 16, "a word of bits");
  const bool table = p.dense.data != nullptr;
  const int64_t at = table ? table_row(p.dense, s, q) : 0;
  const uint8_t* const row = static_cast<const uint8_t*>(p.dense.data);
  uint32_t bits = 0;
  if (!edge && !table) return q.real ? ~0u >> (32 - 2 * NT) : 0;
  FSQ_UNROLL
  for (int n = 0; n < NT; ++n) FSQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int j = tile.key(far, accumulator_column(n, e));
    bool seen = q.real && (!edge || q.sees(j, tile.picked()));
    if (table && seen) seen = row[at + j * p.dense.ss] != 0;
    bits |= uint32_t(seen) << (2 * n + e);
  }
  return bits;
}

// The same for what dropout keeps.
template <int NT>
FSQ_DEVICE uint32_t kept_keys(const Random& random, const Sequence& s, const Query& q, const GlobalKeys& far,
                              const KeyTile& tile) {
  const uint32_t i = uint32_t(s.q0 + q.i);
  const int first = s.k0 + tile.j0;
  if (NT * 8 == kRandomKeys && !tile.picked() && first % kRandomKeys == 0)
    return random.fragment(uint32_t(s.b), uint32_t(q.h), i, uint32_t(first / kRandomKeys));
  uint32_t bits = 0;
  for (int n = 0; n < NT; ++n)
    for (int e = 0; e < 2; ++e) {
      const int j = s.k0 + tile.key(far, accumulator_column(n, e));
      bits |= uint32_t(random.keeps(uint32_t(s.b), uint32_t(q.h), i, uint32_t(j))) << (2 * n + e);
    }
  return bits;
}

// A product becomes its logit, by all that is added to it. `tangent` is the softcap's derivative.
struct Logits {
  float scale, softcap, slope;
  int64_t bias;  // offset of the row in its table

  FSQ_DEVICE Logits(const AttentionParams& p, const Sequence& s, const Query& q)
      : scale(float(p.scale)), softcap(float(p.softcap)), slope(0), bias(0) {
    if (p.alibi_slopes) slope = static_cast<const float*>(p.alibi_slopes)[q.h];
    if (p.bias.data) bias = table_row(p.bias, s, q);
  }
  // Of a key that the row sees.
  FSQ_DEVICE float of(const AttentionParams& p, const Query& q, float x, int j, float& tangent) const {
    float l = x * scale;
    tangent = 1.0f;
    if (softcap != 0) {
      const float t = FSQ_ISA::tanh(l / softcap);
      l = t * softcap;
      tangent = fma(-t, t, 1.0f);
    }
    if (p.bias.data) l += bias_at(p, bias + j * p.bias.ss);
    if (p.alibi_slopes) l = fma(-slope, ::fabsf(float(j - q.d)), l);
    return l * float(kLog2e);
  }
};

// The largest of the four threads that share a row.
FSQ_DEVICE float row_maximum(float x) {
  x = ::fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return ::fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FSQ_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// One row of a softmax under way: the largest logit so far, or one less by up to the slack, and this thread's share of
// the sum of 2^(logit - top).
struct RowSum {
  float top, total;

  // Row r of the accumulators s becomes 2^(scale s - top). Returns what sums made before are to be multiplied with: 1
  // as long as no logit is above `top` by more than `slack`, for powers of up to 2^slack are as exact as those up to 1.
  template <int NT>
  FSQ_DEVICE float absorb(float (&s)[NT][4], int r, float scale, float slack = 0) {
    float now = -infinity();
    FSQ_UNROLL
    for (int n = 0; n < NT; ++n) now = ::fmaxf(now, ::fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    now = row_maximum(now) * scale;
    now = now > top + slack ? now : top;
    const float base = now == -infinity() ? 0.0f : now, shrink = ptx::exp2_approx(top - base);
    float sum = 0;
    FSQ_UNROLL
    for (int n = 0; n < NT; ++n) FSQ_UNROLL
    for (int e = 0; e < 2; ++e) {
      s[n][2 * r + e] = ptx::exp2_approx(fma(s[n][2 * r + e], scale, -base));
      sum += s[n][2 * r + e];
    }
    total = fma(total, shrink, sum);
    top = now;
    return shrink;
  }
};

// What makes a row's sum of weighted values its output, and its lse in natural units, from the largest logit and the
// sum of weights in units of ln 2.
struct RowEnd {
  float factor, lse;

  FSQ_DEVICE RowEnd(const AttentionParams& p, int h, float top, float total) {
    float shrink = 1;
    if (p.sinks) {
      const float sink = static_cast<const float*>(p.sinks)[h] * float(kLog2e), now = ::fmaxf(top, sink);
      const float base = now == -infinity() ? 0.0f : now;
      shrink = ptx::exp2_approx(top - base);
      total = fma(total, shrink, ptx::exp2_approx(sink - base));
      top = now;
    }
    const bool nothing = total == 0;
    factor = nothing ? 0.0f : shrink * float(p.keep_scale) / total;
    lse = nothing ? -infinity() : (top + ::log2f(total)) * float(kLn2);
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
