// Attention, backward, from out and lse (Dao et al. 2022, arXiv:2205.14135, algorithm 4): probabilities are computed
// again, five products in all.
//
// A job is one block of keys of a pair: it owns their dk and dv and takes all rows that see them past, kSub at a time.
// dq of a row sums over the blocks in their order. Where threads outnumber what pairs keep busy, a pair's blocks run at
// once and each hands kSub rows on to the next (a ticket); else one thread walks all blocks of a pair. The sums, and so
// the results, are the same.
#include <math.h>

#include "cpu/attention_scores.h"
#include "cpu/families.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class P>
class AttentionBackward : AttentionScores<P> {
  typedef AttentionScores<P> Scores;
  typedef AttentionView<P> View;
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef typename View::Bit Bit;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>;
  static constexpr int64_t kSub = Scores::kSub;
  using Scores::g;
  using View::p;

  // Sums over rows for one block of keys: the block's own, or where the user wants them.
  struct Sums {
    S *dk, *dv;
    int64_t k_pitch, v_pitch;
    bool fresh;  // unwritten
  };
  struct Work {
    typename Scores::Keys keys, picked_keys;
    typename Scores::Rows rows;
    RightRows<P> k, picked_k;
    S *k_rows, *picked_rows, *dk, *dv, *picked_dk, *picked_dv, *dq;
    S *q_right, *do_right;                 // all rows of a pair
    Value *ds_left, *ds_right, *pd_right;  // of pairs: rows of keys, and words of two rows for each key
    Bit* picked;
  };

 public:
  explicit AttentionBackward(const AttentionGradParams& grads) : Scores(grads) {}

