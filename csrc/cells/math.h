// Nonlinearities, generic over the value type: `float` and `double` on a device, SIMD vectors on a CPU.
//
// A value type V supplies, declared before this file is read (vector types have no namespace to be looked up in):
//   fma(a, b, c); round_even(a); pow2(n) = 2^n; scale2(a, n) = a 2^n with gradual underflow; Num<V>
//   reciprocal(a): 1 / a to 14 bits or more, as a residual correction follows
//   quotient(a, d, l) = a / (d + l) for l far below d
//   negative_abs(a) = -|a|; at_least(low, a) = max(low, a), NaN if a is; with_sign(a, b) = a >= 0 with the sign of b
// Everything else is written once here. Both functions are
// within 2 ulp in float32 over the whole range (tests/test_math.py measures every float), exact at +-inf, and NaN
// passes through.
//
// exp(x) = 2^n e^r with r = x - n ln 2 in two pieces (Cody & Waite); e^r - 1 = r + r^2 q(r), so that no digit is
// lost near 0. q: minimax fit of degree 4 for float (0.13 ulp), Taylor of degree 11 for double.
#pragma once

#include "cells/value.h"

namespace fusedseq {
namespace FSQ_ISA {

// The coefficients of q stand in a function: device code may not index a constant of a class.
template <class S>
struct ExpConst;

template <>
struct ExpConst<float> {
  static constexpr int kDegree = 4;
  FSQ_INLINE float q(int i) {
    constexpr float all[] = {0x1.0p-1f, 0x1.5554aep-3f, 0x1.555484p-5f, 0x1.12296ep-7f, 0x1.6d9b08p-10f};
    return all[i];
  }
  static constexpr float log2e = 0x1.715476p+0f, ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float exp_floor = -104.0f;  // below: e^x rounds to 0
  static constexpr float tanh_ceil = 20.0f;    // tanh(x) rounds to 1 for 2 x above
};

template <>
struct ExpConst<double> {
  static constexpr int kDegree = 11;
  FSQ_INLINE double q(int i) {
    constexpr double all[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,
                              1.0 / 720,       1.0 / 5040,       1.0 / 40320,       1.0 / 362880,
                              1.0 / 3628800.0, 1.0 / 39916800.0, 1.0 / 479001600.0, 1.0 / 6227020800.0};
    return all[i];
  }
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_hi = 0x1.62e42fee00000p-1, ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double exp_floor = -746.0;
  static constexpr double tanh_ceil = 42.0;
};

// e^r - 1 and n, such that e^x = 2^n e^r, for |x| in the range where n fits.
template <class V>
FSQ_INLINE V expm1_reduced(V x, V& n) {
  typedef typename Num<V>::Scalar S;
  typedef ExpConst<S> K;
  n = round_even(x * Num<V>::c(K::log2e));
  const V r = fma(n, Num<V>::c(-K::ln2_lo), fma(n, Num<V>::c(-K::ln2_hi), x));
  V q = Num<V>::c(K::q(K::kDegree));
  FSQ_UNROLL
  for (int i = K::kDegree - 1; i >= 0; --i) q = fma(q, r, Num<V>::c(K::q(i)));
  return fma(r * r, q, r);
}

// 1 / (1 + e^-x), through t = e^-|x| so that both tails keep their digits, subnormal ones too.
template <class V>
FSQ_INLINE V sigmoid(V x) {
  typedef typename Num<V>::Scalar S;
  const V zero = Num<V>::c(S(0)), one = Num<V>::c(S(1));
  V n;
  const V e = expm1_reduced(at_least(ExpConst<S>::exp_floor, negative_abs(x)), n);
  const V t = scale2(e + one, n);
  const V top = x < zero ? t : one;
  const V y = reciprocal(one + t);
  const V r = top * y;
  return fma(fma(-r, t, top - r), y, r);  // top - r (1 + t), with 1 + t unrounded
}

// tanh(x) = m / (m + 2) with m = e^2|x| - 1.
template <class V>
FSQ_INLINE V tanh(V x) {
  typedef typename Num<V>::Scalar S;
  const V zero = Num<V>::c(S(0)), two = Num<V>::c(S(2));
  V n;
  const V e = expm1_reduced(-at_least(-ExpConst<S>::tanh_ceil, two * negative_abs(x)), n);
  const V s = pow2(n);
  const V m = fma(s, e, s - Num<V>::c(S(1)));
  const V d = m + two;
  const V lost = m < two ? m - (d - two) : zero;  // by d in rounding, where it shows (r < 1/2)
  return with_sign(quotient(m, d, lost), x);
}

// The nonlinearities a cell is written in; tests pass linear ones.
struct Activations {
  template <class V>
  FSQ_INLINE V gate(V x) {
    return sigmoid(x);
  }
  template <class V>
  FSQ_INLINE V state(V x) {
    return FSQ_ISA::tanh(x);
  }
  template <class V>
  FSQ_INLINE V relu(V x) {
    const V zero = Num<V>::c(typename Num<V>::Scalar(0));
    return x < zero ? zero : x;
  }
  // Derivatives from the value of the function.
  template <class V>
  FSQ_INLINE V d_gate(V y) {
    return fma(-y, y, y);
  }
  template <class V>
  FSQ_INLINE V d_state(V y) {
    return fma(-y, y, Num<V>::c(typename Num<V>::Scalar(1)));
  }
  template <class V>
  FSQ_INLINE V d_relu(V y) {
    typedef typename Num<V>::Scalar S;
    return y <= Num<V>::c(S(0)) ? Num<V>::c(S(0)) : Num<V>::c(S(1));
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
