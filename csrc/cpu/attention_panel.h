// A panel of queries in lanes: which keys each sees, its logits and weights.
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_tile.h"
#include "cpu/transpose.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class P>
struct QueryPanel {
  typedef typename P::Sum S;
  typedef typename VecOf<S>::bit Bit;
  static constexpr int kRows = kPanelRows<S>;
  int n, vectors;  // rows in use, and the vectors that hold them
  bool started;    // out holds sums
  S *q, *out;      // [words(E)][kRows], [Ev][kRows]
  // Lanes past n see nothing.
  Bit begin[kRows], end[kRows], reach[kRows], diagonal[kRows];
  S slope[kRows], top[kRows], sums[kRows];
  Query<S> rows[kRows];
};

// What a panel sees of a block of keys: keys [from[v], to[v]) for vector v, whole words; all of them if `full`.
struct Seen {
  int from[kMaxPanel], to[kMaxPanel];
  int first, last;  // of all vectors
  bool full;
};

template <class P>
class AttentionPanels : public AttentionView<P> {
 public:
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef typename View::Bit Bit;
  typedef typename View::B B;
  typedef Vec<S> V;
  typedef QueryPanel<P> Panel;
  static constexpr int L = kLanes<S>, kRows = kPanelRows<S>;
  static constexpr S kInf = S(__builtin_inf());
  using View::p;

  // A block of keys and values as left operands.
  struct Block {
    KeyBlock<S> k;
    LeftRows<P> keys;
    const Value* values;
    int64_t step;  // from one word of values to the next
  };
  // Of one thread: logits and then weights [kKeys][kRows] of a panel; what masks and dropout keep; the bias.
  struct Scratch {
    Value *keys, *values;
    S *scores, *bias, *most, *scale;
    uint64_t *allowed, *kept;
    Bit* picked;
  };

  explicit AttentionPanels(const AttentionParams& p) : View(p) {}

  void place_scratch(Arena& arena, Scratch& s) const {
    s.keys = arena.take<Value>(kKeys * View::left_pitch(p.E));
    s.values = arena.take<Value>(kKeys * value_pitch());
    s.scores = arena.take<S>(kKeys * kRows);
    s.bias = arena.take<S>(p.bias.data ? kKeys * kRows : 0);
    s.most = arena.take<S>(kRows);
    s.scale = arena.take<S>(kRows);
    s.allowed = arena.take<uint64_t>(kRows);
    s.kept = arena.take<uint64_t>(kRows);
    s.picked = arena.take<Bit>(kKeys);
  }
  void place_panel(Arena& arena, Panel& x) const {
    x.q = arena.take<S>(words<P>(p.E) * kRows);
    x.out = arena.take<S>(p.Ev * kRows);
  }

  void load_panel(Panel& x, const Pair& a, int64_t r0, int n) const {
    x.n = n;
    x.vectors = (n + L - 1) / L;
    x.started = false;
    for (int r = 0; r < x.vectors * L; ++r) {
      if (r < n) x.rows[r] = this->query(a, r0 + r);
      const Query<S>& q = x.rows[r < n ? r : n - 1];
      x.begin[r] = r < n ? Bit(q.begin) : 0;
      x.end[r] = r < n ? Bit(q.end) : 0;
      x.reach[r] = r < n ? Bit(q.reach) : 0;
      x.diagonal[r] = Bit(q.diagonal);
      x.slope[r] = q.slope;
      x.top[r] = -kInf;
      x.sums[r] = 0;
    }
    int64_t at[L];
    for (int v = 0; v < x.vectors; ++v) {
      const int64_t count = min64(L, n - v * L);
      for (int64_t i = 0; i < count; ++i) at[i] = this->row_at(p.q, a, r0 + v * L + i);
      pack_transposed<P>(x.q + v * L, kRows, p.q.data, p.dtype, at, count, p.E);
    }
  }

