// Backward scan of one layer on a CPU.
//
// Steps run in reverse, a thread owning a slice of units: the gate gradients of the later step times W_hh give the
// gradient that reaches its slice of h, the cell turns it into this step's gate gradients, one barrier, next step. Time
// goes in chunks: when a chunk's gate gradients are complete, and still in cache, they give its share of every
// weight gradient and its dx as large products (chunk_grads.h).
#pragma once
#include "cpu/chunk_grads.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C, class P>
class BackwardScan {
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>;
  static constexpr int kSaved = saved_values(C);
  static constexpr bool kGruBefore = C == Cell::gru_reset_before;

 public:
  explicit BackwardScan(const ScanGradParams& p) : p(p), f(p.fwd), kept(f, lay), grads(p, lay, kept) {}

  Status run() {
    int threads = f.threads;
    const Share probe = share(0, threads);
    if (probe.groups * probe.threads == 1) threads = 1;
    place(probe.groups);
    if (!arena.allocate(f.scratch)) return Status::out_of_memory;
    place(probe.groups);
    lay.fill(f);
    for (int i = 0; i < probe.groups * (threads + 1); ++i) barriers[i] = Barrier();
    parallel(threads, [&](int thread, int count) {
      const Share s = share(thread, count);
      if (s.idle) return;
      for (int64_t d = s.group; d < f.D; d += s.groups) direction(s, d, threads);
    });
    if (f.D > 1 && p.dx.data) {
      parallel(threads, [&](int thread, int count) { grads.combine_dx(thread, count); });
    }
    return Status::ok;
  }

 private:
  struct Work {  // scratch of one group
    S *w_hh, *w_hr, *dc, *carry;
    Value *dg, *edge, *dh;  // of a chunk; of the step after it
  };

  const ScanGradParams& p;
  const ScanParams& f;
  Layout lay;
  Arena arena;
  Barrier* barriers = nullptr;
  Work work[kMaxDirections];
  Kept<C, P> kept;
  ChunkGrads<C, P> grads;
  const Activations act{};

  int64_t vectors() const { return (f.H + L - 1) / L; }
  int64_t state_vectors() const { return (f.R + L - 1) / L; }
  int64_t gp() const { return grads.gate_pitch(); }
  int64_t cp() const { return state_pitch<S>(f.H); }
  int64_t hp() const { return grads.state_row_pitch(); }
  bool projected() const { return f.w_hr[0] != nullptr; }

  Share share(int thread, int count) const {
    return plan(thread, count, f.D, f.B, vectors(), 1, 4 * words<P>(gate_count(C) * f.H), f.T,
                !f.lengths && !f.batch_sizes, FSQ_VECTOR_BYTES);
  }

  void place(int groups) {
    lay.place(arena, f);
    barriers = arena.take<Barrier>(groups * (f.threads + 1));
    for (int g = 0; g < groups; ++g) {
      Work& w = work[g];
      w.w_hh = arena.take<S>(column_space<P>(f, gate_count(C) * f.H, f.R));
      w.w_hr = arena.take<S>(projected() ? column_space<P>(f, f.R, f.H) : 0);
      w.dg = arena.take<Value>(grads.chunk_rows() * gp());
      w.edge = arena.take<Value>(f.B * gp());
      w.dh = arena.take<Value>(projected() ? grads.chunk_rows() * hp() : 0);
      w.dc = arena.take<S>(C == Cell::lstm ? f.B * cp() : 0);
      w.carry = arena.take<S>(C == Cell::gru || kGruBefore ? f.B * cp() : 0);
      kept.place(arena, g, grads.chunk_rows());
      grads.place(arena, g);
    }
    grads.place_dx(arena);
  }

  // W_hh by columns, in the segments of rows that are multiplied together.
  void pack(const Share& s, const Work& w, int64_t d) {
    const int64_t K = gate_count(C) * f.H;
    const Range mine = split(state_vectors(), s.slice, s.slices);
    int turn = 0;
    for_panels(mine.begin, mine.end, kMaxPanel, [&](int64_t v, int u) {
      if (turn++ % s.teams == s.team) prepare_columns<P>(f, w.w_hh, f.w_hh[d], K, f.R, v, u);
    });
    if (projected())
      for_panels(s.vectors.begin, s.vectors.end, kMaxPanel, [&](int64_t v, int u) {
        if (turn++ % s.teams == s.team) prepare_columns<P>(f, w.w_hr, f.w_hr[d], f.R, f.H, v, u);
      });
  }

