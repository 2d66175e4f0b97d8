// float and double as value types of the cell math on a GPU, and how stored elements become them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <type_traits>

#include "cells/value.h"
#include "cuda/ptx.cuh"
#include "cuda/span.cuh"
#include "fusedseq.h"

// The loop that follows is unrolled n times and no more.
#define FSQ_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define FSQ_UNROLL_BY(n) FSQ_PRAGMA(unroll n)
#else
#define FSQ_UNROLL_BY(n) FSQ_PRAGMA(GCC unroll n)
#endif

namespace fusedseq {
namespace FSQ_ISA {

FSQ_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FSQ_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }
FSQ_DEVICE float round_even(float a) { return ::rintf(a); }
FSQ_DEVICE double round_even(double a) { return ::rint(a); }
// NaN goes through: a converted NaN is 0, but what the power is multiplied with is NaN then.
FSQ_DEVICE float pow2(float n) { return ::ldexpf(1.0f, int(n)); }
FSQ_DEVICE double pow2(double n) { return ::ldexp(1.0, int(n)); }
FSQ_DEVICE float scale2(float a, float n) { return ::ldexpf(a, int(n)); }
FSQ_DEVICE double scale2(double a, double n) { return ::ldexp(a, int(n)); }
FSQ_DEVICE float negative_abs(float a) { return -::fabsf(a); }
FSQ_DEVICE double negative_abs(double a) { return -::fabs(a); }
FSQ_DEVICE float at_least(float low, float a) { return low > a ? low : a; }
FSQ_DEVICE double at_least(double low, double a) { return low > a ? low : a; }
FSQ_DEVICE float with_sign(float a, float b) { return ::copysignf(a, b); }
FSQ_DEVICE double with_sign(double a, double b) { return ::copysign(a, b); }
// For a >= 2^-126; a correction follows.
FSQ_DEVICE float reciprocal(float a) { return ptx::reciprocal_approx(a); }
FSQ_DEVICE double reciprocal(double a) { return 1.0 / a; }
template <class S>
FSQ_DEVICE S quotient(S a, S d, S l) {
  const S y = reciprocal(d), r = a * y;
  return fma(fma(-r, l, fma(-r, d, a)), y, r);
}

// e^x for x <= 0 within 4 ulp, 0 where it is subnormal: 2^p of the rounded product p, and what rounding took from it.
FSQ_DEVICE float exp_of_negative(float x) {
  constexpr float log2e = 0x1.715476p+0f, log2e_lo = 0x1.4ae0c0p-26f, ln2 = 0x1.62e430p-1f;
  x = at_least(-110.0f, x);  // finite, and 2^p is 0 to every rounding
  const float p = x * log2e, lost = fma(x, log2e_lo, fma(x, log2e, -p)), t = ptx::exp2_approx(p);
  return fma(t, lost * ln2, t);
}

// The nonlinearities of float on a device, where two instructions stand for an exponential and a reciprocal.
// cells/math.h has the general ones, which take more than twice as many. Within 8 ulp (tests/test_cuda_math.py measures
// them), exact at +-inf, NaN passes through; a sigmoid below 2^-126 is 0.
FSQ_DEVICE float sigmoid(float x) {
  const float t = exp_of_negative(negative_abs(x));
  return (x < 0.0f ? t : 1.0f) * ptx::reciprocal_approx(1.0f + t);
}
// (1 - e^-2|x|) / (1 + e^-2|x|), near 0 a polynomial in x^2, minimax for |x| < 5/8 (2^-27).
FSQ_DEVICE float tanh(float x) {
  const float t = exp_of_negative(2.0f * negative_abs(x));
  const float far = (1.0f - t) * ptx::reciprocal_approx(1.0f + t);
  const float z = x * x;
  float q = -0x1.75e0dap-8f;
  q = fma(q, z, 0x1.522668p-6f);
  q = fma(q, z, -0x1.b83c52p-5f);
  q = fma(q, z, 0x1.110726p-3f);
  q = fma(q, z, -0x1.555532p-2f);
  return ::fabsf(x) < 0.625f ? fma(q * z, x, x) : with_sign(far, x);
}

// float32 rounded to the 10 bits of mantissa that the tensor cores multiply: an operand. What lies in global memory is
// float32 as it was.
struct Tf32 {
  float value;
};
template <class E>
struct StoredOf {
  typedef E type;
};
template <>
struct StoredOf<Tf32> {
  typedef float type;
};
// Of an operand type, the type of tensors.
template <class E>
using Stored = typename StoredOf<E>::type;

template <class E>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

FSQ_DEVICE float widen(float x) { return x; }
FSQ_DEVICE double widen(double x) { return x; }
FSQ_DEVICE float widen(Tf32 x) { return x.value; }
FSQ_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
FSQ_DEVICE float widen(__half x) { return __half2float(x); }

template <class E>
FSQ_DEVICE E narrow(Compute<E> x) {
  return E(x);
}
template <>
FSQ_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FSQ_DEVICE __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FSQ_DEVICE Tf32 narrow<Tf32>(float x) {
  return {__uint_as_float(ptx::to_tf32(x))};
}
// A tensor's element as an operand.
template <class E>
FSQ_DEVICE E operand(Stored<E> x) {
  if constexpr (std::is_same_v<E, Stored<E>>)
    return x;
  else
    return narrow<E>(x);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
