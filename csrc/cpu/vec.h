// SIMD value types: GCC/Clang vector extensions for arithmetic, intrinsics where a row of the ISA table has better.
//
// Everything lives in the namespace of its ISA: two builds of one template under one name would share a weak
// symbol, the linker would keep one, and an older CPU could be left calling it. No STL templates here for that reason.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cells/value.h"
#include "fusedseq.h"

#if defined(__AVX512F__)
#define FSQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FSQ_VECTOR_BYTES 32
#else
#define FSQ_VECTOR_BYTES 16
#endif

namespace fusedseq {
namespace FSQ_ISA {

typedef float VecF __attribute__((vector_size(FSQ_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FSQ_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FSQ_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(FSQ_VECTOR_BYTES)));

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF type;
  typedef VecI bits;
  typedef int32_t bit;
};
template <>
struct VecOf<double> {
  typedef VecD type;
  typedef VecL bits;
  typedef int64_t bit;
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanes = FSQ_VECTOR_BYTES / int(sizeof(S));

// x - 0 is x for every x, -0 and NaN too, so this is a broadcast and nothing else.
template <>
struct Num<VecF> {
  typedef float Scalar;
  FSQ_INLINE VecF c(float x) { return x - VecF{}; }
};
template <>
struct Num<VecD> {
  typedef double Scalar;
  FSQ_INLINE VecD c(double x) { return x - VecD{}; }
};

#if defined(__AVX512F__)
FSQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
FSQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
FSQ_INLINE VecF round_even(VecF a) { return _mm512_roundscale_ps(a, 8); }
FSQ_INLINE VecD round_even(VecD a) { return _mm512_roundscale_pd(a, 8); }
FSQ_INLINE VecF scale2(VecF a, VecF n) { return _mm512_scalef_ps(a, n); }
FSQ_INLINE VecD scale2(VecD a, VecD n) { return _mm512_scalef_pd(a, n); }
FSQ_INLINE VecF pow2(VecF n) { return scale2(Num<VecF>::c(1.0f), n); }
FSQ_INLINE VecD pow2(VecD n) { return scale2(Num<VecD>::c(1.0), n); }
#else
#if defined(__FMA__)
FSQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
FSQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
FSQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return vfmaq_f32(c, a, b); }
FSQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return vfmaq_f64(c, a, b); }
#else
FSQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
FSQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#endif
// Adding 1.5 * 2^mantissa leaves the integer nearest to a in the low bits. Holds for |a| < 2^22 (2^51), which is all
// that the exponentials ask for. NaN stays NaN.
FSQ_INLINE VecF magic(VecF) { return Num<VecF>::c(0x1.8p23f); }
FSQ_INLINE VecD magic(VecD) { return Num<VecD>::c(0x1.8p52); }
template <class V>
FSQ_INLINE V round_even(V a) {
  return (a + magic(a)) - magic(a);
}
FSQ_INLINE VecF pow2(VecF n) { return (VecF)(((VecI)(n + magic(n)) - 0x4b400000 + 127) << 23); }
FSQ_INLINE VecD pow2(VecD n) { return (VecD)(((VecL)(n + magic(n)) - 0x4338000000000000 + 1023) << 52); }
// In two halves, so that neither factor leaves the normal range when the product does.
template <class V>
FSQ_INLINE V scale2(V a, V n) {
  typedef typename Num<V>::Scalar S;
  const V half = round_even(n * Num<V>::c(S(0.5)));
  return a * pow2(half) * pow2(n - half);
}
#endif

// Sign bits by integer operations; the all-zero vector with only its sign bits set is -0.
template <class S>
FSQ_INLINE typename VecOf<S>::bits sign_bits() {
  typedef typename VecOf<S>::bits B;
  return (B)Num<Vec<S>>::c(S(-0.0));
}
template <class V>
FSQ_INLINE V negative_abs(V a) {
  typedef typename VecOf<typename Num<V>::Scalar>::bits B;
  return (V)((B)a | sign_bits<typename Num<V>::Scalar>());
}
template <class V>
FSQ_INLINE V with_sign(V a, V b) {
  typedef typename VecOf<typename Num<V>::Scalar>::bits B;
  return (V)((B)a | ((B)b & sign_bits<typename Num<V>::Scalar>()));
}
// The hardware's maximum gives its second operand if either is NaN.
#if defined(__AVX512F__)
FSQ_INLINE VecF at_least(float low, VecF a) { return _mm512_max_ps(Num<VecF>::c(low), a); }
FSQ_INLINE VecD at_least(double low, VecD a) { return _mm512_max_pd(Num<VecD>::c(low), a); }
FSQ_INLINE VecF reciprocal(VecF a) { return _mm512_rcp14_ps(a); }
#else
template <class V>
FSQ_INLINE V at_least(typename Num<V>::Scalar low, V a) {
  const V bound = Num<V>::c(low);
  return bound > a ? bound : a;
}
FSQ_INLINE VecF reciprocal(VecF a) { return Num<VecF>::c(1.0f) / a; }
#endif
FSQ_INLINE VecD reciprocal(VecD a) { return Num<VecD>::c(1.0) / a; }
template <class V>
FSQ_INLINE V quotient(V a, V d, V l) {
#if defined(__FMA__) || defined(__aarch64__)
  const V y = reciprocal(d), r = a * y;
  return fma(fma(-r, l, fma(-r, d, a)), y, r);
#else  // a residual needs a fused multiply-add
  const V r = a / d;
  return r - r * l / d;
#endif
}

template <class S>
FSQ_INLINE Vec<S> load(const S* p) {
  Vec<S> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
FSQ_INLINE void store(S* p, Vec<S> v) {
  memcpy(p, &v, sizeof v);
}
template <class S>
FSQ_INLINE Vec<S> splat(S s) {
  return Num<Vec<S>>::c(s);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class S>
FSQ_INLINE __m256i first_lanes(int64_t n) {
  typedef typename VecOf<S>::bits B;
  B index{};
  for (int i = 0; i < kLanes<S>; ++i) index[i] = i;
  return (__m256i)(index < (B{} + typename VecOf<S>::bit(n)));
}
#endif

// The first n lanes; the rest read as 0 and are never touched in memory.
template <class S>
FSQ_INLINE Vec<S> load_n(const S* p, int64_t n) {
  if (n >= kLanes<S>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return (Vec<S>)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
  else
    return (Vec<S>)_mm512_maskz_loadu_epi64(__mmask8((1u << n) - 1), p);
#else
  Vec<S> v{};
#if defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    v = _mm256_maskload_ps(p, first_lanes<S>(n));
  else
    v = _mm256_maskload_pd(p, first_lanes<S>(n));
#else
  for (int i = 0; i < kLanes<S>; ++i) v[i] = i < n ? p[i] : S(0);
#endif
  return v;
#endif
}
template <class S>
FSQ_INLINE void store_n(S* p, Vec<S> v, int64_t n) {
  if (n >= kLanes<S>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), (__m512i)v);
  else
    _mm512_mask_storeu_epi64(p, __mmask8((1u << n) - 1), (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    _mm256_maskstore_ps(p, first_lanes<S>(n), v);
  else
    _mm256_maskstore_pd(p, first_lanes<S>(n), v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

template <class V>
FSQ_INLINE typename Num<V>::Scalar total(V a) {
  typename Num<V>::Scalar sum = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof sum; ++i) sum += a[i];
  return sum;
}

}  // namespace FSQ_ISA
}  // namespace fusedseq

#include "cells/math.h"
