// The first half of attention's backward: probabilities and the gradients of logits, for some rows and a block of keys.
//
// With D = dout . out - dlse of a row, the gradient of its logit is P (dP - D), where dP = dout . v (0 where dropped).
#pragma once
#include "cpu/attention_few.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class P>
class AttentionScores : public AttentionView<P> {
 public:
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kVecs = View::kVecs;
  static constexpr int64_t kSub = 48;
  static constexpr S kInf = S(__builtin_inf());
  using View::p;

  // A block of keys and values, ready to be multiplied with rows.
  struct Keys {
    S *k, *v;
  };
  // Rows, ready to be multiplied; and what becomes of them: `scores` ends as the gradient of the products, `values` as
  // the probabilities that the output was made of.
  struct Rows {
    Query<S>* queries;
    Value *q_scratch, *do_scratch;
    LeftRows<P> q, dout;
    S *scores, *values;
  };
  // Rows of a tile and the vectors of keys that some of them see.
  struct Span {
    int row, m, v0, v1;
    int64_t end;
  };

  explicit AttentionScores(const AttentionGradParams& g) : View(g.fwd), g(g) {}
  const AttentionGradParams& g;

  void place_keys(Arena& arena, Keys& k, bool wanted = true) const {
    k.k = arena.take<S>(wanted ? words<P>(p.E) * kKeys : 0);
    k.v = arena.take<S>(wanted ? words<P>(p.Ev) * kKeys : 0);
  }
  void place_rows(Arena& arena, Rows& r) const {
    r.queries = arena.take<Query<S>>(kSub);
    r.q_scratch = arena.take<Value>(kSub * View::left_pitch(p.E));
    r.do_scratch = arena.take<Value>(kSub * View::left_pitch(p.Ev));
    r.scores = arena.take<S>(kSub * kKeys);
    r.values = arena.take<S>(kSub * kKeys);
  }
  void place_shared(Arena& arena) {
    delta_ = arena.take<S>(p.B * p.Hq * p.L);
    lse_ = arena.take<S>(p.B * p.Hq * p.L);
  }
  void pack_keys(const Keys& to, const Pair& a, const KeyBlock<S>& k) const {
    this->transposed(p.k, a, k, p.E, to.k);
    this->transposed(p.v, a, k, p.Ev, to.v);
  }
  void load_rows(Rows& to, const Pair& a, int64_t r0, int64_t n) const {
    for (int64_t r = 0; r < n; ++r) to.queries[r] = this->query(a, r0 + r);
    to.q = this->left(p.q, a, r0, n, p.E, to.q_scratch);
    to.dout = this->left(g.dout, a, r0, n, p.Ev, to.do_scratch);
  }

  // D of every row, and its lse: +inf where there is nothing to see makes every probability 0.
  void prepare(int thread, int count) {
    const Range mine = split(p.B * p.Hq * p.L, thread, count);
    const S* const lse = static_cast<const S*>(p.lse);
    for (int64_t n = mine.begin; n < mine.end; ++n) {
      const int64_t i = n % p.L, h = n / p.L % p.Hq, b = n / p.L / p.Hq;
      const int64_t o = b * p.out.sb + h * p.out.sh + i * p.out.sn;
      const int64_t d = b * g.dout.sb + h * g.dout.sh + i * g.dout.sn;
      V sum{};
      for (int64_t e = 0; e < p.Ev; e += L)
        sum = fma(load_as<S>(p.out.data, p.dtype, o + e, p.Ev - e), load_as<S>(g.dout.data, p.dtype, d + e, p.Ev - e),
                  sum);
      const bool nothing = lse[n] == -kInf;
      delta_[n] = nothing ? S(0) : total(sum) - (g.dlse ? static_cast<const S*>(g.dlse)[n] : S(0));
      lse_[n] = nothing ? kInf : lse[n];
    }
  }

