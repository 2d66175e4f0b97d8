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

struct Spot {
  int64_t d, t, b, u;
};

FSQ_DEVICE int64_t row_at(const CudaScanParams& p, const Rows& r, int64_t t, int64_t b) {
  return p.offsets ? (p.offsets[t] + b) * r.sb : t * r.st + b * r.sb;
}
FSQ_DEVICE int64_t length_of(const CudaScanParams& p, int64_t b) { return p.lengths ? p.lengths[b] : p.T; }
// The time of step i of `steps`.
FSQ_DEVICE int64_t time_of(int64_t d, int64_t i, int64_t steps) { return d == 1 ? steps - 1 - i : i; }
FSQ_DEVICE int64_t state_at(const CudaScanParams& p, const Spot& s, int64_t width) {
  return (s.d * p.B + s.b) * width + s.u;
}
FSQ_DEVICE bool reset_at(const CudaScanParams& p, const Spot& s) {
  return p.resets.data && static_cast<const unsigned char*>(p.resets.data)[row_at(p, p.resets, s.t, s.b)];
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

template <Cell C, class E>
struct Forward {
  typedef Compute<E> S;
  static constexpr int kGates = kGatesOf<C>;

  S gates[kGates];  // W_ih x + biases; of a GRU that resets before the product, activated as soon as they are known
  S bias_n;
  bool live, reset;

  // What needs no product, so that it is on its way while the product is formed.
  FSQ_DEVICE void load(const CudaScanParams& p, const Spot& s) {
    live = s.t < length_of(p, s.b);
    reset = false;
    bias_n = S(0);
    if (!live) return;
    const S* const x = static_cast<const S*>(p.gates.data) + row_at(p, p.gates, s.t, s.b) + s.d * kGates * p.H + s.u;
    const S* const bias = static_cast<const S*>(p.bias) + s.d * kGates * p.H + s.u;
    FSQ_UNROLL
    for (int g = 0; g < kGates; ++g) gates[g] = x[g * p.H] + (p.bias ? bias[g * p.H] : S(0));
    if (C == Cell::gru && p.bias_n) bias_n = static_cast<const S*>(p.bias_n)[s.d * p.H + s.u];
    reset = reset_at(p, s);
  }

  // The state before the step as the cell sees it.
  FSQ_DEVICE S before(S state) const { return reset ? S(0) : state; }

  // r h of a GRU that resets before the product; sums: the products with W_hr and W_hz.
  FSQ_DEVICE S gate(const S* sums, S h) {
    const Activations act;
    gates[0] = act.gate(gates[0] + before(sums[0]));
    gates[1] = act.gate(gates[1] + before(sums[1]));
    return gates[0] * before(h);
  }

  // The new h of a live row. sums: the products with W_hh, of a GRU that resets before the product that of W_hn with
  // r h alone. state: c of an LSTM, h of all others; replaced by the new one.
  FSQ_DEVICE S finish(const CudaScanParams& p, const Spot& s, const S* sums, S& state) const {
    const Activations act;
    const int64_t kept = row_at(p, p.reserve, s.t, s.b) + s.d * p.reserve_sd + s.u;
    S* const reserve = p.reserve.data ? static_cast<S*>(p.reserve.data) + kept : nullptr;
    if constexpr (C == Cell::lstm) {
      const LstmStep<S> step = lstm_fwd(gates[0] + before(sums[0]), gates[1] + before(sums[1]),
                                        gates[2] + before(sums[2]), gates[3] + before(sums[3]), before(state), act);
      state = step.c;
      if (reserve && p.recompute) reserve[0] = step.c;
      if (reserve && !p.recompute) {
        reserve[0] = step.i;
        reserve[p.H] = step.f;
        reserve[2 * p.H] = step.g;
        reserve[3 * p.H] = step.o;
        reserve[4 * p.H] = step.c;
      }
      if (p.c_all.data) write<E>(p.c_all.data, row_at(p, p.c_all, s.t, s.b) + s.d * p.H + s.u, step.c);
      return step.h;
    } else if constexpr (C == Cell::gru) {
      const S hn = before(sums[2]) + bias_n;
      const GruStep<S> step =
          gru_fwd(gates[0] + before(sums[0]), gates[1] + before(sums[1]), gates[2], hn, before(state), act);
      if (reserve && !p.recompute) {
        reserve[0] = step.r;
        reserve[p.H] = step.z;
        reserve[2 * p.H] = step.n;
        reserve[3 * p.H] = hn;
      }
      return state = step.h;
    } else if constexpr (C == Cell::gru_reset_before) {
      const S n = act.state(gates[2] + before(sums[0]));
      if (reserve && !p.recompute) {
        reserve[0] = gates[0];
        reserve[p.H] = gates[1];
        reserve[2 * p.H] = n;
      }
      return state = gru_blend(gates[1], n, before(state), act);
    } else {
      const S a = gates[0] + before(sums[0]);
      return state = p.cell == Cell::rnn_relu ? rnn_fwd<true>(a, act) : rnn_fwd<false>(a, act);
    }
  }

  FSQ_DEVICE static void emit(const CudaScanParams& p, const Spot& s, S h) {
    write<E>(p.y.data, row_at(p, p.y, s.t, s.b) + s.d * p.R + s.u, h);
  }

  // After the last step, by the thread that did all of a row's: its last state, which is its last output.
  FSQ_DEVICE static void end(const CudaScanParams& p, const Spot& s, int64_t at) {
    const int64_t steps = length_of(p, s.b), last = s.d == 1 ? 0 : steps - 1;
    E* const h_n = static_cast<E*>(p.h_n);
    if (steps > 0)
      h_n[at] = static_cast<const E*>(p.y.data)[row_at(p, p.y, last, s.b) + s.d * p.R + s.u];
    else
      write<E>(h_n, at, initial<E>(p, p.h0, s, p.R));
  }
};

template <Cell C, class E>
struct Backward {
  typedef Compute<E> S;
  static constexpr int kGates = kGatesOf<C>;
  static constexpr int kSaved = C == Cell::rnn_tanh ? 1 : saved_values(C);

  S saved[kSaved];  // of an RNN its output
  S previous;       // c of an LSTM, h of a GRU; 0 after a reset
  S dc;             // from a user of the cell state
  bool live, reset;

  FSQ_DEVICE void load(const CudaScanGradParams& p, const Spot& s) {
    const CudaScanParams& f = p.fwd;
    const int64_t length = length_of(f, s.b);
    live = s.t >= 0 && s.t < length;
    reset = false;
    previous = dc = S(0);
    if (!live) return;
    reset = reset_at(f, s);
    const bool first = s.d == 1 ? s.t == length - 1 : s.t == 0;
    const int64_t before = s.d == 1 ? s.t + 1 : s.t - 1;
    if constexpr (C == Cell::rnn_tanh) {
      saved[0] = read<E>(f.y.data, row_at(f, f.y, s.t, s.b) + s.d * f.R + s.u);
    } else {
      const S* const reserve = static_cast<const S*>(f.reserve.data) + s.d * f.reserve_sd + s.u;
      const int64_t now = row_at(f, f.reserve, s.t, s.b);
      FSQ_UNROLL
      for (int k = 0; k < kSaved; ++k) saved[k] = reserve[now + k * f.H];
      if (!reset && first)
        previous = C == Cell::lstm ? initial<E>(f, f.c0, s, f.H) : initial<E>(f, f.h0, s, f.H);
      else if (!reset && C == Cell::lstm)
        previous = reserve[row_at(f, f.reserve, before, s.b) + 4 * f.H];
      else if (!reset)
        previous = read<E>(f.y.data, row_at(f, f.y, before, s.b) + s.d * f.R + s.u);
    }
    if (p.dc_all.data) dc = read<E>(p.dc_all.data, row_at(f, p.dc_all, s.t, s.b) + s.d * f.H + s.u);
  }

  // The gradient that a user of y hands in.
  FSQ_DEVICE static S upstream(const CudaScanGradParams& p, const Spot& s) {
    return p.dy.data ? read<E>(p.dy.data, row_at(p.fwd, p.dy, s.t, s.b) + s.d * p.fwd.R + s.u) : S(0);
  }

  FSQ_DEVICE static void put(const CudaScanGradParams& p, const Spot& s, int gate, S x) {
    const CudaScanParams& f = p.fwd;
    write<E>(p.dgates.data, row_at(f, p.dgates, s.t, s.b) + (s.d * kGates + gate) * f.H + s.u, x);
  }

  // dh: gradient of the h of a live row. fed: gate gradients as they meet W_hh in the step before (of a GRU that resets
  // before the product: fed[1] only, and dn in fed[0], which meets W_hn in this step). dc: of the cell state, from the
  // step after and to the step before. carry: what reaches the h before past the products.
  FSQ_DEVICE void run(const CudaScanGradParams& p, const Spot& s, S dh, S* fed, S& dc_state, S& carry) const {
    const Activations act;
    const CudaScanParams& f = p.fwd;
    if constexpr (C == Cell::lstm) {
      const LstmGrad<S> g =
          lstm_bwd(saved[0], saved[1], saved[2], saved[3], saved[4], previous, dh, dc_state + dc, act);
      fed[0] = g.di;
      fed[1] = g.df;
      fed[2] = g.dg;
      fed[3] = g.dg_o;
      dc_state = reset ? S(0) : g.dc_prev;
      carry = S(0);
    } else if constexpr (C == Cell::gru) {
      const GruGrad<S> g = gru_bwd(saved[0], saved[1], saved[2], saved[3], previous, dh, act);
      put(p, s, 2, g.dn);
      write<E>(p.dhn.data, row_at(f, p.dhn, s.t, s.b) + s.d * f.H + s.u, g.dhn);
      fed[0] = g.dr;
      fed[1] = g.dz;
      fed[2] = g.dhn;
      carry = reset ? S(0) : g.dh_prev;
    } else if constexpr (C == Cell::gru_reset_before) {
      const GruGrad<S> g = gru_before_bwd(saved[1], saved[2], previous, dh, act);
      put(p, s, 2, g.dn);
      fed[0] = g.dn;
      fed[1] = g.dz;
      carry = reset ? S(0) : g.dh_prev;
    } else {
      fed[0] = f.cell == Cell::rnn_relu ? rnn_bwd<true>(saved[0], dh, act) : rnn_bwd<false>(saved[0], dh, act);
      carry = S(0);
    }
    FSQ_UNROLL
    for (int g = 0; g < kFed<C>; ++g) {
      if (C == Cell::gru_reset_before && g == 0) continue;  // known only after the second product
      if (C != Cell::gru || g < 2) put(p, s, g, fed[g]);
      if (reset) fed[g] = S(0);
    }
  }

  // The second half of a GRU that resets before the product: dr, from the product of dn with W_hn.
  FSQ_DEVICE S through_reset(const CudaScanGradParams& p, const Spot& s, S drh, S& carry) const {
    const Activations act;
    S dh_prev = S(0);
    const S dr = gru_before_bwd_reset(saved[0], previous, drh, dh_prev, act);
    put(p, s, 0, dr);
    if (reset) return S(0);
    carry += dh_prev;
    return dr;
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
