// Stands in for CUDA's header of this name, so far as csrc/cuda uses it: the language's extensions to C++, vector
// types, built-in variables, intrinsics and the little of the runtime that launch.h leaves.
//
// `__shared__` is missing on purpose: shared memory is dynamic and comes from csrc/cuda/span.cuh.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __restrict__ __restrict
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define FSQ_EMULATED_VECTORS(name, type, align2, align4)                      \
  struct alignas(align2) name##2 { type x, y; };                              \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(align4) name##4 { type x, y, z, w; };                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

FSQ_EMULATED_VECTORS(char, signed char, 2, 4)
FSQ_EMULATED_VECTORS(uchar, unsigned char, 2, 4)
FSQ_EMULATED_VECTORS(short, short, 4, 8)
FSQ_EMULATED_VECTORS(ushort, unsigned short, 4, 8)
FSQ_EMULATED_VECTORS(int, int, 8, 16)
FSQ_EMULATED_VECTORS(longlong, long long, 16, 16)
FSQ_EMULATED_VECTORS(float, float, 8, 16)
FSQ_EMULATED_VECTORS(double, double, 16, 16)
#undef FSQ_EMULATED_VECTORS

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (::fusedseq::emulator::current_thread())
#define blockIdx (::fusedseq::emulator::current_block())
#define blockDim (::fusedseq::emulator::block_size())
#define gridDim (::fusedseq::emulator::grid_size())
constexpr int warpSize = 32;

// Barriers and fences.

inline void __syncthreads() { fusedseq::emulator::sync_block(); }
inline int __syncthreads_count(int predicate) { return fusedseq::emulator::sync_block_count(predicate != 0); }
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fusedseq::emulator::sync_warp(mask); }
inline void __threadfence() { fusedseq::emulator::fence(); }
inline void __threadfence_system() { fusedseq::emulator::fence(); }
inline void __threadfence_block() { fusedseq::emulator::fence(); }
inline void __trap() { fusedseq::emulator::trap("__trap()"); }

// Warp collectives.

namespace fusedseq {
namespace emulator {

template <class T>
T shuffle_value(const char* call, unsigned mask, T value, Shuffle kind, int operand, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles take up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(call, mask, bits, kind, operand, width);
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace emulator
}  // namespace fusedseq

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return fusedseq::emulator::shuffle_value("__shfl_sync", mask, value, fusedseq::emulator::Shuffle::index, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return fusedseq::emulator::shuffle_value("__shfl_up_sync", mask, value, fusedseq::emulator::Shuffle::up, int(delta),
                                           width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return fusedseq::emulator::shuffle_value("__shfl_down_sync", mask, value, fusedseq::emulator::Shuffle::down,
                                           int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return fusedseq::emulator::shuffle_value("__shfl_xor_sync", mask, value, fusedseq::emulator::Shuffle::exclusive_or,
                                           lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return fusedseq::emulator::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return fusedseq::emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return fusedseq::emulator::ballot("__all_sync", mask, predicate != 0) == mask;
}
// More lanes than a GPU may report where they have diverged, which it may do at any time.
inline unsigned __activemask() { return fusedseq::emulator::active_lanes(); }

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) sum += __shfl_sync(mask, value, lane);
  return sum;
}

// Atomics.

namespace fusedseq {
namespace emulator {

template <class T, class Update>
T atomic(const char* call, T* address, Order order, Update update) {
  check_flag(address, int(sizeof(T)), call);
  flag_update(address, order);
  const T before = *address;
  *address = update(before);
  const bool changed = memcmp(static_cast<const void*>(&before), static_cast<const void*>(address), sizeof(T)) != 0;
  atomic_done(changed, call);
  return before;
}

}  // namespace emulator
}  // namespace fusedseq

#define FSQ_EMULATED_ATOMIC(name, expression)                                             \
  template <class T>                                                                      \
  T name(T* address, std::common_type_t<T> value) {                                       \
    return fusedseq::emulator::atomic(#name, address, fusedseq::emulator::Order::relaxed, \
                                      [value](T before) -> T { return T(expression); });  \
  }

FSQ_EMULATED_ATOMIC(atomicAdd, before + value)
FSQ_EMULATED_ATOMIC(atomicSub, before - value)
FSQ_EMULATED_ATOMIC(atomicMax, before < value ? value : before)
FSQ_EMULATED_ATOMIC(atomicMin, value < before ? value : before)
FSQ_EMULATED_ATOMIC(atomicAnd, before& value)
FSQ_EMULATED_ATOMIC(atomicOr, before | value)
FSQ_EMULATED_ATOMIC(atomicXor, before ^ value)
FSQ_EMULATED_ATOMIC(atomicExch, (void(before), value))
#undef FSQ_EMULATED_ATOMIC

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return fusedseq::emulator::atomic("atomicCAS", address, fusedseq::emulator::Order::relaxed,
                                    [=](T before) { return before == expected ? value : before; });
}

// Arithmetic. Approximations are as exact here as the host makes them.

using std::max;
using std::min;
inline long long min(long long a, int b) { return a < b ? a : b; }
inline long long max(long long a, int b) { return a > b ? a : b; }

template <class To, class From>
To fsq_emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return fsq_emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return fsq_emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return fsq_emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return fsq_emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return fsq_emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return fsq_emulated_bits<double>(x); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline long long clock64() { return static_cast<long long>(2 * fusedseq::emulator::clock_nanoseconds()); }
inline void __nanosleep(unsigned nanoseconds) { fusedseq::emulator::nanosleep(nanoseconds); }

// The runtime. Work on a stream is done when the call returns.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(data, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