  // Fills rows.scores and rows.values for n rows from r0 on, all kKeys columns; the tiles with something to see, and
  // how many. With `raw` the scores end as the gradient of the logits. `slopes`, if not null, gains that of each head.
  int scores(const Pair& a, const KeyBlock<S>& k, int64_t r0, int64_t n, const Keys& keys, const Rows& rows, bool raw,
             Span* spans, S* slopes) const {
    int found = 0;
    for_row_tiles(n, kMaxPanel, [&](int64_t t, int m) {
      const Query<S>* const q = rows.queries + t;
      const Range seen{View::range(q[0], k).begin, View::range(q[m - 1], k).end};
      if (seen.begin >= seen.end || ((p.dense.data || p.bias.data) && this->empty(q, m, k, seen))) {
        memset(rows.scores + t * kKeys, 0, sizeof(S) * size_t(m * kKeys));
        memset(rows.values + t * kKeys, 0, sizeof(S) * size_t(m * kKeys));
        return;
      }
      spans[found++] = {int(t), m, int(seen.begin / L), int((seen.end + L - 1) / L), seen.end};
    });
    // One operand after the other: both together do not fit the first-level cache.
    for (const Span* s = spans; s != spans + found; ++s) {
      S* const to = rows.scores + s->row * kKeys;
      if constexpr (P::per_word == 1)
        if (has_unpacked_keys(*this)) {
          dot_products(*this, a, k, rows.q.base + s->row * rows.q.pitch, rows.q.pitch, s->m, s->v0, s->v1, to);
          continue;
        }
      this->products(rows.q, s->row, s->m, keys.k, p.E, s->v0, s->v1, to);
    }
    for (const Span* s = spans; s != spans + found; ++s)
      this->products(rows.dout, s->row, s->m, keys.v, p.Ev, s->v0, s->v1, rows.values + s->row * kKeys);
    for (const Span* s = spans; s != spans + found; ++s)
      for (int i = s->row; i < s->row + s->m; ++i) {
        const Query<S>& q = rows.queries[i];
        const S slope =
            row_gradients(a, q, k, *s, rows.scores + i * kKeys, rows.values + i * kKeys, this->per_row(a, q), raw);
        if (slopes) slopes[q.h - a.h0] += slope;
      }
    return found;
  }

