// LSTM cell (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000), one step, pointwise part.
//
//   c = s(f) c_prev + s(i) tanh(g),   h = s(o) tanh(c)
//
// Saved for backward, per unit, activated: i, f, g, o, then the new cell state c (5 values). tanh(c) is recomputed:
// one more tanh costs less than a sixth value through memory.
#pragma once
#include "cells/math.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class V>
struct LstmStep {
  V i, f, g, o, c, h;
};

template <class V>
struct LstmGrad {
  V di, df, dg, dg_o, dc_prev;  // gradients of the four pre-activations and of the previous cell state
};

template <class V, class Act>
FSQ_INLINE LstmStep<V> lstm_fwd(V i, V f, V g, V o, V c_prev, Act act) {
  LstmStep<V> s;
  s.i = act.gate(i);
  s.f = act.gate(f);
  s.g = act.state(g);
  s.o = act.gate(o);
  s.c = fma(s.f, c_prev, s.i * s.g);
  s.h = s.o * act.state(s.c);
  return s;
}

// dh: gradient of h; dc: gradient that reaches c from later steps (and from a user of the cell state).
template <class V, class Act>
FSQ_INLINE LstmGrad<V> lstm_bwd(V i, V f, V g, V o, V c, V c_prev, V dh, V dc, Act act) {
  const V tc = act.state(c);
  const V d = fma(dh * o, act.d_state(tc), dc);
  LstmGrad<V> r;
  r.di = d * g * act.d_gate(i);
  r.df = d * c_prev * act.d_gate(f);
  r.dg = d * i * act.d_state(g);
  r.dg_o = dh * tc * act.d_gate(o);
  r.dc_prev = d * f;
  return r;
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
