// Attention forward for few queries and many keys (decoding): at most kThin rows in every pair.
//
// A pair is cut along its keys, kPart at a time, so that all threads share the work of one long sequence; the parts are
// merged in order. The cut depends on S alone, not on the threads or the batch.
#pragma once
#include "cpu/attention_few.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int64_t kPart = 256;

template <class P>
class AttentionDecode : public AttentionView<P> {
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kVecs = View::kVecs;
  static constexpr S kInf = S(__builtin_inf());
  using View::p;

  struct Work {
    S *rows, *keys, *values, *scores, *out, *sums, *top;
    Query<S>* queries;
  };
  // Rows of a tile and the vectors of keys that some of them see; where the keys end.
  struct Span {
    int row, m, v0, v1;
    int64_t end;
  };
  // Keys and values that come next, on their way into the caches: a few at a time between the steps of a block, since
  // what is asked for at once beyond the buffers for misses holds up all that follows.
  struct Ahead {
    const AttentionDecode& view;
    const Pair& a;
    int64_t next, end;

    void fetch(int64_t keys) {
      const AttentionParams& p = view.p;
      const int64_t size = dtype_size(p.dtype), to = min64(end, next + keys);
      for (; next < to; ++next) {
        const KeyBlock<S> one{next, 1, nullptr};
        const char* const k = static_cast<const char*>(p.k.data) + View::key_at(p.k, a, one, 0) * size;
        const char* const v = static_cast<const char*>(p.v.data) + View::key_at(p.v, a, one, 0) * size;
        for (int64_t e = 0; e < p.E * size; e += 64) __builtin_prefetch(k + e, 0, 2);
        for (int64_t e = 0; e < p.Ev * size; e += 64) __builtin_prefetch(v + e, 0, 2);
      }
    }
  };

 public:
  explicit AttentionDecode(const AttentionParams& p) : View(p) {}

  static bool takes(const AttentionParams& p) { return has_few_rows(View(p)); }

  Status run() {
    Arena arena;
    place(arena);
    if (!arena.allocate()) return Status::out_of_memory;
    place(arena);
    Jobs jobs, merges;
    Barrier all;
    parallel(p.threads, [&](int thread, int count) {
      Work& w = work[thread];
      for (int64_t j; (j = jobs.take()) < this->pairs() * parts();) part(w, j / parts(), j % parts());
      all.wait(count);
      for (int64_t j; (j = merges.take()) < this->pairs();) merge(w, j);
    });
    return Status::ok;
  }

 private:
  Work work[kMaxThreads];
  S *part_top, *part_sum, *part_out;

  int64_t pitch() const { return round_up(p.Ev, L); }
  int64_t parts() const { return (p.S + kPart - 1) / kPart; }

  void place(Arena& arena) {
    for (int t = 0; t < p.threads; ++t) {
      Work& w = work[t];
      w.rows = arena.take<S>(kThin * p.E);
      w.keys = arena.take<S>(has_unpacked_keys(*this) ? 0 : kKeys * p.E);
      w.values = arena.take<S>(kKeys * pitch());
      w.scores = arena.take<S>(kThin * kKeys);
      w.out = arena.take<S>(kThin * pitch());
      w.sums = arena.take<S>(kThin * L);
      w.top = arena.take<S>(kThin);
      w.queries = arena.take<Query<S>>(kThin);
    }
    const int64_t cut = this->pairs() * parts() * p.L * this->groups();
    part_top = arena.take<S>(cut);
    part_sum = arena.take<S>(cut);
    part_out = arena.take<S>(cut * pitch());
  }

