// Forward scan of one layer on a CPU.
//
// A thread owns a slice of hidden units with all their gates. Time goes in chunks: the chunk's input projection is one
// product into a cache-sized buffer, then each step multiplies the previous state with the slice's panels of W_hh,
// starting from that buffer, and applies the cell while the sums are still in registers. Only h crosses threads:
// one barrier per step.
#pragma once
#include "cpu/gate_panels.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C, class P>
class ForwardScan {
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  typedef Traits<C> Tr;
  typedef typename Tr::A BlockA;
  typedef typename Tr::B BlockB;
  static constexpr int L = kLanes<S>;
  static constexpr int G = BlockA::gates + BlockB::gates;
  static constexpr int kSaved = saved_values(C);
  static constexpr bool kTwoPhases = BlockB::gates > 0;
  // A GRU blends with its last state, which must not be one rounded for the product.
  static constexpr bool kExact = P::per_word > 1 && (C == Cell::gru || C == Cell::gru_reset_before);

 public:
  explicit ForwardScan(const ScanParams& p) : p(p) {}

  Status run() {
    int threads = p.threads;
    const Share probe = share(0, threads);
    if (probe.groups * probe.threads == 1) threads = 1;
    group_threads = probe.threads;
    place(probe.groups);
    if (!arena.allocate(p.scratch)) return Status::out_of_memory;
    place(probe.groups);
    lay.fill(p);
    direct = sizeof(Value) == size_t(dtype_size(p.dtype)) && p.I > 0 && p.I % P::per_word == 0 && lay.dense(p.x);
    barriers = arena_barriers;
    for (int i = 0; i < probe.groups * (threads + 1); ++i) barriers[i] = Barrier();
    parallel(threads, [&](int thread, int count) {
      const Share s = share(thread, count);
      if (s.idle) return;
      for (int64_t d = s.group; d < p.D; d += s.groups) direction(s, d, threads);
    });
    return Status::ok;
  }

  // See CpuTable::pack.
  int64_t pack(void* const* into) {
    Arena measured;
    Work w;
    place_kept(measured, w);
    for (int64_t d = 0; into && d < p.D; ++d) {
      Arena block(into[d]);
      place_kept(block, w);
      parallel(p.threads, [&](int thread, int count) {
        Share s{};  // the panels divided among all threads, each of its whole width
        s.thread = thread;
        s.threads = count;
        s.vectors = {0, vectors()};
        s.team = thread;
        s.teams = count;
        s.slices = 1;
        pack<BlockA>(s, w, d);
        if constexpr (kTwoPhases) pack<BlockB>(s, w, d);
        if (projected()) pack_projection(s, w, d);
      });
    }
    return measured.used();
  }

 private:
  // Where a finished row of a step is written to.
  struct Out {
    int64_t y, c;  // element offsets
    S* saved;
    bool now, next;  // a reset before this step, before the next one
  };
  struct State {  // before a step, or after it
    Value* h;
    S* exact;  // with kExact: h before it was rounded
  };
  struct Work {  // scratch of one group
    Out* outs;   // B for each slice
    GatePanels<C, P> panels;
    S *w_hr, *gx, *c, *z;
    Value *x, *m;
    State state[2];
  };

  const ScanParams& p;
  Layout lay;
  Arena arena;
  Barrier *barriers = nullptr, *arena_barriers = nullptr;
  Work work[kMaxDirections];
  bool direct = false;
  int group_threads = 1;
  const Activations act{};

  int64_t vectors() const { return (p.H + L - 1) / L; }
  int64_t state_vectors() const { return (p.R + L - 1) / L; }
  int64_t hp() const { return state_pitch<S>(p.R); }  // pitch of h
  int64_t cp() const { return state_pitch<S>(p.H); }  // pitch of c, m, z and the exact h
  int64_t x_words() const { return words<P>(p.I); }
  int64_t h_words() const { return words<P>(p.R); }
  int64_t x_pitch() const { return direct ? lay.pitch(p.x) : x_words() * P::per_word; }
  bool projected() const { return p.w_hr[0] != nullptr; }
  // One step uses every weight once: packing would cost more than it saves. (T alone decides: a row's result must not
  // depend on the batch.)
  bool unpacked() const { return p.T == 1; }