  Status run() {
    tickets_ = this->pairs() < 3 * p.threads && p.threads > 1;
    Arena arena;
    place(arena);
    if (!arena.allocate()) return Status::out_of_memory;
    place(arena);
    for (int64_t n = 0; n < this->pairs() * subs(); ++n) passed[n] = 0;
    Jobs jobs, biases;
    Barrier all;
    parallel(p.threads, [&](int thread, int count) {
      Work& w = work[thread];
      this->prepare(thread, count);
      if (tickets_ && g.dq.data && !direct()) {
        const Range mine = split(this->pairs() * rows() * pitch(), thread, count);
        memset(dq_all + mine.begin, 0, sizeof(S) * size_t(mine.size()));
      }
      if (direct() && !all_begin()) clear_dq(thread, count);
      if (tickets_)
        for (int64_t n = 0; n < this->pairs(); ++n)
          pack_rows(this->pair(n), split(subs(), thread, count), q_right_all + n * right_size(pitch()),
                    do_right_all + n * right_size(v_pitch()));
      all.wait(count);
      const int64_t total_jobs = this->pairs() * (tickets_ ? blocks() : 1);
      for (int64_t j; (j = jobs.take()) < total_jobs;) {
        if (tickets_) {
          const Pair a = this->pair(j / blocks());
          if (j % blocks() * kKeys < a.S) block(w, j / blocks(), a, j % blocks());
          continue;
        }
        const Pair a = this->pair(j);
        pack_rows(a, {0, subs()}, w.q_right, w.do_right);
        if (g.dq.data && !direct()) memset(w.dq, 0, sizeof(S) * size_t(a.rows() * pitch()));
        for (int64_t k = 0; k * kKeys < a.S; ++k) block(w, j, a, k);
        if (g.dq.data && !direct()) store_dq(a, w.dq, {0, a.rows()});
      }
      if (g.dbias.data) {
        for (int64_t j; (j = biases.take()) < this->bias_jobs();) this->bias_job(w.keys, w.rows, j);
      }
      all.wait(count);
      if (tickets_ && g.dq.data && !direct())
        for (int64_t n = 0; n < this->pairs(); ++n) {
          const Pair a = this->pair(n);
          store_dq(a, dq_all + n * rows() * pitch(), split(a.rows(), thread, count));
        }
      const Range heads = split(p.Hq, thread, count);
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        if (g.dsinks) static_cast<S*>(g.dsinks)[h] = this->sink_gradient(h);
        if (g.dalibi) static_cast<S*>(g.dalibi)[h] = slope_gradient(h);
      }
    });
    return Status::ok;
  }

 private:
  Work work[kMaxThreads];
  S *dq_all, *slopes, *q_right_all, *do_right_all;
  int32_t* passed;  // per pair and kSub rows: how many blocks of keys have added to their dq
  bool tickets_;

  int64_t pitch() const { return round_up(p.E, L); }
  int64_t v_pitch() const { return round_up(p.Ev, L); }
  int64_t blocks() const { return (p.S + kKeys - 1) / kKeys; }
  int64_t rows() const { return p.L * this->groups(); }
  int64_t subs() const { return (rows() + kSub - 1) / kSub; }
  bool keys_wanted() const { return g.dk.data || g.dv.data; }  // an empty one is null
  // dq is summed up where the user wants it.
  bool direct() const { return this->groups() == 1 && this->whole(p.E) && g.dq.data; }
  // Every row sees the first key, so that the first block starts every row of dq.
  bool all_begin() const {
    const bool near = p.left >= 0 || (p.right >= 0 && p.causal != 1);
    return p.S > 0 && !near && !p.key_lengths && !p.cu_q && !p.dense.data && !p.bias.data;
  }
  // Likewise dk and dv; rows far apart would be in each other's way in the cache if they were added to often.
  bool direct_keys() const {
    const bool close = g.dk.sn == p.E && g.dv.sn == p.Ev;
    return keys_wanted() && this->whole(p.E) && this->whole(p.Ev) && !this->picks && (close || subs() == 1);
  }

  void place(Arena& arena) {
    for (int t = 0; t < p.threads; ++t) {
      Work& w = work[t];
      this->place_keys(arena, w.keys);
      this->place_keys(arena, w.picked_keys, this->picks);
      this->place_rows(arena, w.rows);
      const int64_t picked = this->picks ? kKeys : 0;
      w.k_rows = arena.take<S>(kKeys * pitch());
      w.picked_rows = arena.take<S>(picked * pitch());
      w.dk = arena.take<S>(kKeys * pitch());
      w.dv = arena.take<S>(kKeys * v_pitch());
      w.picked_dk = arena.take<S>(picked * pitch());
      w.picked_dv = arena.take<S>(picked * v_pitch());
      w.q_right = arena.take<S>(tickets_ || in_place(p.E) ? 0 : right_size(pitch()));
      w.do_right = arena.take<S>(tickets_ || in_place(p.Ev) ? 0 : right_size(v_pitch()));
      const int64_t halves = P::per_word == 1 ? 0 : kSub * kKeys;
      w.ds_left = arena.take<Value>(halves);
      w.ds_right = arena.take<Value>(halves);
      w.pd_right = arena.take<Value>(halves);
      w.picked = arena.take<Bit>(kKeys);
      w.dq = arena.take<S>(tickets_ || direct() || !g.dq.data ? 0 : rows() * pitch());
    }
    q_right_all = arena.take<S>(tickets_ && !in_place(p.E) ? this->pairs() * right_size(pitch()) : 0);
    do_right_all = arena.take<S>(tickets_ && !in_place(p.Ev) ? this->pairs() * right_size(v_pitch()) : 0);
    dq_all = arena.take<S>(tickets_ && !direct() && g.dq.data ? this->pairs() * rows() * pitch() : 0);
    slopes = arena.take<S>(g.dalibi ? this->pairs() * blocks() * this->groups() : 0);
    passed = arena.take<int32_t>(this->pairs() * subs());
    this->place_shared(arena);
  }

  // Rows as right operands for dk and dv, kSub at a time: packed once for all blocks of keys, unless they serve as they
  // lie in memory.
  bool in_place(int64_t width) const { return this->groups() == 1 && this->whole(width); }
  int64_t right_size(int64_t pitch) const { return keys_wanted() ? subs() * words<P>(kSub) * pitch : 0; }
  void pack_rows(const Pair& a, Range subs, S* q_right, S* do_right) const {
    if (!keys_wanted()) return;
    for (int64_t s = subs.begin; s < subs.end && s * kSub < a.rows(); ++s) {
      const int64_t n = min64(kSub, a.rows() - s * kSub), at = s * words<P>(kSub);
      if (!in_place(p.E)) this->right(p.q, a, s * kSub, n, p.E, q_right + at * pitch());
      if (!in_place(p.Ev)) this->right(g.dout, a, s * kSub, n, p.Ev, do_right + at * v_pitch());
    }
  }
  RightRows<P> packed_rows(const Heads& t, const Pair& a, int64_t r0, int64_t n, int64_t width, S* packed) const {
    if (in_place(width)) return this->right(t, a, r0, n, width, nullptr);
    return {packed + r0 / P::per_word * round_up(width, L), 0, words<P>(n)};
  }

  void clear_dq(int thread, int count) {
    const Range mine = split(p.B * p.Hq * p.L, thread, count);
    for (int64_t n = mine.begin; n < mine.end; ++n) {
      const int64_t i = n % p.L, h = n / p.L % p.Hq, b = n / p.L / p.Hq;
      memset(static_cast<S*>(g.dq.data) + b * g.dq.sb + h * g.dq.sh + i * g.dq.sn, 0, sizeof(S) * size_t(p.E));
    }
  }
  void store_dq(const Pair& a, const S* from, Range r) const {
    for (int64_t n = r.begin; n < r.end; ++n)
      store_row(g.dq.data, p.dtype, this->row_at(g.dq, a, n), from + n * pitch(), p.E);
  }

  // The block of keys number `at` of a pair, and whatever its rows and dq need of it.
  void block(Work& w, int64_t index, const Pair& a, int64_t at) {
    const KeyBlock<S> k{at * kKeys, int(min64(kKeys, a.S - at * kKeys)), nullptr};
    KeyBlock<S> far{0, 0, nullptr};
    if (this->picks) far = {0, this->pick(a, k.j0, k.j0 + k.n, w.picked), w.picked};
    bool packed = false;
    S* const slope = g.dalibi ? slopes + (index * blocks() + at) * a.G : nullptr;
    if (slope)
      for (int64_t h = 0; h < a.G; ++h) slope[h] = 0;
    Sums sums{w.dk, w.dv, pitch(), v_pitch(), true}, picked{w.picked_dk, w.picked_dv, pitch(), v_pitch(), true};
    if (direct_keys()) {
      sums = {static_cast<S*>(g.dk.data) + View::key_at(g.dk, a, k, 0),
              static_cast<S*>(g.dv.data) + View::key_at(g.dv, a, k, 0), g.dk.sn, g.dv.sn, true};
    }
    if (far.n > 0) {
      this->pack_keys(w.picked_keys, a, far);
      w.picked_k = this->right(p.k, a, far, p.E, w.picked_rows);
    }
    for (int64_t r0 = 0; r0 < a.rows(); r0 += kSub) {
      const int64_t n = min64(kSub, a.rows() - r0);
      const Query<S> first = this->query(a, r0), last = this->query(a, r0 + n - 1);
      const bool near = max64(first.begin, k.j0) < min64(last.end, k.j0 + k.n);
      // With global keys every block takes its turn, else those in reach, which follow each other.
      if (!near && !this->picks) continue;
      if (near || far.n > 0) this->load_rows(w.rows, a, r0, n);
      const int64_t turn = this->picks ? at : at - first.begin / kKeys;
      int32_t* const ticket = passed + index * subs() + r0 / kSub;
      bool mine = !tickets_;
      if (near) {
        if (!packed) {
          this->pack_keys(w.keys, a, k);
          w.k = this->right(p.k, a, k, p.E, w.k_rows);
          packed = true;
        }
        rows_of_block(w, index, a, k, r0, n, w.keys, w.k, sums, slope, ticket, turn, mine);
      }
      if (far.n > 0)
        rows_of_block(w, index, a, far, r0, n, w.picked_keys, w.picked_k, picked, slope, ticket, turn, mine);
      if (tickets_) {
        if (!mine) await(ticket, turn);
        __atomic_store_n(ticket, int32_t(turn + 1), __ATOMIC_RELEASE);
      }
    }
    if (!keys_wanted()) return;
    if (sums.fresh) clear(sums, k.n);
    for (int i = 0; i < far.n && !picked.fresh; ++i) {
      const int64_t to = far.picked[i] - k.j0;
      for (int64_t e = 0; e < pitch(); e += L)
        store(w.dk + to * pitch() + e, load(w.dk + to * pitch() + e) + load(w.picked_dk + i * pitch() + e));
      for (int64_t e = 0; e < v_pitch(); e += L)
        store(w.dv + to * v_pitch() + e, load(w.dv + to * v_pitch() + e) + load(w.picked_dv + i * v_pitch() + e));
    }
    if (direct_keys()) return;
    for (int j = 0; j < k.n; ++j) {
      store_row(g.dk.data, p.dtype, View::key_at(g.dk, a, k, j), w.dk + j * pitch(), p.E);
      store_row(g.dv.data, p.dtype, View::key_at(g.dv, a, k, j), w.dv + j * v_pitch(), p.Ev);
    }
  }

  void clear(const Sums& s, int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      memset(s.dk + j * s.k_pitch, 0, sizeof(S) * size_t(pitch()));
      memset(s.dv + j * s.v_pitch, 0, sizeof(S) * size_t(v_pitch()));
    }
  }

  static void await(int32_t* ticket, int64_t turn) {
    for (int spins = 0; __atomic_load_n(ticket, __ATOMIC_ACQUIRE) != int32_t(turn); ++spins) {
      cpu_pause();
      if (spins > 1000) sched_yield();
    }
  }

  // n rows against one block of keys: their part of dk and dv, and the block's part of their dq.
  void rows_of_block(Work& w, int64_t index, const Pair& a, const KeyBlock<S>& k, int64_t r0, int64_t n,
                     const typename Scores::Keys& keys, const RightRows<P>& k_right, Sums& sums, S* slope,
                     int32_t* ticket, int64_t turn, bool& mine) {
    typename Scores::Span spans[kSub];
    const int count = this->scores(a, k, r0, n, keys, w.rows, false, spans, slope);
    if (count == 0) return;
    const Value *left, *right_ds, *right_pd;
    if constexpr (P::per_word == 1) {
      left = right_ds = w.rows.scores;
      right_pd = w.rows.values;
    } else {
      in_pairs(w, n);
      left = w.ds_left;
      right_ds = w.ds_right;
      right_pd = w.pd_right;
    }
    if (keys_wanted()) {
      const int64_t of = tickets_ ? index : 0;
      S* const q_right = (tickets_ ? q_right_all : w.q_right) + (in_place(p.E) ? 0 : of * right_size(pitch()));
      S* const do_right = (tickets_ ? do_right_all : w.do_right) + (in_place(p.Ev) ? 0 : of * right_size(v_pitch()));
      const int64_t fresh = sums.fresh ? k.n : 0;
      over_rows(spans, count, fresh, right_ds, packed_rows(p.q, a, r0, n, p.E, q_right), pitch(), sums.dk,
                sums.k_pitch);
      over_rows(spans, count, fresh, right_pd, packed_rows(g.dout, a, r0, n, p.Ev, do_right), v_pitch(), sums.dv,
                sums.v_pitch);
      sums.fresh = false;
    }
    if (!g.dq.data) return;
    if (!mine) {
      await(ticket, turn);
      mine = true;
    }
    S* dq;
    const bool starts = direct() && all_begin() && turn == 0;
    int64_t dq_pitch = pitch();
    if (direct()) {
      dq = static_cast<S*>(g.dq.data) + this->row_at(g.dq, a, r0);
      dq_pitch = g.dq.sn;
    } else {
      dq = (tickets_ ? dq_all + index * rows() * pitch() : w.dq) + r0 * pitch();
    }
    for_panels(0, pitch() / L, kMaxPanel, [&](int64_t v, int u) {
      for (const typename Scores::Span* s = spans; s != spans + count; ++s) {
        const int64_t from = s->v0 * L;
        S* const to = dq + s->row * dq_pitch + v * L;
        multiply(Tile<P>{s->m, u, left + s->row * kKeys + from, kKeys, P::per_word,
                         k_right.panel(v, from / P::per_word, u), k_right.panel_pitch(u), words<P>(s->end - from),
                         starts ? nullptr : to, dq_pitch, to, dq_pitch, nullptr, 0, nullptr, 0, 0, !starts});
      }
    });
  }

  // Each block's products are a chain of their own that is then added: one chain over all blocks would round a long sum
  // of like numbers (an upstream gradient of one value, say) ever the same way.
  //
  // sums[key] += the rows' column of `left` times the rows of `right`, where left has kKeys columns. The first `fresh`
  // keys have no sums yet.
  void over_rows(const typename Scores::Span* spans, int count, int64_t fresh, const Value* left,
                 const RightRows<P>& right, int64_t width, S* sums, int64_t pitch) const {
    int64_t from = fresh ? 0 : kKeys, to = fresh;
    for (int s = 0; s < count; ++s) {
      from = min64(from, spans[s].v0 * L);
      to = max64(to, spans[s].end);
    }
    for_panels(0, width / L, kMaxPanel, [&](int64_t v, int u) {
      for_row_tiles(to - from, kMaxPanel, [&](int64_t t, int m) {
        const int64_t key = from + t;
        int first = 0, last = count;  // rows that see none of these keys are left out
        while (first < last && !(spans[first].v0 * L < key + m && spans[first].end > key)) ++first;
        while (last > first && !(spans[last - 1].v0 * L < key + m && spans[last - 1].end > key)) --last;
        S* const to_sums = sums + key * pitch + v * L;
        if (first == last) {
          if (fresh)
            for (int j = 0; j < m; ++j) memset(to_sums + j * pitch, 0, sizeof(S) * size_t(u * L));
          return;
        }
        const int64_t begin = spans[first].row / P::per_word, end = words<P>(spans[last - 1].row + spans[last - 1].m);
        multiply(Tile<P>{m, u, left + (begin * kKeys + key) * P::per_word, P::per_word, kKeys * P::per_word,
                         right.panel(v, begin, u), right.panel_pitch(u), end - begin, fresh ? nullptr : to_sums, pitch,
                         to_sums, pitch, nullptr, 0, nullptr, 0, 0, !fresh});
      });
    });
  }

  // The scores' gradients as left operands of pairs: along keys for dq, along rows for dk and dv.
  void in_pairs(Work& w, int64_t n) const {
    if constexpr (P::per_word == 2)
      for (int64_t r = 0; r < n; ++r)
        for (int c = 0; c < kKeys; c += L) {
          const V ds = load(w.rows.scores + r * kKeys + c), pd = load(w.rows.values + r * kKeys + c);
          const int64_t word = (r / 2 * kKeys + c) * 2;
          store_values<P>(w.ds_left + r * kKeys + c, ds, L);
          put_row<P>(reinterpret_cast<S*>(w.ds_right + word), r, ds);
          put_row<P>(reinterpret_cast<S*>(w.pd_right + word), r, pd);
        }
  }

  S slope_gradient(int64_t h) const {
    const int64_t hkv = h / this->groups(), head = h % this->groups();
    S sum = 0;
    for (int64_t n = 0; n < this->sequences(); ++n) {
      const Pair a = this->pair(n * p.Hkv + hkv);
      for (int64_t k = 0; k * kKeys < a.S; ++k)
        sum -= slopes[((n * p.Hkv + hkv) * blocks() + k) * this->groups() + head];
    }
    return sum;
  }
};

template <class P>
static Status run(const AttentionGradParams& p) {
  AttentionBackward<P> backward(p);
  return backward.run();
}

Status attention_backward(const AttentionGradParams& call) {
  AttentionGradParams p = call;
  p.fwd.threads = threads_for(call.fwd);
  if (p.fwd.dtype == DType::f64) return run<Whole<double>>(p);
#if FSQ_BF16_PAIRS
  if (p.fwd.dtype == DType::bf16) return run<Bf16Pairs>(p);
#endif
  return run<Whole<float>>(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
