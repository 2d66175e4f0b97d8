// What forward kept for backward, and, where it kept only the states, the gates formed from them again.
//
// Every state is known by then, so a whole chunk of time steps is one product; its sums run in forward's order.
#pragma once
#include "cpu/gate_panels.h"

namespace fusedseq {
namespace FSQ_ISA {

// A vector in a user tensor, or nothing (zeros).
struct Stored {
  const void* data;
  int64_t at;
};

template <Cell C, class P>
class Kept {
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  typedef Traits<C> Tr;
  static constexpr int L = kLanes<S>;
  static constexpr int kSaved = saved_values(C);
  static constexpr bool kTwoPhases = Tr::B::gates > 0;

 public:
  Kept(const ScanParams& f, const Layout& lay) : f(f), lay(lay) {}

  bool recomputes() const { return kSaved > 0 && f.recompute; }

  void place(Arena& arena, int g, int64_t rows) {
    if (!recomputes()) return;
    Work& w = work[g];
    w.panels.place(arena, f, true);
    w.x = arena.take<Value>(rows * x_pitch());
    w.h = arena.take<Value>(rows * h_pitch());
    w.m = arena.take<Value>(kTwoPhases ? rows * h_pitch() : 0);
    w.gates = arena.take<S>(rows * kSaved * f.H);
  }

  // The activated gates of row j at step t, and what else cells/<family>.h names; of a chunk that was recomputed.
  const S* gates(int g, int64_t d, int64_t t, int64_t j) const {
    if (recomputes()) return work[g].gates + (lay.offset(t) - work[g].first + j) * kSaved * f.H;
    return reserved(d, t, j, kSaved);
  }
  // An LSTM's cell state after step t.
  const S* cell(int64_t d, int64_t t, int64_t j) const {
    return recomputes() ? reserved(d, t, j, 1) : reserved(d, t, j, kSaved) + 4 * f.H;
  }

  bool is_first(int64_t d, int64_t t, int64_t j) const { return d == 0 ? t == 0 : t == lay.length(j) - 1; }
  // The state that entered step t of row j.
  Stored state_before(int64_t d, int64_t t, int64_t j) const {
    if (lay.flag(f.resets, t, j)) return {nullptr, 0};
    if (is_first(d, t, j)) return {f.h0, (d * f.B + lay.user_row(j)) * f.R};
    return {f.y.data, lay.at(f.y, d == 0 ? t - 1 : t + 1, j) + d * f.R};
  }

  void begin(const Share& s, int64_t d) const {
    if (!recomputes()) return;
    pack<typename Tr::A>(s, d);
    if constexpr (kTwoPhases) pack<typename Tr::B>(s, d);
  }

  // Called by all threads of a group before the steps [t0, t1); ends in a barrier.
  void chunk(const Share& s, Barrier& group, int64_t d, int64_t t0, int64_t t1) {
    if (!recomputes()) return;
    Work& w = work[s.group];
    const int64_t rows = lay.offset(t1) - lay.offset(t0);
    gather(s, w, d, t0, t1, rows);
    if (s.thread == 0) w.first = lay.offset(t0);
    group.wait(s.threads);
    form<typename Tr::A>(s, w, w.h, rows);
    if constexpr (kTwoPhases) {
      group.wait(s.threads);
      form<typename Tr::B>(s, w, w.m, rows);
    }
    if constexpr (C == Cell::lstm) {
      const int64_t H = f.H;
      lay.for_rows(t0, t1, split(rows, s.thread, s.threads), [&](int64_t t, int64_t j, int64_t k) {
        memcpy(w.gates + (k * kSaved + 4) * H, cell(d, t, j), sizeof(S) * size_t(H));
      });
    }
    group.wait(s.threads);
  }

 private:
  struct Work {  // of one group
    GatePanels<C, P> panels;
    Value *x, *h, *m;
    S* gates;
    int64_t first;  // row number where the chunk begins
  };

  const ScanParams& f;
  const Layout& lay;
  Work work[kMaxDirections];
  const Activations act{};

  int64_t vectors() const { return (f.H + L - 1) / L; }
  int64_t x_pitch() const { return words<P>(f.I) * P::per_word; }
  int64_t h_pitch() const { return state_pitch<S>(f.R > f.H ? f.R : f.H); }

  const S* reserved(int64_t d, int64_t t, int64_t j, int values) const {
    const int64_t rows = f.batch_sizes ? lay.total() : f.T * f.B;
    return static_cast<const S*>(f.reserve) + (d * rows + lay.offset(t) + j) * values * f.H;
  }

