// Attention, forward: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over blocks of keys.
//
// A unit is up to kUnit rows of a pair. It packs each block of keys once and takes its rows past them kSub at a time:
// products with the keys, softmax, products with the values, all in scratch that fits the caches. A pair of few rows
// (decoding) is cut along its keys instead, kPart at a time, and the parts are merged in order.
#include <math.h>

#include "cpu/attention.h"
#include "cpu/families.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int64_t kUnit = 192, kSub = 48, kThin = 8, kPart = 256;

template <class P>
class AttentionForward : AttentionView<P> {
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kVecs = View::kVecs;
  static constexpr S kInf = S(__builtin_inf());
  using View::p;

  struct Unit {
    int64_t pair, begin, end;  // rows, or keys of a thin pair
  };
  struct Work {
    S *keys, *values, *scores, *out, *sums, *top, *thin;
    Value *left, *probs;
    Query<S>* queries;
    typename View::Bit* picked;
  };
  struct Span {
    int row, m, v0, v1;
    int64_t end;  // of the keys that some row sees
  };

 public:
  explicit AttentionForward(const AttentionParams& p) : View(p) {}

  Status run() {
    Arena arena;
    place(arena);
    if (!arena.allocate()) return Status::out_of_memory;
    place(arena);
    list();
    Jobs jobs, merges;
    Barrier all;
    parallel(int(min64(p.threads, kMaxThreads)), [&](int thread, int count) {
      Work& w = work[thread];
      for (int64_t j; (j = jobs.take()) < count_;) unit(w, units[j]);
      if (!thin()) return;
      all.wait(count);
      for (int64_t j; (j = merges.take()) < this->pairs();) merge(w, j);
    });
    return Status::ok;
  }

 private:
  static constexpr int kMaxThreads = 256;
  Work work[kMaxThreads];
  Unit* units;
  S *part_top, *part_sum, *part_out;
  int64_t count_ = 0;

  int64_t pitch() const { return round_up(p.Ev, L); }
  // Few rows in every pair. What a row computes may depend on L and S, not on the batch.
  bool thin() const { return !p.cu_q && p.L * this->groups() <= kThin && !this->picks; }
  int64_t parts() const { return (p.S + kPart - 1) / kPart; }
  // Smaller units where there are few: results do not depend on it.
  int64_t unit_rows() const {
    int64_t rows = kUnit;
    while (rows > kSub && count_units(rows) < 6 * p.threads) rows /= 2;
    return rows;
  }
  int64_t count_units(int64_t rows) const {
    int64_t n = 0;
    for (int64_t s = 0; s < this->sequences(); ++s) {
      const int64_t length = p.cu_q ? p.cu_q[s + 1] - p.cu_q[s] : p.L;
      n += (length * this->groups() + rows - 1) / rows;
    }
    return n * p.Hkv;
  }

  void place(Arena& arena) {
    const int64_t rows = thin() ? kThin : kUnit;
    count_ = thin() ? this->pairs() * parts() : count_units(unit_rows());
    units = arena.take<Unit>(count_);
    for (int t = 0; t < min64(p.threads, kMaxThreads); ++t) {
      Work& w = work[t];
      w.keys = arena.take<S>(words<P>(p.E) * kKeys);
      w.values = arena.take<S>(kKeys * pitch());
      w.scores = arena.take<S>(kSub * kKeys);
      w.probs = arena.take<Value>(P::per_word == 1 ? 0 : kSub * kKeys);
      w.out = arena.take<S>(rows * pitch());
      w.sums = arena.take<S>(rows * L);
      w.top = arena.take<S>(rows);
      w.left = arena.take<Value>(rows * View::left_pitch(p.E));
      w.thin = arena.take<S>(thin() ? rows * p.E : 0);
      w.queries = arena.take<Query<S>>(rows);
      w.picked = arena.take<typename View::Bit>(kKeys);
    }
    const int64_t cut = thin() ? this->pairs() * parts() * p.L * this->groups() : 0;
    part_top = arena.take<S>(cut);
    part_sum = arena.take<S>(cut);
    part_out = arena.take<S>(cut * pitch());
  }

  void list() {
    int64_t n = 0;
    const int64_t step = unit_rows();
    for (int64_t i = 0; i < this->pairs(); ++i) {
      if (thin()) {
        for (int64_t k = 0; k < parts(); ++k) units[n++] = {i, k * kPart, min64(p.S, (k + 1) * kPart)};
        continue;
      }
      const int64_t rows = this->pair(i).rows();
      // The last rows first: if causal they have the most to do.
      for (int64_t u = (rows + step - 1) / step - 1; u >= 0; --u)
        units[n++] = {i, u * step, min64(rows, (u + 1) * step)};
    }
  }

