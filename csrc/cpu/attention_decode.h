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
  // Keys and then values that come next, on their way into the caches in the order of memory: two lines with each step
  // of a product, since what is asked for at once beyond the buffers for misses holds up all that follows.
  struct Ahead {
    struct Run {
      const char* row;  // the next row
      int64_t step, lines, rows;
    };
    Run now, then;
    const char* at;
    int64_t left = 0;  // lines of the row at `at`

    Ahead(const View& view, const Pair& a, int64_t from, int64_t to)
        : now(run(view, view.p.k, a, from, to, view.p.E)), then(run(view, view.p.v, a, from, to, view.p.Ev)) {}
    static Run run(const View& view, const Heads& t, const Pair& a, int64_t from, int64_t to, int64_t width) {
      const int64_t size = dtype_size(view.p.dtype);
      if (from >= to) return {nullptr, 0, 0, 0};
      const char* const row = static_cast<const char*>(t.data) + View::key_at(t, a, {from, 1, nullptr}, 0) * size;
      return {row, t.sn * size, (width * size + 63) / 64, to - from};
    }
    void line() {
      if (left == 0) {
        if (now.rows == 0) {
          if (then.rows == 0) return;
          now = then;
          then.rows = 0;
        }
        at = now.row;
        left = now.lines;
        now.row += now.step;
        --now.rows;
      }
      __builtin_prefetch(at, 0, 2);
      at += 64;
      --left;
    }
    void operator()() {
      line();
      line();
    }
    void some() {
      for (int i = 0; i < kMisses; ++i) line();
    }
  };
  static constexpr int kMisses = 16;

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
      // Parts that follow each other in memory, if there are enough for everyone.
      const int64_t all_parts = this->pairs() * parts(), run = max64(1, min64(4, all_parts / (8 * count)));
      for (int64_t j; (j = jobs.take() * run) < all_parts;)
        for (int64_t n = j; n < min64(all_parts, j + run); ++n) part(w, n / parts(), n % parts());
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
    const int64_t end = w.queries[rows - 1].end, last = min64(end, (number + 1) * kPart);
    for (int64_t j = first / kKeys * kKeys; j < last; j += kKeys) {
      Ahead ahead(*this, a, j + kKeys, min64(end, j + 2 * kKeys));
      block(w, a, rows, {j, int(min64(kKeys, last - j)), nullptr}, ahead);
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
            ahead.some();
          }
        if (p.E > kChain) this->products({w.rows, p.E}, s.row, s.m, w.keys, p.E, s.v0, s.v1, x);
        for (int v = s.v0, next; v < s.v1 && p.E <= kChain; v = next) {
          next = int(min64(s.v1, (v / kMaxPanel + 1) * kMaxPanel));
          multiply({w.rows + s.row * p.E, p.E, 1, View::panel(w.keys, v, p.E), kMaxPanel * L, p.E, x + v * L, kKeys},
                   next - v, s.m, false, ahead);
        }
      } else {
        dot_products(*this, a, k, w.rows + s.row * p.E, p.E, s.m, s.v0, s.v1, x);
      }
      for (int i = 0; i < m; ++i) {
        const int64_t row = t + i;
        soften(a, w.queries[row], k, s, x + i * kKeys, w.top[row], w.sums + row * L, w.out + row * pitch());
        ahead.some();
      }
      spans[count++] = s;
    });
    if (count == 0) return;
    const RightRows<P> values = this->right(p.v, a, k, p.Ev, w.values);
    for_panels(0, pitch() / L, kMaxPanel, [&](int64_t v, int u) {
      for (const Span* s = spans; s != spans + count; ++s) {
        S* const o = w.out + s->row * pitch() + v * L;
        const int64_t from = s->v0 * L;
        multiply({w.scores + s->row * kKeys + from, kKeys, 1, values.panel(v, from, u), values.panel_pitch(u),
                  s->end - from, o, pitch()},
                 u, s->m, true, ahead);
      }
    });
  }

  // out[r][v] (+)= sum_k a[r * row + k * step] b[k * pitch][v], as `cpu/gemm.h` sums it up.
  struct Product {
    const S* a;
    int64_t row, step;
    const S* b;
    int64_t pitch, K;
    S* out;
    int64_t out_pitch;
  };
  template <int NV, int M>
  static void product(const Product& t, bool onto, Ahead& ahead) {
    V acc[M][NV] = {};
    if (onto)
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = load(t.out + r * t.out_pitch + v * L);
    accumulate<P, NV, M>(acc, t.a, t.row, t.step, t.b, t.pitch, t.K, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(t.out + r * t.out_pitch + v * L, acc[r][v]);
  }
  typedef void (*Code)(const Product&, bool, Ahead&);
  template <int NV, int M>
  static constexpr Code code() {
    return product < NV, M <= tile_rows(NV) ? M : 1 > ;
  }
  static void multiply(const Product& t, int nv, int m, bool onto, Ahead& ahead) {
#define FSQ_HEIGHTS(NV)                                                                                      \
  {                                                                                                          \
    code<NV, 1>(), code<NV, 2>(), code<NV, 3>(), code<NV, 4>(), code<NV, 5>(), code<NV, 6>(), code<NV, 7>(), \
        code<NV, 8>()                                                                                        \
  }
    static constexpr Code codes[kMaxPanel][kMaxTile] = {FSQ_HEIGHTS(1), FSQ_HEIGHTS(2), FSQ_HEIGHTS(3), FSQ_HEIGHTS(4)};
#undef FSQ_HEIGHTS
    codes[nv - 1][m - 1](t, onto, ahead);
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
