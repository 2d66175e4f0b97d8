// Stands in for CUDA's header of this name: float16 storage, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short __x;

  __half() = default;
  __half(float value);
  __half(__half_raw raw) : __x(raw.x) {}
  operator float() const;
};
using half = __half;

inline __half::__half(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7fff;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves a multiple of 2^-24, rounded, in the low bits
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  __x = static_cast<unsigned short>(sign | rounded);
}

inline __half::operator float() const {
  const unsigned sign = (__x & 0x8000u) << 16, exponent = __x >> 10 & 31, mantissa = __x & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(mantissa) * 0x1p-24f));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline __half2 __float22half2_rn(float2 values) { return {values.x, values.y}; }
inline float2 __half22float2(__half2 values) { return {values.x, values.y}; }
inline float __low2float(__half2 values) { return values.x; }
inline float __high2float(__half2 values) { return values.y; }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