  void part(Work& w, int64_t index, int64_t number) {
    const Pair a = this->pair(index);
    const int64_t rows = a.rows();
    if (rows == 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      w.queries[r] = this->query(a, r);
      w.top[r] = -kInf;
      load_row(w.rows + r * p.E, p.q.data, p.dtype, this->row_at(p.q, a, r), p.E);
    }
    memset(w.sums, 0, sizeof(S) * size_t(rows * L));
    memset(w.out, 0, sizeof(S) * size_t(rows * pitch()));
    const int64_t first = max64(w.queries[0].begin, number * kPart);
    const int64_t last = min64(w.queries[rows - 1].end, (number + 1) * kPart);
    for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys) {
      Ahead ahead{*this, a, j + kKeys, min64(last, j + 2 * kKeys)};
      block(w, a, rows, {j, int(min64(kKeys, last - j)), nullptr}, ahead);
      ahead.fetch(kKeys);
    }
    const int64_t at = (index * parts() + number) * rows;
    for (int64_t r = 0; r < rows; ++r) {
      part_top[at + r] = w.top[r];
      part_sum[at + r] = total(load(w.sums + r * L));
    }
    memcpy(part_out + at * pitch(), w.out, sizeof(S) * size_t(rows * pitch()));
  }

  void block(Work& w, const Pair& a, int64_t rows, const KeyBlock<S>& k, Ahead& ahead) {
    Span spans[kThin];
    const bool packed = !has_unpacked_keys(*this);
    int count = 0;
    for_row_tiles(rows, kMaxPanel, [&](int64_t t, int m) {
      const Query<S>* const q = w.queries + t;
      const Range seen{View::range(q[0], k).begin, View::range(q[m - 1], k).end};
      if (seen.begin >= seen.end || ((p.dense.data || p.bias.data) && this->empty(q, m, k, seen))) return;
      const Span s{int(t), m, int(seen.begin / L), int((seen.end + L - 1) / L), seen.end};
      S* const x = w.scores + t * kKeys;
      if (packed) {
        if (count == 0)
          for (int v = 0; v * L < k.n; ++v) {
            this->transposed(p.k, a, k, p.E, w.keys, v);
            ahead.fetch(4);
          }
        this->products({w.rows, p.E}, s.row, s.m, w.keys, p.E, s.v0, s.v1, x);
        ahead.fetch(4);
      } else {
        dot_products(*this, a, k, w.rows + s.row * p.E, p.E, s.m, s.v0, s.v1, x);
      }
      for (int i = 0; i < m; ++i) {
        const int64_t row = t + i;
        soften(a, w.queries[row], k, s, x + i * kKeys, w.top[row], w.sums + row * L, w.out + row * pitch());
        ahead.fetch(4);
      }
      spans[count++] = s;
    });
    if (count == 0) return;
    const RightRows<P> values = this->right(p.v, a, k, p.Ev, w.values);
    for_panels(0, pitch() / L, kMaxPanel, [&](int64_t v, int u) {
      for (const Span* s = spans; s != spans + count; ++s) {
        S* const o = w.out + s->row * pitch() + v * L;
        const int64_t from = s->v0 * L;
        multiply(Tile<P>{s->m, u, w.scores + s->row * kKeys + from, kKeys, P::per_word, values.panel(v, from, u),
                         values.panel_pitch(u), s->end - from, o, pitch(), o, pitch()});
        ahead.fetch(4);
      }
    });
  }

  // One row's scores into weights, and all that was summed before to the new maximum. What a vector holds depends on
  // the row alone, however wide the tile around it.
  void soften(const Pair& a, const Query<S>& q, const KeyBlock<S>& k, const Span& s, S* x, S& top, S* sums,
              S* out) const {
    const V scale = splat(S(p.scale));
    V most = splat(-kInf), slope{};
    if (!this->plain) {
      for (int v = s.v0; v < s.v1; ++v) {
        const V t = this->logit(q, k, v, load(x + v * L), slope);
        store(x + v * L, t);
        most = larger(t, most);
      }
    } else {
      const Range seen = View::range(q, k);
      const bool edge = seen.begin > s.v0 * L || seen.end < s.v1 * L;
      for (int v = s.v0; v < s.v1; ++v) {
        V t = load(x + v * L) * scale;
        if (edge) t = View::hidden(q, k, v) ? splat(-kInf) : t;
        store(x + v * L, t);
        most = larger(t, most);
      }
    }
    const S now = largest(most);
    if (now > top) {
      if (top != -kInf) rescale(weight_of(splat(top - now)), sums, out);
      top = now;
    }
    const V base = splat(top == -kInf ? S(0) : top);
    uint64_t kept_bits = p.dropout ? this->keeps(a, q, k) >> (s.v0 * L) : 0;
    V sum = load(sums);
    const auto weight = [&](int v) __attribute__((always_inline)) {
      V e = weight_of(load(x + v * L) - base);
      sum = sum + e;
      if (p.dropout) {
        e = kept<S>(e, kept_bits);
        kept_bits >>= L & 63;
      }
      store(x + v * L, e);
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

  // A row's output and lse.
  void finish(const Pair& a, const Query<S>& q, int64_t r, S top, S sum, const S* out) const {
    const Finish<S> f = this->finish_rows(splat(top), splat(sum), splat(this->sink(q)));
    const int64_t at = this->row_at(p.out, a, r);
    for (int64_t e = 0; e < p.Ev; e += L) store_as<S>(p.out.data, p.dtype, at + e, load(out + e) * f.factor, p.Ev - e);
    static_cast<S*>(p.lse)[this->per_row(a, q)] = f.lse[0];
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
        const V mine = weight_of(splat(now == -kInf ? S(0) : top - now));
        const V its = weight_of(splat(now == -kInf ? S(0) : part_top[at] - now));
        sum = sum * mine[0] + part_sum[at] * its[0];
        for (int64_t e = 0; e < pitch(); e += L)
          store(out + e, fma(load(part_out + at * pitch() + e), its, load(out + e) * mine));
        top = now;
      }
      finish(a, this->query(a, r), r, top, sum, out);
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
