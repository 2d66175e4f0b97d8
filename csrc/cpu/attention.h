// What forward and backward of attention share: which keys a query sees, its logits, and operands for `multiply`.
//
// Work is cut into pairs: one key head of one batch row (or packed sequence) with the G query heads that use it. The
// queries of a pair are its rows, head by head within each position, so that decoding with grouped heads fills a tile.
// Keys come in blocks that begin at multiples of kKeys: a row's result depends on neither its batch nor the threads.
#pragma once
#include <math.h>

#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
//
#include "cells/softmax.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kKeys = 64;

struct Pair {
  int64_t b, hkv, h0, G;
  int64_t q0, L, k0, S;  // first query and key, and how many of them
  int64_t diagonal;      // the key that the first query is aligned with, counted from k0
  int64_t rows() const { return L * G; }
};

// One row of a pair. Keys are counted from the pair's first.
template <class S>
struct Query {
  int64_t h, i, begin, end, reach, diagonal;
  const char* bias;  // of key 0, null if there is none
  const uint8_t* dense;
  S slope;
};

// Up to kKeys keys: n from j0 on, or those picked (global keys), with positions that nobody reaches behind them.
template <class S>
struct KeyBlock {
  int64_t j0;
  int n;
  const typename VecOf<S>::bit* picked;
};

FSQ_INLINE int64_t clamp64(int64_t x, int64_t low, int64_t high) { return min64(max64(x, low), high); }