  // Values are copied: a tile reads a column of them, and rows that lie a power of two apart share a few cache sets.
  int64_t value_pitch() const { return round_up(p.Ev, L) + L; }
  Block load_block(const Scratch& s, const Pair& a, const KeyBlock<S>& k) const {
    Block b{k, {}, nullptr, 0};
    if (!k.picked && this->stored() && p.E % P::per_word == 0) {
      b.keys = {static_cast<const Value*>(p.k.data) + View::key_at(p.k, a, k, 0), p.k.sn};
    } else {
      b.keys = {s.keys, View::left_pitch(p.E)};
      for (int n = 0; n < k.n; ++n)
        load_operand<P>(s.keys + n * b.keys.pitch, p.k.data, p.dtype, View::key_at(p.k, a, k, n), p.E);
    }
    b.values = s.values;
    b.step = value_pitch() * P::per_word;
    for (int n = 0; n < k.n; n += P::per_word) {
      Value* const to = s.values + n * value_pitch();
      if constexpr (P::per_word == 1) load_operand<P>(to, p.v.data, p.dtype, View::key_at(p.v, a, k, n), p.Ev);
#if FSQ_BF16_PAIRS
      else
        load_paired(to, p.v.data, View::key_at(p.v, a, k, n),
                    n + 1 < k.n ? View::key_at(p.v, a, k, n + 1) : int64_t(-1), p.Ev);
#endif
    }
    return b;
  }

  Seen seen(const Panel& x, const KeyBlock<S>& k) const {
    Seen s{};
    const int even = P::per_word - 1;
    s.full = !k.picked && x.rows[x.n - 1].begin <= k.j0 && x.rows[0].end >= k.j0 + k.n;
    s.first = k.n;
    for (int v = 0; v < x.vectors; ++v) {
      if (s.full || k.picked) {
        s.from[v] = 0;
        s.to[v] = k.n;
      } else {
        const Query<S>&low = x.rows[v * L], &high = x.rows[min64(x.n, (v + 1) * L) - 1];
        s.from[v] = int(clamp64(low.begin - k.j0, 0, k.n)) & ~even;
        s.to[v] = int(min64(k.n, (clamp64(high.end - k.j0, 0, k.n) + even) & ~even));
        if (s.from[v] >= s.to[v]) {  // no key, but in order among its neighbours
          s.to[v] = s.from[v];
          continue;
        }
      }
      s.first = int(min64(s.first, s.from[v]));
      s.last = int(max64(s.last, s.to[v]));
    }
    return s;
  }

  // One block of keys past a panel.
  void attend(const Scratch& w, Panel& x, const Pair& a, const Block& b) const {
    const Seen s = seen(x, b.k);
    if (s.first >= s.last) return;
    if ((p.dense.data || p.bias.data) && this->empty(x.rows, x.n, b.k, {s.first, s.last})) return;
    for (int r = 0; r < x.vectors * L; ++r) w.most[r] = -kInf;
    products(w, x, b, s);
    if (!this->plain)
      logits(w, x, a, b.k, s);
    else if (!s.full)
      hide(w, x, b.k, s);
    if (p.dropout)
      for (int r = 0; r < x.n; ++r) w.kept[r] = this->keeps(a, x.rows[r], b.k);
    const bool moved = raise(w, x);
    if (s.full)
      weights_of(w, x, b.k, s);
    else
      for (int v = 0; v < x.vectors; ++v) weights<1>(w, x, b.k, v, s.from[v], s.to[v]);
    if (s.full)
      values(w, x, b, 0, x.vectors, s.first, s.last, !x.started ? Start::zero : moved ? Start::scaled : Start::there);
    else
      values_in_steps(w, x, b, s, moved);
    x.started = true;
  }

 private:
  void products(const Scratch& w, const Panel& x, const Block& b, const Seen& s) const {
    for_row_tiles(s.last - s.first, x.vectors, [&](int64_t t, int m) {
      const int key = s.first + int(t);
      int v0 = 0, v1 = x.vectors;
      if (!s.full) {
        while (v0 < v1 && !(s.to[v0] > key && s.from[v0] < key + m)) ++v0;
        while (v1 > v0 && !(s.to[v1 - 1] > key && s.from[v1 - 1] < key + m)) --v1;
        if (v0 == v1) return;
      }
      product_of<P>(v1 - v0,
                    m)(PanelTile<P>{b.keys.base + key * b.keys.pitch, b.keys.pitch, x.q + v0 * L, words<P>(p.E),
                                    w.scores + key * kRows + v0 * L, w.most + v0 * L, S(p.scale), Start::zero});
    });
  }