  void direction(const Share& s, int64_t d, int threads) {
    const Work& w = work[s.group];
    Barrier& group = barriers[s.group * (threads + 1)];
    Barrier& team = barriers[s.group * (threads + 1) + 1 + s.team];
    const bool reverse = d == 1;
    pack(s, w, d);
    kept.begin(s, d);
    grads.begin(s, d);
    if (P::per_word > 1) clear_ends(s, w);
    const Range mine = split(f.B, s.thread, s.threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) begin_row(w, d, j);
    group.wait(s.threads);
    const int64_t steps = grads.chunk_steps();
    for (int64_t k1 = f.T; k1 > 0; k1 -= steps) {
      const int64_t k0 = max64(0, k1 - steps);
      const int64_t t0 = reverse ? f.T - k1 : k0, t1 = reverse ? f.T - k0 : k1;
      const int64_t row0 = lay.offset(t0);
      kept.chunk(s, group, d, t0, t1);
      for (int64_t k = k1 - 1; k >= k0; --k) {
        const int64_t t = reverse ? f.T - 1 - k : k, later = reverse ? t - 1 : t + 1;
        const Value* next = k == k1 - 1 ? w.edge : w.dg + (lay.offset(later) - row0) * gp();
        step(s, w, Moment{d, t, later, s.group, reverse}, w.dg + (lay.offset(t) - row0) * gp(), next,
             w.dh + (lay.offset(t) - row0) * hp(), team);
      }
      group.wait(s.threads);
      // The first step of this chunk is the later neighbour of the next one.
      const int64_t t_edge = reverse ? t1 - 1 : t0;
      const Range rows = split(lay.alive(t_edge), s.thread, s.threads);
      memcpy(w.edge + rows.begin * gp(), w.dg + (lay.offset(t_edge) - row0 + rows.begin) * gp(),
             sizeof(Value) * size_t(rows.size() * gp()));
      grads.chunk(s, group, d, t0, t1, k1 == f.T, w.dg, w.dh);
      group.wait(s.threads);
    }
    const int64_t before = reverse ? f.T : -1;
    step(s, w, Moment{d, before, reverse ? f.T - 1 : 0, s.group, reverse}, nullptr, w.edge, nullptr, team);
    group.wait(s.threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) end_row(w, d, j);
    grads.finish(s, d);
    group.wait(s.threads);
  }