  // With enough rows to reuse them, the step reads W_ih too, and its sums never leave the registers in between. The
  // order of every sum is the same. (torch's GRU needs the two products of n apart.) Weights too large to stay in the
  // last-level cache from step to step had better be read in two parts, W_ih once per chunk.
  bool together(const Share& s) const {
    const int64_t bytes = vectors() * L * G * (x_words() + h_words()) * int64_t(sizeof(S));
    return C != Cell::gru && !unpacked() && s.rows.size() >= 24 && bytes <= 16 * 1024 * 1024;
  }

  Share share(int thread, int count) const {
    Share s = plan(thread, count, p.D, p.B, vectors(), G, x_words() + h_words(), p.T, !p.lengths && !p.batch_sizes,
                   FSQ_VECTOR_BYTES);
    constexpr int units = BlockA::units;
    if (units > 1 && BlockA::gates > 1 && prepacked()) {  // see GatePanels
      const Range panels = split((vectors() + units - 1) / units, s.slice, s.slices);
      s.vectors = {panels.begin * units, min64(vectors(), panels.end * units)};
    }
    return s;
  }

  int64_t chunk_steps() const {
    const int64_t row_bytes = vectors() * G * L * int64_t(sizeof(S));
    const int64_t rows = max64(128, 256 * 1024 * group_threads / max64(row_bytes, 1));
    return max64(1, min64(p.T, rows / max64(p.B, 1)));
  }

  void place(int groups) {
    lay.place(arena, p);
    arena_barriers = arena.take<Barrier>(groups * (p.threads + 1));
    const int64_t n = vectors() * L, rows = chunk_steps() * p.B;
    for (int g = 0; g < groups; ++g) {
      Work& w = work[g];
      w.outs = arena.take<Out>(p.B * min64(p.threads, vectors()));  // groups may differ in threads
      if (!prepacked()) w.panels.place(arena, p, !unpacked());
      w.w_hr = arena.take<S>(projected() && !unpacked() ? state_vectors() * L * words<P>(p.H) : 0);
      w.x = arena.take<Value>(rows * x_words() * P::per_word);
      w.gx = arena.take<S>(rows * G * n);
      for (State& state : w.state) {
        state.h = arena.take<Value>(p.B * hp());
        state.exact = arena.take<S>(kExact ? p.B * cp() : 0);
      }
      w.c = arena.take<S>(C == Cell::lstm ? p.B * cp() : 0);
      w.m = arena.take<Value>(projected() || kTwoPhases ? p.B * cp() : 0);
      w.z = arena.take<S>(kTwoPhases ? p.B * cp() : 0);
    }
  }

  // Dot products go over whole groups of rows, without a remainder in every tile.
  int tile_height(int nv) const { return unpacked() ? kMaxTile : tile_rows(nv); }

  bool prepacked() const { return p.packed[0] && !unpacked(); }

  // What `pack` leaves to later calls.
  void place_kept(Arena& block, Work& w) const {
    w.panels.place(block, p, true, true);
    w.w_hr = block.take<S>(projected() ? state_vectors() * L * words<P>(p.H) : 0);
  }

  // Calls f(first vector, count) over vectors in panels of up to `widest`.
  template <class F>
  inline __attribute__((always_inline)) void panels_of(Range r, int widest, F f) const {
    if (prepacked())
      for_grid(r.begin, r.end, widest, f);
    else
      for_panels(r.begin, r.end, widest, f);
  }

  template <class Blk>
  void pack(const Share& s, const Work& w, int64_t d) const {
    int turn = 0;
    for_panels(s.vectors.begin, s.vectors.end, Blk::units, [&](int64_t v, int u) {
      if (turn++ % s.teams == s.team) w.panels.template pack<Blk>(p, d, v, u);
    });
  }

