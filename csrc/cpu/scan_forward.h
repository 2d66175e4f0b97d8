// Forward scan of one layer on a CPU.
//
// A thread owns a slice of hidden units with all their gates. Time goes in chunks: the chunk's input projection is one
// product into a cache-sized buffer, then each step multiplies the previous state with the slice's panels of W_hh,
// starting from that buffer, and applies the cell while the sums are still in registers. Only h crosses threads:
// one barrier per step.
#pragma once
#include "cpu/forward_work.h"
#include "cpu/lane_sums.h"

namespace fusedseq {
namespace FSQ_ISA {

template <Cell C, class P>
class ForwardScan : public ForwardWork<C, P> {
  typedef ForwardWork<C, P> Base;
  typedef typename Base::Out Out;
  typedef typename Base::State State;
  typedef typename Base::Work Work;
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  typedef Vec<S> V;
  typedef typename Base::BlockA BlockA;
  typedef typename Base::BlockB BlockB;
  static constexpr int L = kLanes<S>;
  static constexpr int kSaved = saved_values(C);
  static constexpr bool kTwoPhases = Base::kTwoPhases, kExact = Base::kExact;

  using Base::arena;
  using Base::arena_barriers;
  using Base::barriers;
  using Base::chunk_steps;
  using Base::cp;
  using Base::direct;
  using Base::group_threads;
  using Base::h_words;
  using Base::hp;
  using Base::lay;
  using Base::p;
  using Base::pack_projection;
  using Base::panels_of;
  using Base::place;
  using Base::place_kept;
  using Base::prepacked;
  using Base::projected;
  using Base::share;
  using Base::state_vectors;
  using Base::together;
  using Base::unpacked;
  using Base::vectors;
  using Base::work;
  using Base::x_pitch;
  using Base::x_words;

 public:
  explicit ForwardScan(const ScanParams& p) : Base(p) {}

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

 private:
  const Activations act{};

  template <class Blk>
  void project(const Share& s, const Work& w, int64_t d, const Value* x, Range rows, int64_t chunk_rows) {
    const int64_t pitch = x_pitch();
    panels_of(s.vectors, Blk::units, [&](int64_t v, int u) {
      const int nv = Blk::gates * u;
      const S* bias = w.panels.template bias_x<Blk>(v);
      S* gx = w.panels.template at<Blk>(w.gx, chunk_rows, v) + rows.begin * nv * L;
      const Columns<S> b = w.panels.template w_ih<Blk>(v, u);
      multiply_panel<P>(x + rows.begin * pitch, pitch, rows.size(), x_words(), b.b, b.pitch, nv, bias, 0, gx, nv * L);
    });
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
      this->template pack<BlockA>(s, w, d);
      if constexpr (kTwoPhases) this->template pack<BlockB>(s, w, d);
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
      const Range part = split(together(s) || unpacked() ? 0 : rows, s.team, s.teams);
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
    if (unpacked()) return single_step<Blk>(s, w, at, j0, n, row, x, a, lda, now, next);
    const int64_t xp = x_pitch();
    panels_of(s.vectors, Blk::units, [&](int64_t v, int u) {
      const int nv = Blk::gates * u;
      const S* gx = w.panels.template at<Blk>(w.gx, chunk_rows, v) + row * nv * L;
      const Columns<S> b_x = w.panels.template w_ih<Blk>(v, u), b_h = w.panels.template w_hh<Blk>(v, u);
      for_tiles(n, tile_rows(nv), [&](int64_t r, int m) {
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
        if (together(s))
          multiply(Tile<P>{m, nv, x + (row + j) * xp, xp, P::per_word, b_x.b, b_x.pitch, x_words(),
                           w.panels.template bias_x<Blk>(v), 0, sums, nv * L, a + j * lda, lda, b_h.b, b_h.pitch,
                           h_words()});
        else
          multiply(
              Tile<P>{m, nv, a + j * lda, lda, P::per_word, b_h.b, b_h.pitch, h_words(), in, nv * L, sums, nv * L});
        for (int i = 0; i < m; ++i) {
          const Out& o = w.outs[s.slice * p.B + j + i];
          for (int k = 0; k < u; ++k)
            cell<Blk>(w, o, j + i, (v + k) * L, sums + (i * nv + k) * L, u * L, gx + ((j + i) * nv + 2) * L, now, next);
        }
      });
    });
  }