  // Jobs over the tiles of dbias: each sums what its tile is broadcast over, in order.
  int64_t bias_jobs() const {
    return (g.dbias.sb ? p.B : 1) * (g.dbias.sh ? p.Hq : 1) * (g.dbias.sl ? bias_subs() : 1) *
           (g.dbias.ss ? bias_blocks() : 1);
  }
  void bias_job(const Keys& keys, Rows& rows, int64_t job) const {
    const auto part = [&job](bool there, int64_t size) -> Range {
      if (!there) return {0, size};
      const int64_t at = job % size;
      job /= size;
      return {at, at + 1};
    };
    const Range blocks = part(g.dbias.ss, bias_blocks()), subs = part(g.dbias.sl, bias_subs());
    const Range heads = part(g.dbias.sh, p.Hq), batch = part(g.dbias.sb, p.B);
    S* const to = static_cast<S*>(g.dbias.data) + batch.begin * g.dbias.sb + heads.begin * g.dbias.sh;
    alignas(64) S sums[kSub * kKeys] = {};
    for (int64_t n = 0; n < this->sequences(); ++n)
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        Pair a = this->pair(n * p.Hkv + h / this->groups());
        if (a.b < batch.begin || a.b >= batch.end) continue;
        a.h0 = h;
        a.G = 1;
        for (int64_t s = subs.begin; s < subs.end; ++s)
          for (int64_t k = blocks.begin; k < blocks.end; ++k) bias_tile(a, keys, rows, s, k, sums);
      }
    const int64_t i0 = g.dbias.sl ? subs.begin * kSub : 0, j0 = g.dbias.ss ? blocks.begin * kKeys : 0;
    for (int64_t i = 0; i < (g.dbias.sl ? min64(kSub, p.L - i0) : 1); ++i)
      for (int64_t j = 0; j < (g.dbias.ss ? min64(kKeys, p.S - j0) : 1); ++j)
        to[(i0 + i) * g.dbias.sl + (j0 + j) * g.dbias.ss] = sums[i * kKeys + j];
  }

  // Of a head's sink: -sum P_sink D.
  S sink_gradient(int64_t h) const {
    const V sink = splat(static_cast<const S*>(p.sinks)[h]);
    V sum{};
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t i = 0; i < p.L; i += L) {
        const int64_t at = (b * p.Hq + h) * p.L + i, n = p.L - i;
        V lse = load_n(lse_ + at, n);
        for (int64_t lane = n; lane < L; ++lane) lse[lane] = kInf;
        sum = fma(-weight_of(sink - lse), load_n(delta_ + at, n), sum);
      }
    return total(sum);
  }

 private:
  S *delta_, *lse_;

  int64_t bias_subs() const { return (p.L + kSub - 1) / kSub; }
  int64_t bias_blocks() const { return (p.S + kKeys - 1) / kKeys; }

  // One tile of the table [L, S] added to `sums`, which has the shape that is left of it. Sequences of a pack, and the
  // global keys, are cut by the same tiles.
  void bias_tile(const Pair& a, const Keys& keys, Rows& rows, int64_t sub, int64_t block, S* sums) const {
    const int64_t first = max64(0, sub * kSub - a.q0), last = min64(a.L, (sub + 1) * kSub - a.q0);
    const int64_t j0 = max64(0, block * kKeys - a.k0), j1 = min64(a.S, (block + 1) * kKeys - a.k0);
    if (first >= last || j0 >= j1) return;
    load_rows(rows, a, first, last - first);
    typename View::Bit picked[kKeys];
    const KeyBlock<S> near{j0, int(j1 - j0), nullptr};
    KeyBlock<S> far{0, 0, nullptr};
    if (this->picks) far = {0, this->pick(a, j0, j1, picked), picked};
    for (int part = 0; part < 2; ++part) {
      const KeyBlock<S>* const k = part ? &far : &near;
      if (k->n == 0) continue;
      const Query<S>&low = rows.queries[0], &high = rows.queries[last - first - 1];
      if (!k->picked && max64(low.begin, k->j0) >= min64(high.end, k->j0 + k->n)) continue;
      pack_keys(keys, a, *k);
      Span spans[kSub];
      const int count = scores(a, *k, first, last - first, keys, rows, true, spans, nullptr);
      for (int s = 0; s < count; ++s)
        for (int i = spans[s].row; i < spans[s].row + spans[s].m; ++i)
          for (int64_t j = spans[s].v0 * L; j < min64(k->n, spans[s].v1 * L); ++j) {
            const int64_t row = g.dbias.sl ? a.q0 + first + i - sub * kSub : 0;
            const int64_t key = a.k0 + (k->picked ? int64_t(k->picked[j]) : k->j0 + j) - block * kKeys;
            sums[row * kKeys + (g.dbias.ss ? key : 0)] += rows.scores[i * kKeys + j];
          }
    }
  }

  // One row: products x and dP y into what `Rows` promises. Returns the gradient of its head's ALiBi slope, negated.
  S row_gradients(const Pair& a, const Query<S>& q, const KeyBlock<S>& k, const Span& s, S* x, S* y, int64_t at,
                  bool raw) const {
    const bool plain = this->plain;
    const Range seen = View::range(q, k);
    const bool edge = plain && (k.picked || seen.begin > s.v0 * L || seen.end < s.v1 * L);
    const V scale = splat(S(p.scale)), lse = splat(lse_[at]), D = splat(delta_[at]), zero{};
    const V after = splat(raw ? S(1) : S(p.scale)), keep_scale = splat(S(p.keep_scale));
    uint64_t bits = p.dropout ? this->keeps(a, q, k) >> (s.v0 * L) : 0;
    V slope_sum{};
    for (int v = 0; v < s.v0; ++v) {
      store(x + v * L, zero);
      store(y + v * L, zero);
    }
    for (int v = s.v0; v < s.v1; ++v) {
      V t = load(x + v * L), slope;
      if (!plain)
        t = this->logit(q, k, v, t, slope);
      else if (edge)
        t = View::hidden(q, k, v) ? splat(-kInf) : rounded(t * scale);
      else
        t = rounded(t * scale);
      V prob = weight_of(t - lse), dp = load(y + v * L), made = prob;
      if (p.dropout) {
        dp = kept<S>(dp * keep_scale, bits);
        made = kept<S>(prob * keep_scale, bits);
        bits >>= L & 63;
      }
      V ds = prob * (dp - D);
      if (p.alibi_slopes) slope_sum = fma(ds, View::distance(q, k, v), slope_sum);
      if (p.softcap != 0 && !raw) ds = ds * slope;
      store(x + v * L, ds * after);
      store(y + v * L, made);
    }
    for (int v = s.v1; v < kVecs; ++v) {
      store(x + v * L, zero);
      store(y + v * L, zero);
    }
    return p.alibi_slopes ? total(slope_sum) : S(0);
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