  static B hidden(const Panel& x, const KeyBlock<S>& k, int key, int v) {
    B begin, end;
    memcpy(&begin, x.begin + v * L, sizeof begin);
    memcpy(&end, x.end + v * L, sizeof end);
    const B j = B{} + Bit(k.picked ? int64_t(k.picked[key]) : k.j0 + key);
    if (!k.picked) return (j < begin) | (j >= end);
    B reach;
    memcpy(&reach, x.reach + v * L, sizeof reach);
    return ((j >= begin) & (j < end)) | (j >= reach);
  }

  void hide(const Scratch& w, const Panel& x, const KeyBlock<S>& k, const Seen& s) const {
    for (int v = 0; v < x.vectors; ++v) {
      V most = splat(-kInf);
      for (int key = s.from[v]; key < s.to[v]; ++key) {
        S* const at = w.scores + key * kRows + v * L;
        const V t = hidden(x, k, key, v) ? splat(-kInf) : load(at);
        store(at, t);
        most = larger(t, most);
      }
      store(w.most + v * L, most);
    }
  }

  // Logits, for the calls in which they are more than scaled products.
  void logits(const Scratch& w, const Panel& x, const Pair& a, const KeyBlock<S>& k, const Seen& s) const {
    if (p.dense.data)
      for (int r = 0; r < x.n; ++r) w.allowed[r] = this->allowed_keys(x.rows[r], k);
    if (p.bias.data) load_bias(w, x, k);
    for (int v = 0; v < x.vectors; ++v) {
      V most = splat(-kInf);
      B diagonal;
      memcpy(&diagonal, x.diagonal + v * L, sizeof diagonal);
      const V slope = load(x.slope + v * L);
      for (int key = s.from[v]; key < s.to[v]; ++key) {
        S* const at = w.scores + key * kRows + v * L;
        V t = load(at);
        if (p.softcap != 0) t = FSQ_ISA::tanh(t * splat(S(1 / p.softcap))) * splat(S(p.softcap));
        if (p.bias.data) t = t + load(w.bias + key * kRows + v * L);
        if (p.alibi_slopes) {
          const B d = B{} + Bit(k.picked ? int64_t(k.picked[key]) : k.j0 + key) - diagonal;
          t = fma(-slope, __builtin_convertvector(d < 0 ? -d : d, V), t);
        }
        B off{};
        if (!s.full) off = hidden(x, k, key, v);
        if (p.dense.data) off = off | ~bit_of(w.allowed + v * L, key);
        t = off ? splat(-kInf) : t;
        store(at, t);
        most = larger(t, most);
      }
      store(w.most + v * L, most);
    }
  }

  // All ones in the lanes whose word has bit `key`.
  static B bit_of(const uint64_t* words, int key) {
#if defined(__AVX512DQ__)
    const __m512i bit = _mm512_set1_epi64(int64_t(uint64_t(1) << key));
    const __mmask8 low = _mm512_test_epi64_mask(_mm512_loadu_si512(words), bit);
    if constexpr (L == 8) return (B)_mm512_movm_epi64(low);
    const __mmask8 high = _mm512_test_epi64_mask(_mm512_loadu_si512(words + 8), bit);
    return (B)_mm512_movm_epi32(_mm512_kunpackb(high, low));
#endif
    B b;
    for (int i = 0; i < L; ++i) b[i] = -Bit(words[i] >> key & 1);
    return b;
  }

  // The bias of a block, rows in lanes.
  void load_bias(const Scratch& w, const Panel& x, const KeyBlock<S>& k) const {
    for (int v = 0; v < x.vectors; ++v)
      for (int j = 0; j < k.n; j += L) {
        V rows[L];
        for (int i = 0; i < L; ++i) rows[i] = v * L + i < x.n ? this->biases(x.rows[v * L + i], k, j) : V{};
        transpose<S>(rows);
        for (int i = 0; i < L; ++i) store(w.bias + (j + i) * kRows + v * L, rows[i]);
      }
  }

  // Lifts the maxima to those of the block; w.scale becomes what all earlier sums shrink by. False if none does.
  bool raise(const Scratch& w, Panel& x) const {
    bool moved = false;
    for (int v = 0; v < x.vectors; ++v) {
      const V before = load(x.top + v * L), most = load(w.most + v * L);
      const V now = larger(most, before);
      const B more = now > before;
      // Where nothing was seen before, nothing is there to shrink.
      const V by = more & (before == -kInf) ? V{} : more ? weight_of(before - now) : splat(S(1));
      store(w.scale + v * L, by);
      if (!any(more)) continue;
      moved = true;
      store(x.top + v * L, now);
      store(x.sums + v * L, load(x.sums + v * L) * by);
    }
    return moved;
  }
  static bool any(B b) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)b, (__m512i)b) != 0;