  // The same where T = 1: both products at once, on weights as they lie in memory.
  template <class Blk>
  void single_step(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, int64_t row, const Value* x,
                   const Value* a, int64_t lda, const State& now, const State& next) {
    if constexpr (P::per_word == 1) {  // pairs are for longer scans
      for_panels(s.vectors.begin, s.vectors.end, Blk::units, [&](int64_t v, int u) {
        const int nv = Blk::gates * u;
        LaneSums<S> product{{{x + (row + j0) * x_pitch(), x_pitch(), p.w_ih[at.d], p.I, p.I},
                             {a + j0 * lda, lda, p.w_hh[at.d], p.R, p.R}},
                            2,
                            p.dtype,
                            nv};
        for (int c = 0; c < nv; ++c) {
          const int64_t unit = (v + c % u) * L;
          product.row[c] = (Blk::gate0 + c / u) * p.H + unit;
          product.lanes[c] = min64(L, p.H - unit);
        }
        product.bias = w.panels.template bias_x<Blk>(v);
        alignas(64) S bias[kMaxPanel * L];
        if constexpr (C == Cell::gru) {  // W_hn h is summed apart from the input's part
          product.apart = 2;
          for (int g = 0; g < 3; ++g) store(bias + (g < 2 ? g : 3) * L, load(product.bias + g * L));
          store(bias + 2 * L, load(w.panels.bias_h(v)));
          product.bias = bias;
        }
        const int width = product.sums();
        for_tiles(n, kLaneRows, [&](int64_t r, int m) {
          alignas(64) S sums[kLaneRows * kMaxPanel * L];
          lane_sums(product, r, m, sums, width * L);
          for (int i = 0; i < m; ++i) {
            const int64_t j = j0 + r + i;
            for (int k = 0; k < u; ++k) {
              const S* const gates = sums + (i * width + k) * L;
              cell<Blk>(w, w.outs[s.slice * p.B + j], j, (v + k) * L, gates, u * L, gates + 3 * L, now, next);
            }
          }
        });
      });
    }
  }
  // The cell of one row over one unit vector; `sums` holds its gates, `pitch` apart. A GRU's gate n has its input's
  // part in n_x.
  template <class Blk>
  inline __attribute__((always_inline)) void cell(const Work& w, const Out& o, int64_t j, int64_t unit, const S* sums,
                                                  int64_t pitch, const S* n_x, const State& now,
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
      const GruStep<V> c = gru_fwd(load(sums), load(sums + pitch), load(n_x), hn, state_at(now, j, unit), act);
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

  // h = m W_hr^T (LSTM with projection, Sak et al. 2014).
  void project_state(const Share& s, const Work& w, const Moment& at, int64_t j0, int64_t n, const State& next) {
    if (n <= 0) return;
    const int64_t K = words<P>(p.H);
    alignas(64) static const S zero[kMaxPanel * L] = {};
    panels_of(split(state_vectors(), s.slice, s.slices), kMaxPanel, [&](int64_t v, int u) {
      const Columns<S> b = prepacked() ? grid_columns<S>(w.w_hr, K, state_vectors(), v, kMaxPanel)
                                       : Columns<S>{w.w_hr + v * L * K, u * L};
      LaneSums<S> product{};
      if constexpr (P::per_word == 1) {
        product = {{{w.m + j0 * cp(), cp(), p.w_hr[at.d], p.H, p.H}}, 1, p.dtype, u};
        for (int k = 0; k < u; ++k) {
          product.row[k] = (v + k) * L;
          product.lanes[k] = min64(L, p.R - product.row[k]);
        }
        product.bias = zero;
      }
      for_tiles(n, unpacked() ? kLaneRows : tile_rows(u), [&](int64_t r, int m) {
        alignas(64) S sums[kLaneRows * kMaxPanel * L];
        if (unpacked())
          lane_sums(product, r, m, sums, u * L);
        else
          multiply(Tile<P>{m, u, w.m + (j0 + r) * cp(), cp(), P::per_word, b.b, b.pitch, K, zero, 0, sums, u * L});
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