  // What fills the last word of a row is multiplied by 0, so it must be a number.
  void clear_ends(const Share& s, const Work& w) {
    const int64_t K = grads.gate_columns();
    const Range mine = split(grads.chunk_rows(), s.thread, s.threads);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      w.dg[k * gp() + K] = 0;
      if (projected()) w.dh[k * hp() + f.R] = 0;
    }
  }

  void begin_row(const Work& w, int64_t d, int64_t j) {
    const int64_t b = d * f.B + lay.user_row(j);
    if (C == Cell::lstm) {
      if (p.dc_n)
        load_row<S>(w.dc + j * cp(), p.dc_n, f.dtype, b * f.H, f.H);
      else
        memset(w.dc + j * cp(), 0, sizeof(S) * size_t(f.H));
    }
    if (C == Cell::gru || kGruBefore) memset(w.carry + j * cp(), 0, sizeof(S) * size_t(cp()));
  }

  void end_row(const Work& w, int64_t d, int64_t j) {
    const int64_t b = d * f.B + lay.user_row(j), size = dtype_size(f.dtype);
    if (lay.length(j) == 0) {
      char* dh0 = static_cast<char*>(p.dh0) + b * f.R * size;
      if (p.dh_n)
        memcpy(dh0, static_cast<const char*>(p.dh_n) + b * f.R * size, size_t(f.R * size));
      else
        memset(dh0, 0, size_t(f.R * size));
    }
    if (C == Cell::lstm) store_row<S>(p.dc0, f.dtype, b * f.H, w.dc + j * cp(), f.H);
  }

  struct Moment {
    int64_t d, t, later;  // `later`: the step that forward did next
    int group;
    bool reverse;
  };

  // Gate gradients of step t from those of the step after it. Rows that begin after t hand their state's gradient to
  // dh0.
  void step(const Share& s, const Work& w, const Moment& at, Value* dg, const Value* next, Value* dh_rows,
            Barrier& team) {
    const int64_t alive = lay.alive(at.t), from_later = lay.alive(at.later);
    const int64_t j0 = s.rows.begin, j1 = min64(s.rows.end, max64(alive, from_later));
    const Range mine = split(state_vectors(), s.slice, s.slices);
    for_panels(mine.begin, mine.end, kMaxPanel, [&](int64_t v, int u) {
      alignas(64) S sums[kMaxTile * kMaxPanel * L];
      const auto deliver = [&](int64_t j, const S* row, bool cut) {
        for (int k = 0; k < u; ++k) {
          const V dh = cut ? V{} : load(row + k * L);
          const int64_t unit = (v + k) * L;
          if (j >= alive)
            store_as<S>(p.dh0, f.dtype, (at.d * f.B + lay.user_row(j)) * f.R + unit, dh, f.R - unit);
          else if (projected())
            store_values<P>(dh_rows + j * hp() + unit, total_dh(at, j, unit, dh), f.R - unit);
          else
            cell(w, at, j, unit, total_dh(at, j, unit, dh), dg + j * gp());
        }
      };
      for_row_tiles(min64(j1, from_later) - j0, u, [&](int64_t r, int m) {
        const int64_t j = j0 + r;
        recurrent(w, at.d, next + j * gp(), v, u, m, j, sums);
        for (int i = 0; i < m; ++i) deliver(j + i, sums + i * u * L, lay.flag(f.resets, at.later, j + i));
      });
      for (int64_t j = max64(j0, from_later); j < j1; ++j) {  // rows whose last step this is
        const int64_t b = at.d * f.B + lay.user_row(j);
        for (int k = 0; k < u; ++k) {
          const int64_t unit = (v + k) * L;
          store(sums + k * L, p.dh_n ? load_as<S>(p.dh_n, f.dtype, b * f.R + unit, f.R - unit) : V{});
        }
        deliver(j, sums, false);
      }
    });
    if (at.t < 0 || at.t >= f.T) return;
    team.wait(s.slices);
    if (projected()) {
      through_projection(s, w, at, j0, min64(s.rows.end, alive) - j0, dg, dh_rows);
      team.wait(s.slices);
    }
    if (kGruBefore) {
      through_reset(s, w, at, j0, min64(s.rows.end, alive) - j0, dg);
      team.wait(s.slices);
    }
  }

  V total_dh(const Moment& at, int64_t j, int64_t unit, V dh) const {
    if (!p.dy.data) return dh;
    return dh + load_as<S>(p.dy.data, f.dtype, lay.at(p.dy, at.t, j) + at.d * f.R + unit, f.R - unit);
  }

  // sums = (what bypassed the products) + gate gradients x W_hh, for m rows from j on.
  void recurrent(const Work& w, int64_t d, const Value* dg, int64_t v, int u, int m, int64_t j, S* sums) const {
    const int64_t K = gate_count(C) * f.H;
    const Columns<S> b = columns<P>(f, w.w_hh, f.w_hh[d], K, f.R, v, u);
    alignas(64) static const S zero[kMaxPanel * L] = {};
    const bool carried = C == Cell::gru || kGruBefore;
    const S* in = carried ? w.carry + j * cp() + v * L : zero;
    const int64_t first = C == Cell::gru || kGruBefore ? 2 * f.H : K;
    Tile<P> t{m, u, dg, gp(), P::per_word, b.b, b.pitch, words<P>(first), in, carried ? cp() : 0, sums, u * L};
    if (C == Cell::gru) {  // W_hn meets the gradient of its own product, column block 3
      t.a2 = dg + 3 * f.H;
      t.row2 = gp();
      t.b2 = b.b + words<P>(2 * f.H) * b.pitch;
      t.b2_pitch = b.pitch;
      t.K2 = words<P>(f.H);
    }
    multiply(t);
  }

  const S* saved(const Moment& at, int64_t j) const { return kept.gates(at.group, at.d, at.t, j); }
  V slot(const S* row, int k, int64_t unit) const { return load_n(row + k * f.H + unit, f.H - unit); }
  V state_before(const Moment& at, int64_t j, int64_t unit) const {
    const Stored h = kept.state_before(at.d, at.t, j);
    return h.data ? load_as<S>(h.data, f.dtype, h.at + unit, f.R - unit) : V{};
  }
  void put(Value* dg, int gate, int64_t unit, V v) const { store_values<P>(dg + gate * f.H + unit, v, f.H - unit); }

  inline __attribute__((always_inline)) void cell(const Work& w, const Moment& at, int64_t j, int64_t unit, V dh,
                                                  Value* dg) const {
    if constexpr (C == Cell::lstm) {
      const S* now = saved(at, j);
      const bool cut = lay.flag(f.resets, at.t, j), first = kept.is_first(at.d, at.t, j);
      V c_prev{};
      if (!cut && !first)
        c_prev = load_n(kept.cell(at.d, at.reverse ? at.t + 1 : at.t - 1, j) + unit, f.H - unit);
      else if (!cut && f.c0)
        c_prev = load_as<S>(f.c0, f.dtype, (at.d * f.B + lay.user_row(j)) * f.H + unit, f.H - unit);
      S* const dc = w.dc + j * cp() + unit;
      V dc_now = load(dc);
      if (p.dc_all.data)
        dc_now = dc_now + load_as<S>(p.dc_all.data, f.dtype, lay.at(p.dc_all, at.t, j) + at.d * f.H + unit, f.H - unit);
      const LstmGrad<V> g = lstm_bwd(slot(now, 0, unit), slot(now, 1, unit), slot(now, 2, unit), slot(now, 3, unit),
                                     slot(now, 4, unit), c_prev, dh, dc_now, act);
      put(dg, 0, unit, g.di);
      put(dg, 1, unit, g.df);
      put(dg, 2, unit, g.dg);
      put(dg, 3, unit, g.dg_o);
      store(dc, cut ? V{} : g.dc_prev);
    } else if constexpr (C == Cell::gru) {
      const S* now = saved(at, j);
      const GruGrad<V> g = gru_bwd(slot(now, 0, unit), slot(now, 1, unit), slot(now, 2, unit), slot(now, 3, unit),
                                   state_before(at, j, unit), dh, act);
      put(dg, 0, unit, g.dr);
      put(dg, 1, unit, g.dz);
      put(dg, 2, unit, g.dn);
      put(dg, 3, unit, g.dhn);
      store(w.carry + j * cp() + unit, g.dh_prev);
    } else if constexpr (kGruBefore) {
      const S* now = saved(at, j);
      const GruGrad<V> g = gru_before_bwd(slot(now, 1, unit), slot(now, 2, unit), state_before(at, j, unit), dh, act);
      put(dg, 1, unit, g.dz);
      put(dg, 2, unit, g.dn);
      store(w.carry + j * cp() + unit, g.dh_prev);
    } else {
      const int64_t y = lay.at(f.y, at.t, j) + at.d * f.R + unit;
      put(dg, 0, unit, rnn_bwd<C == Cell::rnn_relu>(load_as<S>(f.y.data, f.dtype, y, f.R - unit), dh, act));
    }
  }

  // LSTM with projection: the gradient of h (R wide) through W_hr to that of o tanh(c).
  void through_projection(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, Value* dg,
                          const Value* dh_rows) {
    alignas(64) static const S zero[kMaxPanel * L] = {};
    for_panels(s.vectors.begin, s.vectors.end, kMaxPanel, [&](int64_t v, int u) {
      const Columns<S> b = columns<P>(f, w.w_hr, f.w_hr[at.d], f.R, f.H, v, u);
      for_row_tiles(n, u, [&](int64_t r, int m) {
        alignas(64) S sums[kMaxTile * kMaxPanel * L];
        const int64_t j = j0 + r;
        multiply(
            Tile<P>{m, u, dh_rows + j * hp(), hp(), P::per_word, b.b, b.pitch, words<P>(f.R), zero, 0, sums, u * L});
        for (int i = 0; i < m; ++i)
          for (int k = 0; k < u; ++k)
            cell(w, at, j + i, (v + k) * L, load(sums + (i * u + k) * L), dg + (j + i) * gp());
      });
    });
  }

  // GRU that resets before the product: the gradient of n through W_hn to r h, and so to r.
  void through_reset(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, Value* dg) {
    alignas(64) static const S zero[kMaxPanel * L] = {};
    for_panels(s.vectors.begin, s.vectors.end, kMaxPanel, [&](int64_t v, int u) {
      const Columns<S> b = columns<P>(f, w.w_hh, f.w_hh[at.d], 3 * f.H, f.R, v, u);
      const S* w_hn = b.b + words<P>(2 * f.H) * b.pitch;
      for_row_tiles(n, u, [&](int64_t r, int m) {
        alignas(64) S sums[kMaxTile * kMaxPanel * L];
        const int64_t j = j0 + r;
        multiply(Tile<P>{m, u, dg + j * gp() + 2 * f.H, gp(), P::per_word, w_hn, b.pitch, words<P>(f.H), zero, 0, sums,
                         u * L});
        for (int i = 0; i < m; ++i)
          for (int k = 0; k < u; ++k) {
            const int64_t unit = (v + k) * L;
            S* const carry = w.carry + (j + i) * cp() + unit;
            V dh_prev = load(carry);
            const V dr = gru_before_bwd_reset(slot(saved(at, j + i), 0, unit), state_before(at, j + i, unit),
                                              load(sums + (i * u + k) * L), dh_prev, act);
            put(dg + (j + i) * gp(), 0, unit, dr);
            store(carry, dh_prev);
          }
      });
    });
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
