// One (row, unit) of one step: what it reads, the cell, what it writes. Every tier's kernels end in these functions;
// they differ in where the products come from and where the state goes.
//
// Rows that a step does not reach (past their length, or in reverse before their end) keep their state; in the backward
// scan they hand on no gate gradients, so that what arrives at them is the gradient of their first state.
#pragma once
#include "cuda/value.cuh"

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace fusedseq {
namespace FSQ_ISA {

// Kernels are compiled for rnn_tanh; rnn_relu is the same kernel with another activation.
constexpr Cell family(Cell cell) { return cell == Cell::rnn_relu ? Cell::rnn_tanh : cell; }
constexpr bool is_gru(Cell cell) { return cell == Cell::gru || cell == Cell::gru_reset_before; }

template <Cell C>
constexpr int kGatesOf = gate_count(C);
// Gates of the first product of a forward step; a GRU that resets before the product has its candidate in a second.
template <Cell C>
constexpr int kFirst = C == Cell::gru_reset_before ? 2 : gate_count(C);
// Gate gradients that meet W_hh in the backward scan; a GRU that resets before the product adds W_hn apart.
template <Cell C>
constexpr int kFed = kFirst<C>;

// A time step: which, and what its rows are counted from, that of packed rows having been read from `offsets`.
struct Moment {
  int64_t t, first;
};
FSQ_DEVICE Moment moment(const CudaScanParams& p, int64_t t) { return {t, p.offsets && t >= 0 ? p.offsets[t] : t}; }

struct Spot {
  int64_t d, b, u;
  Moment when;
};

FSQ_DEVICE int64_t row_at(const CudaScanParams& p, const Rows& r, Moment when, int64_t b) {
  return when.first * (p.offsets ? r.sb : r.st) + b * r.sb;
}
FSQ_DEVICE int64_t row_at(const CudaScanParams& p, const Rows& r, const Spot& s) { return row_at(p, r, s.when, s.b); }
FSQ_DEVICE int64_t length_of(const CudaScanParams& p, int64_t b) { return p.lengths ? p.lengths[b] : p.T; }
// The time of step i of `steps`.
FSQ_DEVICE int64_t time_of(int64_t d, int64_t i, int64_t steps) { return d == 1 ? steps - 1 - i : i; }
FSQ_DEVICE int64_t state_at(const CudaScanParams& p, const Spot& s, int64_t width) {
  return (s.d * p.B + s.b) * width + s.u;
}
template <class E>
FSQ_DEVICE Compute<E> read(const void* data, int64_t i) {
  return widen(static_cast<const E*>(data)[i]);
}
template <class E>
FSQ_DEVICE void write(void* data, int64_t i, Compute<E> x) {
  static_cast<E*>(data)[i] = narrow<E>(x);
}
template <class E>
FSQ_DEVICE Compute<E> initial(const CudaScanParams& p, const void* state, const Spot& s, int64_t width) {
  return state ? read<E>(state, state_at(p, s, width)) : Compute<E>(0);
}

// What a unit adds to its gates at every step; `n`: to the inner product of a GRU that resets after it.
template <Cell C, class E>
struct Bias {
  typedef Compute<E> S;
  S gate[kGatesOf<C>], n;

  FSQ_DEVICE void load(const CudaScanParams& p, int64_t d, int64_t u) {
    n = S(0);
    FSQ_UNROLL
    for (int g = 0; g < kGatesOf<C>; ++g) {
      gate[g] = S(0);
      if (!p.b_ih[d]) continue;
      const S inner = read<E>(p.b_hh[d], g * p.H + u);
      const bool apart = C == Cell::gru && g == 2;
      gate[g] = read<E>(p.b_ih[d], g * p.H + u);
      if (apart)
        n = inner;
      else
        gate[g] += inner;
    }
  }
};

// `load` only reads, and nothing is done with what it has read: a warp waits where a value is first used. So a step's
// values can be on their way while the step before is computed; what it leaves behind is written after its state has
// gone to the other CTAs.
template <Cell C, class E>
struct Forward {
  typedef Compute<E> S;
  static constexpr int kGates = kGatesOf<C>;
  static constexpr int kKept = saved_values(C);

  S gates[kGates];  // W_ih x; of a GRU that resets before the product, activated as soon as they are known
  S kept[kKept ? kKept : 1], h;
  unsigned char reset;
  bool live;

  FSQ_DEVICE void load(const CudaScanParams& p, const Spot& s, int length) {
    live = s.when.t < length;
    reset = 0;
    if (!live) return;
    const S* const x = static_cast<const S*>(p.gates.data) + row_at(p, p.gates, s) + s.d * kGates * p.H + s.u;
    FSQ_UNROLL
    for (int g = 0; g < kGates; ++g) gates[g] = x[g * p.H];
    if (p.resets.data) reset = static_cast<const unsigned char*>(p.resets.data)[row_at(p, p.resets, s)];
  }

  // The state before the step as the cell sees it.
  FSQ_DEVICE S before(S state) const { return reset ? S(0) : state; }

  // r h of a GRU that resets before the product; sums: the products with W_hr and W_hz.
  FSQ_DEVICE S gate(const Bias<C, E>& bias, const S* sums, S state) {
    const Activations act;
    gates[0] = act.gate(gates[0] + bias.gate[0] + before(sums[0]));
    gates[1] = act.gate(gates[1] + bias.gate[1] + before(sums[1]));
    return gates[0] * before(state);
  }

  // The new h of a live row. sums: the products with W_hh, of a GRU that resets before the product that of W_hn with
  // r h alone. state: c of an LSTM, h of all others; replaced by the new one.
  FSQ_DEVICE S finish(const CudaScanParams& p, const Bias<C, E>& bias, const S* sums, S& state) {
    const Activations act;
    if constexpr (C == Cell::lstm) {
      S x[4];
      FSQ_UNROLL
      for (int g = 0; g < 4; ++g) x[g] = gates[g] + bias.gate[g] + before(sums[g]);
      const LstmStep<S> step = lstm_fwd(x[0], x[1], x[2], x[3], before(state), act);
      kept[0] = step.i;
      kept[1] = step.f;
      kept[2] = step.g;
      kept[3] = step.o;
      kept[4] = state = step.c;
      h = step.h;
    } else if constexpr (C == Cell::gru) {
      const S hn = before(sums[2]) + bias.n;
      const GruStep<S> step =
          gru_fwd(gates[0] + bias.gate[0] + before(sums[0]), gates[1] + bias.gate[1] + before(sums[1]),
                  gates[2] + bias.gate[2], hn, before(state), act);
      kept[0] = step.r;
      kept[1] = step.z;
      kept[2] = step.n;
      kept[3] = hn;
      h = state = step.h;
    } else if constexpr (C == Cell::gru_reset_before) {
      const S n = act.state(gates[2] + bias.gate[2] + before(sums[0]));
      kept[0] = gates[0];
      kept[1] = gates[1];
      kept[2] = n;
      h = state = gru_blend(gates[1], n, before(state), act);
    } else {
      const S a = gates[0] + bias.gate[0] + before(sums[0]);
      h = state = p.cell == Cell::rnn_relu ? rnn_fwd<true>(a, act) : rnn_fwd<false>(a, act);
    }
    return h;
  }

  // What backward reads, and an LSTM's cell state for the caller. Of a live row.
  FSQ_DEVICE void save(const CudaScanParams& p, const Spot& s) const {
    if constexpr (kKept > 0) {
      if (p.reserve.data) {
        S* const reserve = static_cast<S*>(p.reserve.data) + row_at(p, p.reserve, s) + s.d * p.reserve_sd + s.u;
        if (!p.recompute) {
          FSQ_UNROLL
          for (int k = 0; k < kKept; ++k) reserve[k * p.H] = kept[k];
        } else if (C == Cell::lstm) {
          reserve[0] = kept[kKept - 1];
        }
      }
    }
    if constexpr (C == Cell::lstm)
      if (p.c_all.data) write<E>(p.c_all.data, row_at(p, p.c_all, s) + s.d * p.H + s.u, kept[4]);
  }

  FSQ_DEVICE static void emit(const CudaScanParams& p, const Spot& s, S h) {
    write<E>(p.y.data, row_at(p, p.y, s) + s.d * p.R + s.u, h);
  }

  // After the last step, by the thread that did all of a row's: its last state, which is its last output.
  FSQ_DEVICE static void end(const CudaScanParams& p, const Spot& s, int64_t at) {
    const int64_t steps = length_of(p, s.b), last = s.d == 1 ? 0 : steps - 1;
    E* const h_n = static_cast<E*>(p.h_n);
    if (steps > 0)
      h_n[at] = static_cast<const E*>(p.y.data)[row_at(p, p.y, moment(p, last), s.b) + s.d * p.R + s.u];
    else
      write<E>(h_n, at, initial<E>(p, p.h0, s, p.R));
  }
};

template <Cell C, class E>
struct Backward {
  typedef Compute<E> S;
  static constexpr int kGates = kGatesOf<C>;
  static constexpr bool kPlain = C == Cell::rnn_tanh;
  static constexpr int kSaved = kPlain ? 1 : saved_values(C);
  typedef std::conditional_t<kPlain, E, S> Saved;
  typedef std::conditional_t<C == Cell::lstm, S, E> Previous;

  Saved saved[kSaved];  // of an RNN its output
  Previous previous;    // c of an LSTM, h of a GRU; means nothing after a reset
  E dc, dy;             // from users of the cell state and of y
  S grad[kGates], dhn;  // what `save` writes
  unsigned char reset;
  bool live;

  FSQ_DEVICE void load(const CudaScanGradParams& p, const Spot& s, int length) {
    const CudaScanParams& f = p.fwd;
    live = s.when.t >= 0 && s.when.t < length;
    reset = 0;
    dc = dy = narrow<E>(S(0));
    if (!live) return;
    if (f.resets.data) reset = static_cast<const unsigned char*>(f.resets.data)[row_at(f, f.resets, s)];
    const E* const y = static_cast<const E*>(f.y.data) + s.d * f.R + s.u;
    if constexpr (kPlain) {
      saved[0] = y[row_at(f, f.y, s)];
    } else {
      const bool first = s.d == 1 ? s.when.t == length - 1 : s.when.t == 0;
      const Moment before = moment(f, first ? s.when.t : s.d == 1 ? s.when.t + 1 : s.when.t - 1);
      const S* const reserve = static_cast<const S*>(f.reserve.data) + s.d * f.reserve_sd + s.u;
      const int64_t now = row_at(f, f.reserve, s);
      FSQ_UNROLL
      for (int k = 0; k < kSaved; ++k) saved[k] = reserve[now + k * f.H];
      if constexpr (C == Cell::lstm)
        previous = first ? initial<E>(f, f.c0, s, f.H) : reserve[row_at(f, f.reserve, before, s.b) + 4 * f.H];
      else if (first)
        previous = f.h0 ? static_cast<const E*>(f.h0)[state_at(f, s, f.H)] : narrow<E>(S(0));
      else
        previous = y[row_at(f, f.y, before, s.b)];
    }
    if (p.dc_all.data) dc = static_cast<const E*>(p.dc_all.data)[row_at(f, p.dc_all, s) + s.d * f.H + s.u];
    if (p.dy.data) dy = static_cast<const E*>(p.dy.data)[row_at(f, p.dy, s) + s.d * f.R + s.u];
  }

  FSQ_DEVICE S before() const { return reset ? S(0) : widen(previous); }

  // dh: gradient of the h of a live row. fed: gate gradients as they meet W_hh in the step before (of a GRU that resets
  // before the product: fed[1] only, and dn in fed[0], which meets W_hn in this step). dc_state: of the cell state,
  // from the step after and to the step before. carry: what reaches the h before past the products.
  FSQ_DEVICE void run(const CudaScanGradParams& p, S dh, S* fed, S& dc_state, S& carry) {
    const Activations act;
    if constexpr (C == Cell::lstm) {
      const LstmGrad<S> g =
          lstm_bwd(saved[0], saved[1], saved[2], saved[3], saved[4], before(), dh, dc_state + widen(dc), act);
      fed[0] = grad[0] = g.di;
      fed[1] = grad[1] = g.df;
      fed[2] = grad[2] = g.dg;
      fed[3] = grad[3] = g.dg_o;
      dc_state = reset ? S(0) : g.dc_prev;
      carry = S(0);
    } else if constexpr (C == Cell::gru) {
      const GruGrad<S> g = gru_bwd(saved[0], saved[1], saved[2], saved[3], before(), dh, act);
      grad[2] = g.dn;
      fed[0] = grad[0] = g.dr;
      fed[1] = grad[1] = g.dz;
      fed[2] = dhn = g.dhn;
      carry = reset ? S(0) : g.dh_prev;
    } else if constexpr (C == Cell::gru_reset_before) {
      const GruGrad<S> g = gru_before_bwd(saved[1], saved[2], before(), dh, act);
      fed[0] = grad[2] = g.dn;
      fed[1] = grad[1] = g.dz;
      carry = reset ? S(0) : g.dh_prev;
    } else {
      const S y = widen(saved[0]);
      fed[0] = grad[0] = p.fwd.cell == Cell::rnn_relu ? rnn_bwd<true>(y, dh, act) : rnn_bwd<false>(y, dh, act);
      carry = S(0);
    }
    FSQ_UNROLL
    for (int g = 0; g < kFed<C>; ++g)
      if (reset && !(C == Cell::gru_reset_before && g == 0)) fed[g] = S(0);  // that one is known after its product
  }

  // The second half of a GRU that resets before the product: dr, from the product of dn with W_hn.
  FSQ_DEVICE S through_reset(S drh, S& carry) {
    const Activations act;
    S dh_prev = S(0);
    grad[0] = gru_before_bwd_reset(saved[0], before(), drh, dh_prev, act);
    if (reset) return S(0);
    carry += dh_prev;
    return grad[0];
  }

  // The gate gradients of a live row, from gate `first` to before gate `last`.
  FSQ_DEVICE void save(const CudaScanGradParams& p, const Spot& s, int first = 0, int last = kGates) const {
    const CudaScanParams& f = p.fwd;
    E* const dgates = static_cast<E*>(p.dgates.data) + row_at(f, p.dgates, s) + s.d * kGates * f.H + s.u;
    FSQ_UNROLL
    for (int g = 0; g < kGates; ++g)
      if (g >= first && g < last) dgates[g * f.H] = narrow<E>(grad[g]);
    if (C == Cell::gru) write<E>(p.dhn.data, row_at(f, p.dhn, s) + s.d * f.H + s.u, dhn);
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