  template <class Blk>
  void pack(const Share& s, int64_t d) const {
    int turn = 0;
    for_panels(0, vectors(), Blk::units, [&](int64_t v, int u) {
      if (turn++ % s.threads == s.thread) work[s.group].panels.template pack<Blk>(f, d, v, u);
    });
  }

  void gather(const Share& s, const Work& w, int64_t d, int64_t t0, int64_t t1, int64_t rows) const {
    lay.for_rows(t0, t1, split(rows, s.thread, s.threads), [&](int64_t t, int64_t j, int64_t k) {
      load_operand<P>(w.x + k * x_pitch(), f.x.data, f.dtype, lay.at(f.x, t, j), f.I);
      Value* const h = w.h + k * h_pitch();
      const Stored before = state_before(d, t, j);
      if (before.data)
        load_operand<P>(h, before.data, f.dtype, before.at, f.R);
      else
        memset(h, 0, sizeof(Value) * size_t(words<P>(f.R) * P::per_word));
      if (kTwoPhases && P::per_word > 1) w.m[k * h_pitch() + f.H] = 0;  // half of its last word, if H is odd
    });
  }

  // One phase of all rows: a's product with the block's panels on top of x's, then the activations.
  template <class Blk>
  void form(const Share& s, const Work& w, const Value* a, int64_t rows) const {
    const int64_t xw = words<P>(f.I), hw = words<P>(f.R), xp = x_pitch(), hp = h_pitch();
    int turn = 0;
    for_panels(0, vectors(), Blk::units, [&](int64_t v, int u) {
      if (turn++ % s.threads != s.thread) return;
      const int nv = Blk::gates * u;
      const S *const w_ih = w.panels.template w_ih<Blk>(v, u).b, *const w_hh = w.panels.template w_hh<Blk>(v, u).b;
      const S* const bias = w.panels.template bias_x<Blk>(v);
      for_row_tiles(rows, nv, [&](int64_t r, int m) {
        alignas(64) S sums[kMaxTile * kMaxPanel * L], x_part[kMaxTile * kMaxPanel * L];
        if constexpr (C == Cell::gru) {  // W_hn h is summed apart from the input's part
          multiply(Tile<P>{m, nv, w.x + r * xp, xp, P::per_word, w_ih, nv * L, xw, bias, 0, x_part, nv * L});
          memcpy(sums, x_part, sizeof(S) * size_t(m * nv * L));
          for (int i = 0; i < m; ++i) store(sums + (i * 3 + 2) * L, load(w.panels.bias_h(v)));
          multiply(Tile<P>{m, nv, a + r * hp, hp, P::per_word, w_hh, nv * L, hw, sums, nv * L, sums, nv * L});
        } else {
          multiply(Tile<P>{m, nv, w.x + r * xp, xp, P::per_word, w_ih, nv * L, xw, bias, 0, sums, nv * L, a + r * hp,
                           hp, w_hh, nv * L, hw});
        }
        for (int i = 0; i < m; ++i)
          for (int k = 0; k < u; ++k)
            activate<Blk>(w, r + i, (v + k) * L, sums + (i * nv + k) * L, u * L, x_part + i * nv * L);
      });
    });
  }

  void save(const Work& w, int64_t row, int slot, int64_t unit, V v) const {
    store_n(w.gates + (row * kSaved + slot) * f.H + unit, v, f.H - unit);
  }

  template <class Blk>
  inline __attribute__((always_inline)) void activate(const Work& w, int64_t row, int64_t unit, const S* sums,
                                                      int64_t pitch, const S* x_part) const {
    if constexpr (C == Cell::lstm) {
      for (int gate = 0; gate < 4; ++gate) {
        const V sum = load(sums + gate * pitch);
        save(w, row, gate, unit, gate == 2 ? act.state(sum) : act.gate(sum));
      }
    } else if constexpr (C == Cell::gru) {
      const V r = act.gate(load(sums)), hn = load(sums + 2 * pitch);
      save(w, row, 0, unit, r);
      save(w, row, 1, unit, act.gate(load(sums + pitch)));
      save(w, row, 2, unit, act.state(fma(r, hn, load(x_part + 2 * L))));
      save(w, row, 3, unit, hn);
    } else if constexpr (C == Cell::gru_reset_before && Blk::gate0 == 0) {
      const V r = act.gate(load(sums)), h = load_values<P>(w.h + row * h_pitch() + unit, f.H - unit);
      save(w, row, 0, unit, r);
      save(w, row, 1, unit, act.gate(load(sums + pitch)));
      store_values<P>(w.m + row * h_pitch() + unit, r * h, f.H - unit);
    } else if constexpr (C == Cell::gru_reset_before) {
      save(w, row, 2, unit, act.state(load(sums)));
    }
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