#else
    Bit all = 0;
    for (int i = 0; i < L; ++i) all |= b[i];
    return all != 0;
#endif
  }

  void weights_of(const Scratch& w, Panel& x, const KeyBlock<S>& k, const Seen& s) const {
    switch (x.vectors) {
      case 1:
        return weights<1>(w, x, k, 0, s.first, s.last);
      case 2:
        return weights<2>(w, x, k, 0, s.first, s.last);
      case 3:
        return weights<3>(w, x, k, 0, s.first, s.last);
      default:
        return weights<4>(w, x, k, 0, s.first, s.last);
    }
  }

  // Logits of NV vectors and keys [from, to) into weights, and their sums. A word of two weights takes the place of the
  // first one's logit.
  template <int NV>
  void weights(const Scratch& w, Panel& x, const KeyBlock<S>& k, int v0, int from, int to) const {
    V base[NV], sum[NV];
    for (int v = 0; v < NV; ++v) {
      const V top = load(x.top + (v0 + v) * L);
      base[v] = top == -kInf ? V{} : top;
      sum[v] = load(x.sums + (v0 + v) * L);
    }
    S* const at = w.scores + v0 * L;
    const auto weight = [&](int key, int v) __attribute__((always_inline)) {
      const V e = weight_of(load(at + key * kRows + v * L) - base[v]);
      sum[v] = sum[v] + e;
      return p.dropout ? (bit_of(w.kept + (v0 + v) * L, key) ? e : V{}) : e;
    };
    if constexpr (P::per_word == 1) {
      for (int key = from; key < to; ++key)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(at + key * kRows + v * L, weight(key, v));
    }
#if FSQ_BF16_PAIRS
    else {
      int key = from;
      for (; key + 1 < to; key += 2)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V first = weight(key, v), second = weight(key + 1, v);
          store(at + key / 2 * kRows + v * L, paired(first, second));
        }
      if (key < to)
        for (int v = 0; v < NV; ++v) store(at + key / 2 * kRows + v * L, paired(weight(key, v), V{}));
    }
#endif
    for (int v = 0; v < NV; ++v) store(x.sums + (v0 + v) * L, sum[v]);
  }

  // Adds weights times values of keys [from, to) to vectors [v0, v1) of the sums.
  void values(const Scratch& w, Panel& x, const Block& b, int v0, int v1, int from, int to, Start start) const {
    const int64_t word = from / P::per_word;
    for_row_tiles(p.Ev, v1 - v0, [&](int64_t e, int m) {
      sum_of<P>(v1 - v0,
                m)(PanelTile<P>{b.values + word * b.step + e * P::per_word, b.step, w.scores + word * kRows + v0 * L,
                                words<P>(to - from), x.out + e * kRows + v0 * L, w.scale + v0 * L, S(1), start});
    });
  }

  // The same where vectors see different keys: in runs of keys that the same vectors see.
  void values_in_steps(const Scratch& w, Panel& x, const Block& b, const Seen& s, bool moved) const {
    if (!x.started) {
      memset(x.out, 0, sizeof(S) * size_t(p.Ev * kRows));
    } else if (moved) {
      for (int64_t e = 0; e < p.Ev; ++e)
        for (int v = 0; v < x.vectors; ++v) {
          S* const at = x.out + e * kRows + v * L;
          store(at, load(at) * load(w.scale + v * L));
        }
    }
    for (int from = s.first; from < s.last;) {
      int to = s.last, v0 = x.vectors, v1 = 0;
      for (int v = 0; v < x.vectors; ++v) {
        if (s.from[v] > from) to = int(min64(to, s.from[v]));
        if (s.to[v] > from) to = int(min64(to, s.to[v]));
        if (s.from[v] <= from && s.to[v] > from) {
          v0 = int(min64(v0, v));
          v1 = v + 1;
        }
      }
      if (v0 < v1) values(w, x, b, v0, v1, from, to, Start::there);
      from = to;
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