#if defined(__AVX512F__)
FSQ_INLINE float largest(VecF a) { return _mm512_reduce_max_ps(a); }
FSQ_INLINE double largest(VecD a) { return _mm512_reduce_max_pd(a); }
#else
template <class V>
FSQ_INLINE typename Num<V>::Scalar largest(V a) {
  typename Num<V>::Scalar m = a[0];
  for (size_t i = 1; i < sizeof(V) / sizeof m; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
#endif
// ln of the sum of a row's exponentials, each e^(logit - top); rounded once.
FSQ_INLINE VecD log_sum(VecD top, VecD sum) {
  for (int i = 0; i < kLanes<double>; ++i) sum[i] = top[i] + log(sum[i]);
  return sum;
}
FSQ_INLINE VecF log_sum(VecF top, VecF sum) {
  typedef float Half __attribute__((vector_size(FSQ_VECTOR_BYTES / 2)));
  Half tops[2], sums[2], out[2];
  memcpy(tops, &top, sizeof top);
  memcpy(sums, &sum, sizeof sum);
  for (int i = 0; i < 2; ++i) {
    const VecD x = __builtin_convertvector(sums[i], VecD);
    const VecL bits = (VecL)x, fraction = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    const VecL high = (VecD)fraction > 1.4142135623730951;
    const VecD m = high ? (VecD)fraction * 0.5 : (VecD)fraction;
    const VecD log = log_of_parts(__builtin_convertvector((bits >> 52) - 1023 - high, VecD), m);
    const VecD y = __builtin_convertvector(tops[i], VecD) + log;
    out[i] = __builtin_convertvector(x - x == 0 ? y : x, Half);  // what is not finite comes through
  }
  memcpy(&sum, out, sizeof sum);
  return sum;
}

// What makes the sums of kLanes rows their outputs, and their lse.
template <class S>
struct Finish {
  Vec<S> factor, lse;
};

// x, rounded as it is when stored: what is added to it must not fuse with the product that it is.
template <class V>
FSQ_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__SSE2__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// The right operand of a product over rows: packed in panels of up to kMaxPanel vectors, or as it lies in memory.
template <class P>
struct RightRows {
  typedef typename P::Sum S;
  const S* base;
  int64_t pitch;  // 0: packed
  int64_t words_;
  const S* panel(int64_t v, int64_t word, int u) const {
    constexpr int L = kLanes<S>;
    return pitch ? base + word * pitch + v * L : base + v * L * words_ + word * u * L;
  }
  int64_t panel_pitch(int u) const { return pitch ? pitch : u * kLanes<S>; }
};
template <class P>
struct LeftRows {
  const typename P::Value* base;
  int64_t pitch;
};

// Threads that a call is worth: waking one takes microseconds. No result depends on it.
constexpr int kMaxThreads = 256;
FSQ_INLINE int threads_for(const AttentionParams& p) {
  constexpr int64_t kLittle = 1 << 17;  // multiply-adds
  return p.B * p.Hq * p.L * p.S * (p.E + p.Ev) < kLittle ? 1 : int(min64(p.threads, kMaxThreads));
}

template <class P>
class AttentionView {
 public:
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  typedef typename VecOf<S>::bits B;
  typedef typename VecOf<S>::bit Bit;
  static constexpr int L = kLanes<S>, kVecs = kKeys / L;

  explicit AttentionView(const AttentionParams& p)
      : p(p),
        plain(p.softcap == 0 && !p.bias.data && !p.dense.data && !p.alibi_slopes),
        picks(p.global_keys && (p.left >= 0 || (p.right >= 0 && !p.causal))) {}

  const AttentionParams& p;
  const bool plain;  // a logit is no more than a scaled product
  const bool picks;  // there may be keys to see beyond the window

  int64_t groups() const { return p.Hkv ? p.Hq / p.Hkv : 0; }
  int64_t sequences() const { return p.cu_q ? p.N : p.B; }
  int64_t pairs() const { return sequences() * p.Hkv; }

  Pair pair(int64_t index) const {
    const int64_t n = index / p.Hkv, hkv = index % p.Hkv, G = groups();
    Pair a{p.cu_q ? 0 : n, hkv, hkv * G, G, 0, p.L, 0, p.S, 0};
    if (p.cu_q) {
      a.q0 = p.cu_q[n];
      a.L = p.cu_q[n + 1] - a.q0;
      a.k0 = p.cu_k[n];
      a.S = p.cu_k[n + 1] - a.k0;
    }
    if (p.key_lengths) a.S = clamp64(p.key_lengths[n], 0, p.S);
    if (p.causal == 2) a.diagonal = a.S - a.L;
    return a;
  }

  Query<S> query(const Pair& a, int64_t r) const {
    const int64_t i = a.G == 1 ? r : r / a.G, d = i + a.diagonal;
    Query<S> q;
    q.h = a.h0 + (a.G == 1 ? 0 : r % a.G);
    q.i = a.q0 + i;
    q.diagonal = d;
    q.reach = p.causal ? clamp64(d + 1, 0, a.S) : a.S;
    q.begin = p.left >= 0 ? clamp64(d - p.left, 0, a.S) : 0;
    q.end = p.right >= 0 ? clamp64(d + p.right + 1, 0, a.S) : a.S;
    q.bias = nullptr;
    q.dense = nullptr;
    q.slope = p.alibi_slopes ? static_cast<const S*>(p.alibi_slopes)[q.h] : S(0);
    if (p.bias.data) q.bias = static_cast<const char*>(p.bias.data) + at(p.bias, a, q) * dtype_size(p.bias_dtype);
    if (p.dense.data) q.dense = static_cast<const uint8_t*>(p.dense.data) + at(p.dense, a, q);
    return q;
  }
  static int64_t at(const Table& t, const Pair& a, const Query<S>& q) {
    return a.b * t.sb + q.h * t.sh + q.i * t.sl + a.k0 * t.ss;
  }

  // Keys of the block that the row sees or may see.
  static Range range(const Query<S>& q, const KeyBlock<S>& k) {
    if (k.picked) return {0, k.n};
    return {clamp64(q.begin - k.j0, 0, k.n), clamp64(q.end - k.j0, 0, k.n)};
  }

  // Positions of global keys among [first, last), up to kKeys; how many.
  int pick(const Pair& a, int64_t first, int64_t last, Bit* out) const {
    const uint8_t* row = p.global_keys + a.b * p.global_sb + a.k0;
    int n = 0;
    for (int64_t j = first; j < last && n < kKeys; ++j)
      if (row[j]) out[n++] = Bit(j);
    for (int i = n; i < kKeys; ++i) out[i] = sizeof(Bit) == 4 ? Bit(INT32_MAX) : Bit(INT64_MAX);
    return n;
  }

  // Bits of the keys of a block that dropout keeps.
  uint64_t keeps(const Pair& a, const Query<S>& q, const KeyBlock<S>& k) const {
    const auto bits = [&](int64_t block) { return kept_keys(p.seed, p.threshold, a.b, q.h, q.i, block); };
    if (!k.picked) {
      const int64_t j = a.k0 + k.j0, shift = j % kKeys;
      return shift ? bits(j / kKeys) >> shift | bits(j / kKeys + 1) << (kKeys - shift) : bits(j / kKeys);
    }
    uint64_t all = 0, some = 0;
    for (int64_t n = 0, known = -1; n < k.n; ++n) {
      const int64_t j = a.k0 + k.picked[n];
      if (j / kKeys != known) some = bits(known = j / kKeys);
      all |= (some >> (j % kKeys) & 1) << n;
    }
    return all;
  }

  // Lanes of vector v that the row does not see by structure.
  static B hidden(const Query<S>& q, const KeyBlock<S>& k, int v) {
    if (k.picked) {
      B j;
      memcpy(&j, k.picked + v * L, sizeof j);
      const B near = (j >= B{} + Bit(q.begin)) & (j < B{} + Bit(q.end));
      return near | (j >= B{} + Bit(q.reach));
    }
    const Range r = range(q, k);
    const B lane = lanes() + Bit(v * L);
    return (lane < B{} + Bit(r.begin)) | (lane >= B{} + Bit(r.end));
  }
  static B lanes() {
    B b{};
    for (int i = 0; i < L; ++i) b[i] = i;
    return b;
  }

  // Distance of the keys of vector v from the diagonal.
  static V distance(const Query<S>& q, const KeyBlock<S>& k, int v) {
    B j = lanes() + Bit(v * L);
    if (k.picked) memcpy(&j, k.picked + v * L, sizeof j);
    const B d = j + Bit((k.picked ? 0 : k.j0) - q.diagonal);
    return __builtin_convertvector(d < 0 ? -d : d, V);
  }

  // The logit of vector v from its products x, -inf where hidden; `slope` becomes that of the softcap.
  V logit(const Query<S>& q, const KeyBlock<S>& k, int v, V x, V& slope) const {
    V s = rounded(x * splat(S(p.scale)));
    if (p.softcap != 0) {
      const V t = FSQ_ISA::tanh(s * splat(S(1 / p.softcap)));
      s = t * splat(S(p.softcap));
      slope = fma(-t, t, splat(S(1)));
    }
    const int64_t n = k.n - v * L;
    if (q.bias) s = s + biases(q, k, v * L);
    if (p.alibi_slopes) s = fma(-splat(q.slope), distance(q, k, v), s);
    B off = hidden(q, k, v);
    if (q.dense) off = off | ~allowed(q, k, v, n);
    return off ? splat(S(-__builtin_inf())) : s;
  }

  S sink(const Query<S>& q) const { return p.sinks ? static_cast<const S*>(p.sinks)[q.h] : S(0); }

  // From the maximum and the sum of the weights of kLanes rows, and the logit of the sink that joins them.
  Finish<S> finish_rows(V top, V sum, V sink) const {
    const V low = splat(S(-__builtin_inf())), one = splat(S(1)), zero{};
    V factor = one;
    if (p.sinks) {
      const V now = top > sink ? top : sink;
      factor = top == low ? zero : weight_of(top - now);
      sum = fma(sum, factor, now == low ? zero : weight_of(sink - now));
      top = now;
    }
    const B nothing = sum == zero;
    return {nothing ? zero : factor * splat(S(p.keep_scale)) / sum, nothing ? low : log_sum(top, sum)};
  }

  // Whether bias or table hide all keys [r) of the block from all of `rows` queries.
  bool empty(const Query<S>* q, int rows, const KeyBlock<S>& k, Range r) const {
    if (k.picked) return false;
    if (p.dense.data) {
      for (int i = 0; i < rows; ++i) {
        const uint8_t* d = q[i].dense + k.j0 * p.dense.ss;
        uint8_t any = 0;
        for (int64_t j = r.begin; j < (p.dense.ss ? r.end : r.begin + 1); ++j) any |= d[j * p.dense.ss];
        if (any) return false;
      }
      return true;
    }
    if (!p.bias.data || p.bias.ss == 0 || p.bias_dtype != (sizeof(S) == 8 ? DType::f64 : DType::f32)) return false;
    for (int i = 0; i < rows; ++i) {
      const S* b = reinterpret_cast<const S*>(q[i].bias) + k.j0;
      for (int64_t j = r.begin; j < r.end; j += L) {
        const V x = load_n(b + j, r.end - j);
        if (largest(x) != S(-__builtin_inf()) && r.end - j >= L) return false;
        if (r.end - j < L)
          for (int64_t e = j; e < r.end; ++e)
            if (b[e] != S(-__builtin_inf())) return false;
      }
    }
    return true;
  }

  // Rows r0... of a pair as a left operand, in place if they can be.
  LeftRows<P> left(const Heads& t, const Pair& a, int64_t r0, int64_t rows, int64_t width, Value* scratch) const {
    if (a.G == 1 && stored() && width % P::per_word == 0)
      return {static_cast<const Value*>(t.data) + row_at(t, a, r0), t.sn};
    const int64_t pitch = left_pitch(width);
    for (int64_t r = 0; r < rows; ++r)
      load_operand<P>(scratch + r * pitch, t.data, p.dtype, row_at(t, a, r0 + r), width);
    return {scratch, pitch};
  }
  static int64_t left_pitch(int64_t width) { return words<P>(width) * P::per_word; }
  // Rows r0... of a pair as a right operand.
  RightRows<P> right(const Heads& t, const Pair& a, int64_t r0, int64_t rows, int64_t width, S* scratch) const {
    if (a.G == 1 && whole(width)) return {static_cast<const S*>(t.data) + row_at(t, a, r0), t.sn, rows};
    return pack(scratch, t, rows, width, [&](int64_t r) { return row_at(t, a, r0 + r); });
  }
  // Keys of a block as a right operand over keys.
  RightRows<P> right(const Heads& t, const Pair& a, const KeyBlock<S>& k, int64_t width, S* scratch) const {
    if (!k.picked && whole(width)) return {static_cast<const S*>(t.data) + key_at(t, a, k, 0), t.sn, k.n};
    return pack(scratch, t, k.n, width, [&](int64_t n) { return key_at(t, a, k, n); });
  }
  // Keys of a block as a right operand over the size of a head: panels of kMaxPanel vectors of keys.
  void transposed(const Heads& t, const Pair& a, const KeyBlock<S>& k, int64_t width, S* dst) const {
    for (int v = 0; v * L < k.n; ++v) transposed(t, a, k, width, dst, v);
  }
  void transposed(const Heads& t, const Pair& a, const KeyBlock<S>& k, int64_t width, S* dst, int v) const {
    int64_t at[L];
    const int64_t count = min64(L, k.n - v * L);
    for (int64_t i = 0; i < count; ++i) at[i] = key_at(t, a, k, v * L + i);
    pack_transposed<P>(panel(dst, v, width), kMaxPanel * L, t.data, p.dtype, at, count, width);
  }
  static S* panel(S* base, int v, int64_t width) {
    return base + v / kMaxPanel * kMaxPanel * L * words<P>(width) + v % kMaxPanel * L;
  }
  // out[row][key] of m rows against vectors [v0, v1) of transposed keys, out with rows of kKeys.
  void products(LeftRows<P> a, int64_t row, int m, S* keys, int64_t width, int v0, int v1, S* out) const {
    for (int v = v0, next; v < v1; v = next) {
      next = int(min64(v1, (v / kMaxPanel + 1) * kMaxPanel));
      multiply(Tile<P>{m, next - v, a.base + row * a.pitch, a.pitch, P::per_word, panel(keys, v, width), kMaxPanel * L,
                       words<P>(width), nullptr, 0, out + v * L, kKeys});
    }
  }

  int64_t row_at(const Heads& t, const Pair& a, int64_t r) const {
    const int64_t i = a.G == 1 ? r : r / a.G, g = a.G == 1 ? 0 : r % a.G;
    return a.b * t.sb + (a.h0 + g) * t.sh + (a.q0 + i) * t.sn;
  }
  static int64_t key_at(const Heads& t, const Pair& a, const KeyBlock<S>& k, int64_t n) {
    return a.b * t.sb + a.hkv * t.sh + (a.k0 + (k.picked ? int64_t(k.picked[n]) : k.j0 + n)) * t.sn;
  }
  int64_t per_row(const Pair& a, const Query<S>& q) const { return (a.b * p.Hq + q.h) * p.L + q.i; }

  // Tensors hold what left operands are made of; and right operands, in whole vectors.
  bool stored() const { return p.dtype == (P::per_word == 2 ? DType::bf16 : sizeof(S) == 8 ? DType::f64 : DType::f32); }
  bool whole(int64_t width) const { return P::per_word == 1 && stored() && width % L == 0; }

  // Of the keys from position `at` of the block on, 0 past its end.
  V biases(const Query<S>& q, const KeyBlock<S>& k, int at) const {
    const int64_t n = k.n - at;
    if (!k.picked && p.bias.ss) return load_as<S>(q.bias, p.bias_dtype, k.j0 + at, n);
    V b{};
    for (int i = 0; i < L && i < n; ++i) b[i] = load_scalar<S>(q.bias, p.bias_dtype, key(k, at + i) * p.bias.ss);
    return b;
  }
  // Bits of the keys of a block that the table shows.
  uint64_t allowed_keys(const Query<S>& q, const KeyBlock<S>& k) const {
#if defined(__AVX512BW__)
    if (!k.picked && p.dense.ss) {
      const __m512i row = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - k.n), q.dense + k.j0);
      return _mm512_test_epi8_mask(row, row);
    }
#endif
    uint64_t bits = 0;
    for (int i = 0; i < k.n; ++i) bits |= uint64_t(q.dense[key(k, i) * p.dense.ss] != 0) << i;
    return bits;
  }

 private:
  template <class At>
  RightRows<P> pack(S* dst, const Heads& t, int64_t rows, int64_t width, At at) const {
    const int64_t n = words<P>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = at(r);
      for_panels(0, round_up(width, L) / L, kMaxPanel, [&](int64_t v, int u) {
        S* const word = dst + v * L * n + r / P::per_word * u * L;
        for (int i = 0; i < u; ++i)
          put_row<P>(word + i * L, r, load_as<S>(t.data, p.dtype, from + (v + i) * L, width - (v + i) * L));
      });
    }
    return {dst, 0, n};
  }

  B allowed(const Query<S>& q, const KeyBlock<S>& k, int v, int64_t n) const {
    uint8_t seen[L] = {};
    if (!k.picked && p.dense.ss)
      memcpy(seen, q.dense + k.j0 + v * L, size_t(min64(L, n)));
    else
      for (int i = 0; i < L && i < n; ++i) seen[i] = q.dense[key(k, v * L + i) * p.dense.ss];
    B b;
    for (int i = 0; i < L; ++i) b[i] = -Bit(seen[i] != 0);
    return b;
  }
  static int64_t key(const KeyBlock<S>& k, int i) { return k.picked ? int64_t(k.picked[i]) : k.j0 + i; }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