  template <class Blk>
  void project(const Share& s, const Work& w, int64_t d, const Value* x, Range rows, int64_t chunk_rows) {
    const int64_t pitch = x_pitch();
    panels_of(s.vectors, Blk::units, [&](int64_t v, int u) {
      const int nv = Blk::gates * u;
      const S* bias = w.panels.template bias_x<Blk>(v);
      S* gx = w.panels.template at<Blk>(w.gx, chunk_rows, v) + rows.begin * nv * L;
      if (unpacked()) {
        gate_dots<Blk>(x + rows.begin * pitch, pitch, rows.size(), p.w_ih[d], p.I, v, u, bias, 0, gx);
      } else {
        const Columns<S> b = w.panels.template w_ih<Blk>(v, u);
        multiply_panel<P>(x + rows.begin * pitch, pitch, rows.size(), x_words(), b.b, b.pitch, nv, bias, 0, gx, nv * L);
      }
    });
  }

  // The panel's product without packed weights: for each gate and unit vector, dots with the weight's own rows.
  template <class Blk>
  void gate_dots(const Value* a, int64_t lda, int64_t m, const void* weight, int64_t K, int64_t v, int u, const S* in,
                 int64_t in_pitch, S* out) const {
    const int nv = Blk::gates * u;
    if constexpr (P::per_word == 1)  // pairs are for longer scans
      for (int c = 0; c < nv; ++c) {
        const int64_t unit = (v + c % u) * L;
        dots(Dots<S>{a, lda, m, weight, p.dtype, (Blk::gate0 + c / u) * p.H + unit, min64(L, p.H - unit), K, in + c * L,
                     in_pitch, out + c * L, nv * L});
      }
  }

