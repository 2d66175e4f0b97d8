// Activations of feed-forward networks, value and derivative, both from the pre-activation.
//
//   relu   max(x, 0)                       gelu       x F(x), F the normal distribution function (arXiv:1606.08415)
//   silu   x sigmoid(x)                    gelu_tanh  x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), its approximation
//   there
//
// F(-a) for a >= 0 is e^(-a^2/2) q p(q), q = 1 / (1 + a/4): p, smooth on (0, 1], is a Chebyshev fit in t = 2 q - 1 of
// degree 9 for float and 22 for double. Within 3 ulp of F(-a) as far as e^(-a^2/2) is, so tails keep their digits.
#pragma once
#include "cells/math.h"
#include "cells/softmax.h"
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
struct NormalConst;
template <>
struct NormalConst<float> {
  static constexpr int kDegree = 9;
  static constexpr float p[kDegree + 1] = {0x1.82b4bcp-3f,  0x1.373e38p-3f,  0x1.8c6d90p-4f,   0x1.7dffeep-5f,
                                           0x1.eed8f4p-7f,  0x1.ed2f4ep-10f, -0x1.cd803ep-11f, -0x1.9abfa6p-12f,
                                           0x1.8c5abcp-15f, 0x1.0750a6p-15f};
};
template <>
struct NormalConst<double> {
  static constexpr int kDegree = 22;
  static constexpr double p[kDegree + 1] = {
      0x1.82b4bb8c94dcep-3,  0x1.373e3a893c287p-3,   0x1.8c6dbf2cfc2fdp-4,   0x1.7dff2bff6889ap-5,
      0x1.eec4cc3e4560cp-7,  0x1.ee2761034c407p-10,  -0x1.c81719cabcedep-11, -0x1.ab825f7e9996dp-12,
      0x1.17a4a6b9505f7p-15, 0x1.e4a415fb8cca5p-15,  -0x1.0011cb7c88079p-21, -0x1.26cf8dea72ab1p-17,
      0x1.7fdd9eeeb883fp-23, 0x1.8d35cd874dc01p-20,  -0x1.4f9d808db1d2fp-23, -0x1.11c074ae9e33fp-22,
      0x1.1b207d62865e8p-24, 0x1.4b471811b0210p-25,  -0x1.480d99ae63529p-26, -0x1.f4eaa9c85bbb0p-29,
      0x1.de6d02a26289cp-29, -0x1.3fb7ce475a168p-36, -0x1.0959f1400a390p-32};
};

template <class V>
struct Normal {
  V cumulative, bell;  // F(x), e^(-x^2/2)
};
template <class V>
FSQ_INLINE Normal<V> normal(V x) {
  typedef typename Num<V>::Scalar S;
  typedef NormalConst<S> K;
  const V one = Num<V>::c(S(1)), a = -negative_abs(x);
  const V q = one / fma(a, Num<V>::c(S(0.25)), one), t = q + q - one;
  V p = Num<V>::c(K::p[K::kDegree]);
#pragma GCC unroll 22
  for (int i = K::kDegree - 1; i >= 0; --i) p = fma(p, t, Num<V>::c(K::p[i]));
  Normal<V> n;
  n.bell = FSQ_ISA::exp2(x * x * Num<V>::c(S(-0.5) * Exp2Const<S>::log2e));
  const V tail = n.bell * (q * p);
  n.cumulative = x < Num<V>::c(S(0)) ? tail : one - tail;
  return n;
}

// 2 sqrt(2/pi) (x + 0.044715 x^3) and its derivative.
template <class V>
struct TanhArgument {
  V u, du;
};
template <class V>
FSQ_INLINE TanhArgument<V> tanh_argument(V x) {
  typedef typename Num<V>::Scalar S;
  const V c = Num<V>::c(S(1.5957691216057308)), c3 = Num<V>::c(S(1.5957691216057308 * 0.044715)), xx = x * x;
  return {x * fma(xx, c3, c), fma(xx, c3 * Num<V>::c(S(3)), c)};
}

template <Activation A, class V>
FSQ_INLINE V activation_fwd(V x) {
  typedef typename Num<V>::Scalar S;
  if constexpr (A == Activation::relu) return x < Num<V>::c(S(0)) ? Num<V>::c(S(0)) : x;
  if constexpr (A == Activation::gelu) return x * normal(x).cumulative;
  if constexpr (A == Activation::gelu_tanh) return x * sigmoid(tanh_argument(x).u);
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  return x;
}

template <Activation A, class V>
FSQ_INLINE V activation_bwd(V x) {
  typedef typename Num<V>::Scalar S;
  const V one = Num<V>::c(S(1));
  if constexpr (A == Activation::relu) return x <= Num<V>::c(S(0)) ? Num<V>::c(S(0)) : one;
  if constexpr (A == Activation::gelu) {
    const Normal<V> n = normal(x);
    return fma(x * Num<V>::c(S(0.39894228040143268)), n.bell, n.cumulative);
  }
  if constexpr (A == Activation::gelu_tanh) {
    const TanhArgument<V> t = tanh_argument(x);
    const V s = sigmoid(t.u);
    return fma(x * t.du, fma(-s, s, s), s);
  }
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(x);
    return fma(x, fma(-s, s, s), s);
  }
  return one;
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
