// GRU cell (Cho et al. 2014), one step, pointwise part, in both placements of the reset gate.
//
//   reset after the product (cuDNN, torch):  n = tanh(xn + r (W_hn h + b_hn))
//   reset before the product (Cho, Keras 1): n = tanh(xn + W_hn (r h) + b_hn)
//   h = (1 - z) n + z h_prev
//
// Saved for backward, per unit: reset after: r, z, n (activated) and hn = W_hn h + b_hn (4 values);
// reset before: r, z, n (3 values; r h is recomputed).
#pragma once
#include "cells/math.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class V>
struct GruStep {
  V r, z, n, h;
};

template <class V>
struct GruGrad {
  V dr, dz, dn, dhn, dh_prev;  // pre-activations; dhn: of W_hn h + b_hn; dh_prev: only what bypasses the products
};

template <class V, class Act>
FSQ_INLINE V gru_blend(V z, V n, V h_prev, Act) {
  return fma(z, h_prev - n, n);
}

template <class V, class Act>
FSQ_INLINE GruStep<V> gru_fwd(V r, V z, V xn, V hn, V h_prev, Act act) {
  GruStep<V> s;
  s.r = act.gate(r);
  s.z = act.gate(z);
  s.n = act.state(fma(s.r, hn, xn));
  s.h = gru_blend(s.z, s.n, h_prev, act);
  return s;
}

template <class V, class Act>
FSQ_INLINE GruGrad<V> gru_bwd(V r, V z, V n, V hn, V h_prev, V dh, Act act) {
  GruGrad<V> g;
  g.dn = (dh - dh * z) * act.d_state(n);
  g.dz = dh * (h_prev - n) * act.d_gate(z);
  g.dr = g.dn * hn * act.d_gate(r);
  g.dhn = g.dn * r;
  g.dh_prev = dh * z;
  return g;
}

// Reset before the product: the part that needs no product of this step; dr follows in gru_before_bwd_reset.
template <class V, class Act>
FSQ_INLINE GruGrad<V> gru_before_bwd(V z, V n, V h_prev, V dh, Act act) {
  GruGrad<V> g;
  g.dn = (dh - dh * z) * act.d_state(n);
  g.dz = dh * (h_prev - n) * act.d_gate(z);
  g.dh_prev = dh * z;
  return g;
}

// drh: gradient of r h_prev (= dn W_hn). Adds to dh_prev and returns dr.
template <class V, class Act>
FSQ_INLINE V gru_before_bwd_reset(V r, V h_prev, V drh, V& dh_prev, Act act) {
  dh_prev = fma(drh, r, dh_prev);
  return drh * h_prev * act.d_gate(r);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