  void direction(const Share& s, int64_t d, int threads) {
    Work w = work[s.group];
    Barrier& group = barriers[s.group * (threads + 1)];
    Barrier& team = barriers[s.group * (threads + 1) + 1 + s.team];
    const bool reverse = d == 1;
    if (prepacked()) {
      Arena block(const_cast<void*>(p.packed[d]));
      place_kept(block, w);
    } else {
      pack<BlockA>(s, w, d);
      if constexpr (kTwoPhases) pack<BlockB>(s, w, d);
      if (projected()) pack_projection(s, w, d);
    }
    const Range mine = split(p.B, s.thread, s.threads);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      Value* const h = w.state[0].h + j * hp();
      initial_operand<P>(h, p.h0, p, lay, d, j, p.R, reverse);
      memcpy(w.state[1].h + j * hp(), h, sizeof(Value) * size_t(h_words() * P::per_word));
      if (kExact)
        for (const State& state : w.state) initial_state(state.exact + j * cp(), p.h0, p, lay, d, j, p.R, reverse);
      if (P::per_word > 1 && (projected() || kTwoPhases))
        w.m[j * cp() + p.H] = 0;  // half of its last word, if H is odd
      if (C == Cell::lstm) initial_state(w.c + j * cp(), p.c0, p, lay, d, j, p.H, reverse);
    }
    const int64_t steps = chunk_steps();
    for (int64_t s0 = 0; s0 < p.T; s0 += steps) {
      const int64_t s1 = min64(p.T, s0 + steps);
      const int64_t t0 = reverse ? p.T - s1 : s0, t1 = reverse ? p.T - s0 : s1;
      const int64_t row0 = lay.offset(t0), rows = lay.offset(t1) - row0;
      const Value* x = w.x;
      if (direct) {
        x = static_cast<const Value*>(p.x.data) + row0 * lay.pitch(p.x);
      } else {
        if (s.teams > 1 && s0 > 0) group.wait(s.threads);  // a slower team may still read the chunk before
        gather(s, w, t0, t1);
      }
      if (!direct || s.teams > 1 || s0 == 0) group.wait(s.threads);
      const Range part = split(together(s) ? 0 : rows, s.team, s.teams);
      project<BlockA>(s, w, d, x, part, rows);
      if constexpr (kTwoPhases) project<BlockB>(s, w, d, x, part, rows);
      if (s.teams > 1) group.wait(s.threads);
      for (int64_t k = s0; k < s1; ++k) {
        const int64_t t = reverse ? p.T - 1 - k : k;
        step(s, w, d, t, reverse ? t - 1 : t + 1, lay.offset(t) - row0, rows, x, w.state[k & 1], w.state[(k + 1) & 1],
             team);
        team.wait(s.slices);
      }
    }
    group.wait(s.threads);
    finish(mine, w, d, reverse);
    group.wait(s.threads);
  }

  void gather(const Share& s, const Work& w, int64_t t0, int64_t t1) {
    const Range part = split(lay.offset(t1) - lay.offset(t0), s.thread, s.threads);
    lay.for_rows(t0, t1, part, [&](int64_t t, int64_t j, int64_t k) {
      load_operand<P>(w.x + k * x_pitch(), p.x.data, p.dtype, lay.at(p.x, t, j), p.I);
    });
  }

  struct Moment {
    int64_t d, t, t_next;
  };
  Out out(const Moment& at, int64_t j) const {
    Out o;
    o.y = lay.at(p.y, at.t, j) + at.d * p.R;
    o.c = p.c_all.data ? lay.at(p.c_all, at.t, j) + at.d * p.H : 0;
    const int64_t row = at.d * reserve_rows() + lay.offset(at.t) + j;
    const int kept = p.recompute ? C == Cell::lstm : kSaved;
    o.saved = p.reserve && kept ? static_cast<S*>(p.reserve) + row * kept * p.H : nullptr;
    o.now = lay.flag(p.resets, at.t, j);
    o.next = lay.flag(p.resets, at.t_next, j);
    return o;
  }
  int64_t reserve_rows() const { return p.batch_sizes ? lay.total() : p.T * p.B; }
  void save(const Out& o, int slot, int64_t unit, V v) const { store_n(o.saved + slot * p.H + unit, v, p.H - unit); }
  void emit(const Out& o, const State& next, int64_t j, int64_t unit, V h) const {
    const V kept = o.next ? V{} : h;
    store_values<P>(next.h + j * hp() + unit, kept, filled(p.R - unit));
    if constexpr (kExact) store(next.exact + j * cp() + unit, kept);
    store_as<S>(p.y.data, p.dtype, o.y + unit, h, p.R - unit);
  }

  // Lanes to store of n that count. What lies past a row fills its last word, so it must stay 0 in pairs.
  static int64_t filled(int64_t n) { return P::per_word > 1 ? n : L; }

  V state_at(const State& state, int64_t j, int64_t unit) const {
    if constexpr (kExact)
      return load(state.exact + j * cp() + unit);
    else
      return load_values<P>(state.h + j * hp() + unit, L);
  }

  void step(const Share& s, const Work& w, int64_t d, int64_t t, int64_t t_next, int64_t row, int64_t chunk_rows,
            const Value* x, const State& now, const State& next, Barrier& team) {
    const int64_t j0 = s.rows.begin, n = min64(s.rows.end, lay.alive(t)) - j0;
    const Moment at{d, t, t_next};
    Out* outs = w.outs + s.slice * p.B;
    for (int64_t j = j0; j < j0 + n; ++j) outs[j] = out(at, j);
    block_step<BlockA>(s, w, at, j0, n, row, chunk_rows, x, now.h, hp(), now, next);
    if constexpr (kTwoPhases) {
      team.wait(s.slices);
      block_step<BlockB>(s, w, at, j0, n, row, chunk_rows, x, w.m, cp(), now, next);
    }
    if (projected()) {
      team.wait(s.slices);
      project_state(s, w, at, j0, n, next);
    }
  }

  // One phase of a step: a's product with the block's panels on top of the input projection, then the cell.
  template <class Blk>
  void block_step(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, int64_t row,
                  int64_t chunk_rows, const Value* x, const Value* a, int64_t lda, const State& now,
                  const State& next) {
    if (n <= 0) return;
    const int64_t xp = x_pitch();
    panels_of(s.vectors, Blk::units, [&](int64_t v, int u) {
      const int nv = Blk::gates * u;
      const S* gx = w.panels.template at<Blk>(w.gx, chunk_rows, v) + row * nv * L;
      const Columns<S> b_x = w.panels.template w_ih<Blk>(v, u), b_h = w.panels.template w_hh<Blk>(v, u);
      for_tiles(n, tile_height(nv), [&](int64_t r, int m) {
        alignas(64) S sums[kMaxTile * kMaxPanel * L];
        const int64_t j = j0 + r;
        const S* in = gx + j * nv * L;
        if constexpr (C == Cell::gru) {  // W_hn h is summed apart from the input's part
          for (int i = 0; i < m; ++i) {
            for (int g = 0; g < 2; ++g) store(sums + (i * 3 + g) * L, load(in + (i * 3 + g) * L));
            store(sums + (i * 3 + 2) * L, load(w.panels.bias_h(v)));
          }
          in = sums;
        }
        if (unpacked())
          gate_dots<Blk>(a + j * lda, lda, m, p.w_hh[at.d], p.R, v, u, in, nv * L, sums);
        else if (together(s))
          multiply(Tile<P>{m, nv, x + (row + j) * xp, xp, P::per_word, b_x.b, b_x.pitch, x_words(),
                           w.panels.template bias_x<Blk>(v), 0, sums, nv * L, a + j * lda, lda, b_h.b, b_h.pitch,
                           h_words()});
        else
          multiply(
              Tile<P>{m, nv, a + j * lda, lda, P::per_word, b_h.b, b_h.pitch, h_words(), in, nv * L, sums, nv * L});
        for (int i = 0; i < m; ++i) {
          const Out& o = w.outs[s.slice * p.B + j + i];
          for (int k = 0; k < u; ++k)
            cell<Blk>(w, o, j + i, (v + k) * L, sums + (i * nv + k) * L, u * L, gx + ((j + i) * nv) * L, now, next);
        }
      });
    });
  }

  // The cell of one row over one unit vector; `sums` holds its gates, `pitch` apart.
  template <class Blk>
  inline __attribute__((always_inline)) void cell(const Work& w, const Out& o, int64_t j, int64_t unit, const S* sums,
                                                  int64_t pitch, const S* gx, const State& now,
                                                  const State& next) const {
    if constexpr (C == Cell::lstm) {
      S* const cell = w.c + j * cp() + unit;
      const V c_prev = o.now ? V{} : load(cell);
      const LstmStep<V> c =
          lstm_fwd(load(sums), load(sums + pitch), load(sums + 2 * pitch), load(sums + 3 * pitch), c_prev, act);
      store(cell, c.c);
      if (o.saved && p.recompute) {
        save(o, 0, unit, c.c);
      } else if (o.saved) {
        save(o, 0, unit, c.i);
        save(o, 1, unit, c.f);
        save(o, 2, unit, c.g);
        save(o, 3, unit, c.o);
        save(o, 4, unit, c.c);
      }
      if (p.c_all.data) store_as<S>(p.c_all.data, p.dtype, o.c + unit, c.c, p.H - unit);
      if (projected())
        store_values<P>(w.m + j * cp() + unit, c.h, filled(p.H - unit));
      else
        emit(o, next, j, unit, c.h);
    } else if constexpr (C == Cell::gru) {
      const V hn = load(sums + 2 * pitch);
      const GruStep<V> c = gru_fwd(load(sums), load(sums + pitch), load(gx + 2 * L), hn, state_at(now, j, unit), act);
      if (o.saved) {
        save(o, 0, unit, c.r);
        save(o, 1, unit, c.z);
        save(o, 2, unit, c.n);
        save(o, 3, unit, hn);
      }
      emit(o, next, j, unit, c.h);
    } else if constexpr (C == Cell::gru_reset_before && Blk::gate0 == 0) {
      const V reset = act.gate(load(sums)), z = act.gate(load(sums + pitch));
      store_values<P>(w.m + j * cp() + unit, reset * state_at(now, j, unit), filled(p.H - unit));
      store(w.z + j * cp() + unit, z);
      if (o.saved) {
        save(o, 0, unit, reset);
        save(o, 1, unit, z);
      }
    } else if constexpr (C == Cell::gru_reset_before) {
      const V n = act.state(load(sums));
      if (o.saved) save(o, 2, unit, n);
      emit(o, next, j, unit, gru_blend(load(w.z + j * cp() + unit), n, state_at(now, j, unit), act));
    } else {
      emit(o, next, j, unit, rnn_fwd<C == Cell::rnn_relu>(load(sums), act));
    }
  }

  void pack_projection(const Share& s, const Work& w, int64_t d) const {
    if (unpacked()) return;
    const Range mine = split(state_vectors(), s.slice, s.slices);
    int turn = 0;
    for_panels(mine.begin, mine.end, kMaxPanel, [&](int64_t v, int u) {
      if (turn++ % s.teams != s.team) return;
      pack_gates<P>(w.w_hr + v * L * words<P>(p.H), 1, u, p.w_hr[d], p.dtype, 0, p.R, v * L, p.H);
    });
  }

  // h = m W_hr^T (LSTM with projection, Sak et al. 2014).
  void project_state(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, const State& next) {
    if (n <= 0) return;
    const int64_t K = words<P>(p.H);
    panels_of(split(state_vectors(), s.slice, s.slices), kMaxPanel, [&](int64_t v, int u) {
      const Columns<S> b = prepacked() ? grid_columns<S>(w.w_hr, K, state_vectors(), v, kMaxPanel)
                                       : Columns<S>{w.w_hr + v * L * K, u * L};
      for_tiles(n, tile_height(u), [&](int64_t r, int m) {
        alignas(64) S sums[kMaxTile * kMaxPanel * L];
        alignas(64) static const S zero[kMaxPanel * L] = {};
        const Value* a = w.m + (j0 + r) * cp();
        if (!unpacked())
          multiply(Tile<P>{m, u, a, cp(), P::per_word, b.b, b.pitch, K, zero, 0, sums, u * L});
        else if constexpr (P::per_word == 1)
          for (int k = 0; k < u; ++k)
            dots(Dots<S>{a, cp(), m, p.w_hr[at.d], p.dtype, (v + k) * L, min64(L, p.R - (v + k) * L), p.H, zero, 0,
                         sums + k * L, u * L});
        for (int i = 0; i < m; ++i) {
          const int64_t j = j0 + r + i;
          const Out& o = w.outs[s.slice * p.B + j];
          for (int k = 0; k < u; ++k) emit(o, next, j, (v + k) * L, load(sums + (i * u + k) * L));
        }
      });
    });
  }

  void finish(Range rows, const Work& w, int64_t d, bool reverse) {
    const int64_t size = dtype_size(p.dtype);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const int64_t b = d * p.B + lay.user_row(j), n = lay.length(j);
      char* h_n = static_cast<char*>(p.h_n) + b * p.R * size;
      if (n > 0) {
        const int64_t at = lay.at(p.y, reverse ? 0 : n - 1, j) + d * p.R;
        const char* last = static_cast<const char*>(p.y.data) + at * size;
        if (h_n != last) memcpy(h_n, last, size_t(p.R * size));  // a single step may have one tensor for both
        if (C == Cell::lstm) store_row<S>(p.c_n, p.dtype, b * p.H, w.c + j * cp(), p.H);
        continue;
      }
      copy_state(h_n, p.h0, b * p.R * size, p.R * size);
      if (C == Cell::lstm) copy_state(static_cast<char*>(p.c_n) + b * p.H * size, p.c0, b * p.H * size, p.H * size);
    }
  }
  static void copy_state(char* dst, const void* src, int64_t at, int64_t bytes) {
    if (src)
      memcpy(dst, static_cast<const char*>(src) + at, size_t(bytes));
    else
      memset(dst, 0, size_t(bytes));
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