  void unit(Work& w, const Unit& u) {
    const Pair a = this->pair(u.pair);
    const int64_t r0 = thin() ? 0 : u.begin, rows = thin() ? a.rows() : u.end - u.begin;
    for (int64_t r = 0; r < rows; ++r) {
      w.queries[r] = this->query(a, r0 + r);
      w.top[r] = -kInf;
    }
    memset(w.sums, 0, sizeof(S) * size_t(rows * L));
    memset(w.out, 0, sizeof(S) * size_t(rows * pitch()));
    if (rows == 0) return;
    LeftRows<P> left{};
    if (thin())
      for (int64_t r = 0; r < rows; ++r) load_row(w.thin + r * p.E, p.q.data, p.dtype, this->row_at(p.q, a, r), p.E);
    else
      left = this->left(p.q, a, r0, rows, p.E, w.left);
    int64_t first = w.queries[0].begin, last = w.queries[rows - 1].end;
    if (thin()) {
      first = max64(first, u.begin);
      last = min64(last, u.end);
    }
    for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys)
      block(w, a, left, rows, {j, int(min64(kKeys, last - j)), nullptr});
    if (this->picks) {
      int64_t from = 0;
      while (const int n = this->pick(a, from, a.S, w.picked)) {
        block(w, a, left, rows, {0, n, w.picked});
        from = w.picked[n - 1] + 1;
      }
    }
    if (!thin()) {
      for (int64_t r = 0; r < rows; ++r)
        finish(a, w.queries[r], this->row_at(p.out, a, r0 + r), w.top[r], total(load(w.sums + r * L)),
               w.out + r * pitch());
      return;
    }
    const int64_t at = (u.pair * parts() + u.begin / kPart) * rows;
    for (int64_t r = 0; r < rows; ++r) {
      part_top[at + r] = w.top[r];
      part_sum[at + r] = total(load(w.sums + r * L));
    }
    memcpy(part_out + at * pitch(), w.out, sizeof(S) * size_t(rows * pitch()));
  }

  // One block of keys past all rows of the unit.
  void block(Work& w, const Pair& a, LeftRows<P> left, int64_t rows, const KeyBlock<S>& k) {
    if (!thin()) this->transposed(p.k, a, k, p.E, w.keys);
    const RightRows<P> values = this->right(p.v, a, k, p.Ev, w.values);
    for (int64_t r = 0; r < rows; r += kSub) {
      const int64_t n = min64(kSub, rows - r);
      Span spans[kSub];
      int count = 0;
      for_row_tiles(n, kMaxPanel, [&](int64_t t, int m) {
        const Query<S>* const q = w.queries + r + t;
        const Range seen{View::range(q[0], k).begin, View::range(q[m - 1], k).end};
        if (seen.begin >= seen.end || ((p.dense.data || p.bias.data) && this->empty(q, m, k, seen))) return;
        const Span s{int(t), m, int(seen.begin / L), int((seen.end + L - 1) / L), seen.end};
        S* const x = w.scores + t * kKeys;
        if (thin())
          dot_products(w, a, k, s, x);
        else
          this->products(left, r + t, m, w.keys, p.E, s.v0, s.v1, x);
        for (int i = 0; i < m; ++i) {
          const int64_t row = r + t + i;
          soften(a, w.queries[row], k, s, x + i * kKeys, w.probs + (t + i) * kKeys, w.top[row], w.sums + row * L,
                 w.out + row * pitch());
        }
        spans[count++] = s;
      });
      const Value* probs;
      if constexpr (P::per_word == 1)
        probs = w.scores;
      else
        probs = w.probs;
      for_panels(0, pitch() / L, kMaxPanel, [&](int64_t v, int u) {
        for (const Span* s = spans; s != spans + count; ++s) {
          S* const o = w.out + (r + s->row) * pitch() + v * L;
          const int64_t from = s->v0 * L;
          multiply(Tile<P>{s->m, u, probs + s->row * kKeys + from, kKeys, P::per_word,
                           values.panel(v, from / P::per_word, u), values.panel_pitch(u), words<P>(s->end - from), o,
                           pitch(), o, pitch()});
        }
      });
    }
  }

  // Products of few rows with keys as they lie in memory.
  void dot_products(const Work& w, const Pair& a, const KeyBlock<S>& k, const Span& s, S* out) const {
    alignas(64) static const S zero[L] = {};
    const char* const keys = static_cast<const char*>(p.k.data) + View::key_at(p.k, a, k, 0) * dtype_size(p.dtype);
    for (int v = s.v0; v < s.v1; ++v)
      dots(Dots<S>{w.thin + s.row * p.E, p.E, s.m, keys, p.dtype, v * L, min64(L, k.n - v * L), p.E, zero, 0,
                   out + v * L, kKeys, p.k.sn});
  }

  // One row's scores into weights, and all that was summed before to the new maximum. What a vector holds depends on
  // the row alone, however wide the tile around it.
  void soften(const Pair& a, const Query<S>& q, const KeyBlock<S>& k, const Span& s, S* x, Value* probs, S& top,
              S* sums, S* out) const {
    const V c = splat(this->factor);
    V most = splat(-kInf), slope{};
    if (!this->plain) {
      for (int v = s.v0; v < s.v1; ++v) {
        const V t = this->logit(q, k, v, load(x + v * L), slope);
        store(x + v * L, t);
        most = larger(t, most);
      }
    } else {
      const Range seen = View::range(q, k);
      if (k.picked || seen.begin > s.v0 * L || seen.end < s.v1 * L)
        for (int v = s.v0; v < s.v1; ++v)
          store(x + v * L, View::hidden(q, k, v) ? splat(this->hidden_score) : load(x + v * L));
      if (s.v0 == 0 && s.v1 == kVecs)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) most = larger(load(x + v * L) * c, most);
      else
        for (int v = s.v0; v < s.v1; ++v) most = larger(load(x + v * L) * c, most);
    }
    const S now = largest(most);
    if (now > top) {
      if (top != -kInf) rescale(exp2(splat(top - now)), sums, out);
      top = now;
    }
    const V base = splat(top == -kInf ? S(0) : -top);
    const V scale = this->plain ? c : splat(S(1));
    uint64_t kept_bits = p.dropout ? this->keeps(a, q, k) >> (s.v0 * L) : 0;
    V sum = load(sums);
    const auto weight = [&](int v) __attribute__((always_inline)) {
      V e = exp2(fma(load(x + v * L), scale, base));
      sum = sum + e;
      if (p.dropout) {
        e = kept<S>(e, kept_bits);
        kept_bits >>= L & 63;
      }
      if constexpr (P::per_word == 1)
        store(x + v * L, e);
      else
        store_values<P>(probs + v * L, e, L);
    };
    if (s.v0 == 0 && s.v1 == kVecs)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) weight(v);
    else
      for (int v = s.v0; v < s.v1; ++v) weight(v);
    store(sums, sum);
  }
  void rescale(V by, S* sums, S* out) const {
    store(sums, load(sums) * by);
    for (int64_t e = 0; e < pitch(); e += L) store(out + e, load(out + e) * by);
  }

  void finish(const Pair& a, const Query<S>& q, int64_t at, S top, S sum, const S* out) const {
    S factor = 1;
    if (p.sinks) {
      const S sink = static_cast<const S*>(p.sinks)[q.h] * Exp2Const<S>::log2e, now = top > sink ? top : sink;
      const S by = top == -kInf ? S(0) : exp2(splat(top - now))[0];
      factor = by;
      sum = sum * by + exp2(splat(sink - now))[0];
      top = now;
    }
    const bool nothing = sum == 0;
    const V by = splat(nothing ? S(0) : factor * S(p.keep_scale) / sum);
    for (int64_t e = 0; e < p.Ev; e += L) store_as<S>(p.out.data, p.dtype, at + e, load(out + e) * by, p.Ev - e);
    static_cast<S*>(p.lse)[this->per_row(a, q)] =
        nothing ? -kInf : S(double(top) * Exp2Const<double>::ln2 + log(double(sum)));
  }

  void merge(Work& w, int64_t index) {
    const Pair a = this->pair(index);
    const int64_t rows = a.rows();
    for (int64_t r = 0; r < rows; ++r) {
      S top = -kInf, sum = 0;
      S* const out = w.out;
      memset(out, 0, sizeof(S) * size_t(pitch()));
      for (int64_t k = 0; k < parts(); ++k) {
        const int64_t at = (index * parts() + k) * rows + r;
        const S now = part_top[at] > top ? part_top[at] : top;
        // A part of NaN has no maximum, and its sums must come through.
        const V mine = exp2(splat(now == -kInf ? S(0) : top - now));
        const V its = exp2(splat(now == -kInf ? S(0) : part_top[at] - now));
        sum = sum * mine[0] + part_sum[at] * its[0];
        for (int64_t e = 0; e < pitch(); e += L)
          store(out + e, fma(load(part_out + at * pitch() + e), its, load(out + e) * mine));
        top = now;
      }
      finish(a, this->query(a, r), this->row_at(p.out, a, r), top, sum, out);
    }
  }
};

template <class P>
static Status run(const AttentionParams& p) {
  AttentionForward<P> forward(p);
  return forward.run();
}

Status attention_forward(const AttentionParams& p) {
  if (p.dtype == DType::f64) return run<Whole<double>>(p);
#if FSQ_BF16_PAIRS
  if (p.dtype == DType::bf16 && (p.cu_q || p.Hkv == 0 || p.L * (p.Hq / p.Hkv) > kThin || p.global_keys))
    return run<Bf16Pairs>(p);
#endif
  return run<Whole<float>>(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
