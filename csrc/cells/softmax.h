// 2^x, which softmax is made of, and the logarithm of its sum.
//
// 2^x = 2^n 2^r with n = round(x) and r = x - n, exact; 2^r = 1 + r q(r). q: minimax fit of degree 5 for float, Taylor
// of degree 12 for double. Within 1.5 ulp, 0 below the smallest subnormal, NaN passes through. x must not be above the
// largest exponent.
#pragma once
#include "cells/value.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
struct Exp2Const;
template <>
struct Exp2Const<float> {
  static constexpr int kDegree = 5;
  static constexpr float q[kDegree + 1] = {0x1.62e43p-1f,  0x1.ebfbep-3f,   0x1.c6af6cp-5f,
                                           0x1.3b2a52p-7f, 0x1.5f08b8p-10f, 0x1.4413a4p-13f};
  static constexpr float floor = -151.0f;
  static constexpr float log2e = 0x1.715476p+0f, ln2 = 0x1.62e43p-1f;
};
template <>
struct Exp2Const<double> {
  static constexpr int kDegree = 12;
  static constexpr double q[kDegree + 1] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58ep-3,  0x1.c6b08d704a0bfp-5,  0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6730p-10,
      0x1.430912f86c786p-13, 0x1.ffcbfc588b0c5p-17, 0x1.62c0223a5c822p-20, 0x1.b5253d395e7c1p-24, 0x1.e4cf5158b8ec7p-28,
      0x1.e8cac7351bb22p-32, 0x1.c3bd650fc2983p-36, 0x1.816193166d0f7p-40};
  static constexpr double floor = -1076.0;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2 = 0x1.62e42fefa39efp-1;
};

template <class V>
FSQ_INLINE V exp2(V x) {
  typedef typename Num<V>::Scalar S;
  typedef Exp2Const<S> K;
  x = at_least(K::floor, x);
  const V n = round_even(x), r = x - n;
  V q = Num<V>::c(K::q[K::kDegree]);
#pragma GCC unroll 12
  for (int i = K::kDegree - 1; i >= 0; --i) q = fma(q, r, Num<V>::c(K::q[i]));
  return scale2(fma(q, r, Num<V>::c(S(1))), n);
}

// e^x of x <= 0: the weight of a logit that lies x from the largest.
template <class V>
FSQ_INLINE V weight_of(V x) {
  typedef Num<V> N;
  return exp2(x * N::c(Exp2Const<typename N::Scalar>::log2e));
}

// ln x of x = 2^e m, m within [1/sqrt 2, sqrt 2], which the caller takes apart: e ln 2 + 2 artanh f, f = (m - 1) / (m +
// 1), its series up to f^13. Absolute error below 1e-12 + rounding: for values that end in float.
template <class V>
FSQ_INLINE V log_of_parts(V e, V m) {
  typedef Num<V> N;
  const V f = (m - N::c(1)) / (m + N::c(1)), f2 = f * f;
  V q = N::c(1.0 / 13);
#pragma GCC unroll 6
  for (int i = 11; i >= 1; i -= 2) q = fma(q, f2, N::c(1.0 / i));
  return fma(e, N::c(Exp2Const<double>::ln2), N::c(2) * f * q);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
