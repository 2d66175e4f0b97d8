// Between the dtypes that tensors are stored in and the type that kernels compute in (float, or double for float64).
#pragma once
#include "cpu/vec.h"

namespace fusedseq {
namespace FSQ_ISA {

FSQ_INLINE int64_t dtype_size(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

FSQ_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t u = uint32_t(x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FSQ_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // nearest even
  const uint32_t quiet = (u >> 16) | 0x40;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

#if defined(__F16C__)
FSQ_INLINE float f16_to_float(uint16_t x) { return _cvtsh_ss(x); }
FSQ_INLINE uint16_t float_to_f16(float f) { return _cvtss_sh(f, 0); }
#elif defined(__aarch64__)
FSQ_INLINE float f16_to_float(uint16_t x) {
  __fp16 h;
  memcpy(&h, &x, 2);
  return h;
}
FSQ_INLINE uint16_t float_to_f16(float f) {
  const __fp16 h = __fp16(f);
  uint16_t x;
  memcpy(&x, &h, 2);
  return x;
}
#else
FSQ_INLINE float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023;
  float f;
  uint32_t u;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    f = float(mantissa) * 0x1p-24f;
    memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  }
  memcpy(&f, &u, 4);
  return f;
}
FSQ_INLINE uint16_t float_to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return uint16_t(sign | 0x7e00 | ((u >> 13) & 1023));
  if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past 65504
  if (u < 0x38800000) {                                 // subnormal: adding 0.5 lines the bits up and rounds them
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  return uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13));
}
#endif

template <class S>
FSQ_INLINE S load_scalar(const void* p, DType d, int64_t i) {
  switch (d) {
    case DType::f32:
      return S(static_cast<const float*>(p)[i]);
    case DType::f64:
      return S(static_cast<const double*>(p)[i]);
    case DType::bf16:
      return S(bf16_to_float(static_cast<const uint16_t*>(p)[i]));
    default:
      return S(f16_to_float(static_cast<const uint16_t*>(p)[i]));
  }
}

// n values from p[i...] of dtype d; lanes past n are 0.
template <class S>
FSQ_INLINE Vec<S> load_as(const void* p, DType d, int64_t i, int64_t n) {
  if (sizeof(S) == 8 || d == DType::f32) return load_n(static_cast<const S*>(p) + i, n);
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
  S tmp[kLanes<S>] = {};
  const int64_t m = n < kLanes<S> ? n : kLanes<S>;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    const __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << m) - 1), h);
    if (d == DType::bf16) return (Vec<S>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
    return (Vec<S>)_mm512_cvtph_ps(raw);
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (sizeof(S) == 4 && m == 8) {
    __m128i raw;
    memcpy(&raw, h, sizeof raw);
    if (d == DType::bf16) return (Vec<S>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
    return (Vec<S>)_mm256_cvtph_ps(raw);
  }
#endif
  if (d == DType::bf16)
    for (int64_t k = 0; k < m; ++k) tmp[k] = S(bf16_to_float(h[k]));
  else
    for (int64_t k = 0; k < m; ++k) tmp[k] = S(f16_to_float(h[k]));
  return load(tmp);
}

template <class S>
FSQ_INLINE void store_as(void* p, DType d, int64_t i, Vec<S> v, int64_t n) {
  if (sizeof(S) == 8 || d == DType::f32) return store_n(static_cast<S*>(p) + i, v, n);
  uint16_t* h = static_cast<uint16_t*>(p) + i;
  const int64_t m = n < kLanes<S> ? n : kLanes<S>;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    __m256i raw;
    if (d == DType::f16) {
      raw = _mm512_cvtps_ph((__m512)v, 0);
    } else {
#if defined(__AVX512BF16__)
      raw = (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
      const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
      raw = _mm512_cvtepi32_epi16(
          _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000)), 16));
#endif
    }
    _mm256_mask_storeu_epi16(h, __mmask16((1u << m) - 1), raw);
    return;
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (sizeof(S) == 4 && d == DType::f16 && m == 8) {
    const __m128i raw = _mm256_cvtps_ph((__m256)v, 0);
    memcpy(h, &raw, sizeof raw);
    return;
  }
#endif
  S tmp[kLanes<S>];
  store(tmp, v);
  if (d == DType::bf16)
    for (int64_t k = 0; k < m; ++k) h[k] = float_to_bf16(float(tmp[k]));
  else
    for (int64_t k = 0; k < m; ++k) h[k] = float_to_f16(float(tmp[k]));
}

// A whole row, in and out of the compute type.
template <class S>
static void load_row(S* dst, const void* src, DType d, int64_t i, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<S>) store_n(dst + k, load_as<S>(src, d, i + k, n - k), n - k);
}
template <class S>
static void store_row(void* dst, DType d, int64_t i, const S* src, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<S>) store_as<S>(dst, d, i + k, load_n(src + k, n - k), n - k);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
