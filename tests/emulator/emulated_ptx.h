// ptx.cuh's functions on the emulator: same names, same signatures.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "emulator.h"

namespace fusedseq {
namespace ptx {

inline uint32_t shared_address(const void* pointer) { return emulator::shared_window_address(pointer); }
inline uint32_t lane() { return uint32_t(emulator::current_lane()); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool bf16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(bf16 || std::is_same<T, __half>::value, "mma_m16n8k16 takes __nv_bfloat16 and __half");
  emulator::mma(bf16 ? emulator::Product::bf16 : emulator::Product::f16, d, a, b);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Product::tf32, d, a, b);
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}
template <int N, bool Trans = false>
void ldmatrix(uint32_t (&r)[N], uint32_t shared) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emulator::ldmatrix(r, N, Trans, shared);
}

template <int Bytes>
void cp_async(uint32_t shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(shared, global, Bytes, valid);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int Pending>
void cp_async_wait() {
  emulator::cp_async_wait(Pending);
}

inline void barrier_sync(int id, int threads) { emulator::barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { emulator::barrier(id, threads, false); }

inline void mbarrier_init(uint32_t shared, uint32_t arrivals) { emulator::mbarrier_init(shared, arrivals); }
inline void mbarrier_inval(uint32_t shared) { emulator::mbarrier_inval(shared); }
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t shared) { emulator::mbarrier_arrive(shared, 0, emulator::Arrival::own); }
inline void mbarrier_arrive_expect_tx(uint32_t shared, uint32_t bytes) {
  emulator::mbarrier_arrive(shared, bytes, emulator::Arrival::own);
}
inline void mbarrier_arrive_remote(uint32_t remote) { emulator::mbarrier_arrive(remote, 0, emulator::Arrival::remote); }
inline void mbarrier_arrive_remote_reads(uint32_t remote) {
  emulator::mbarrier_arrive(remote, 0, emulator::Arrival::remote_reads);
}
inline void mbarrier_arrive_expect_tx_remote(uint32_t remote, uint32_t bytes) {
  emulator::mbarrier_arrive(remote, bytes, emulator::Arrival::remote);
}
inline void mbarrier_arrive_expect_tx_remote_reads(uint32_t remote, uint32_t bytes) {
  emulator::mbarrier_arrive(remote, bytes, emulator::Arrival::remote_reads);
}
inline bool mbarrier_try_wait(uint32_t shared, uint32_t parity) {
  return emulator::mbarrier_try_wait(shared, parity, false);
}
inline bool mbarrier_try_wait_cluster(uint32_t shared, uint32_t parity) {
  return emulator::mbarrier_try_wait(shared, parity, true);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_size() { return emulator::cluster_size(); }
inline void cluster_arrive() { emulator::cluster_arrive(true); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(false); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline uint32_t mapa(uint32_t shared, uint32_t rank) { return emulator::mapa(shared, rank); }
template <class T>
T ld_remote(uint32_t remote) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  T value;
  emulator::remote_read(&value, remote, int(sizeof(T)));
  return value;
}
template <class T>
void st_remote(uint32_t remote, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  emulator::remote_write(remote, &value, int(sizeof(T)));
}
inline uint2 ld_shared_8(uint32_t shared) {
  uint2 value;
  emulator::remote_read(&value, shared, int(sizeof(value)));
  return value;
}
inline uint32_t opaque(uint32_t x) { return x; }
template <class T>
void st_async(uint32_t remote, T value, uint32_t remote_mbarrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  emulator::st_async(remote, &value, int(sizeof(T)), remote_mbarrier);
}
template <class T>
void st_async_if(bool when, uint32_t remote, T value, uint32_t remote_mbarrier) {
  static_assert(sizeof(T) == 16, "16 bytes");
  if (when) st_async(remote, value, remote_mbarrier);
}
inline void cp_async_bulk_to_remote(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_mbarrier) {
  emulator::bulk_to_remote(remote, shared, bytes, remote_mbarrier);
}
inline void cp_async_bulk_to_shared(uint32_t shared, const void* global, uint32_t bytes, uint32_t mbarrier) {
  emulator::bulk_to_shared(shared, global, bytes, mbarrier);
}
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

// Where it goes and how that is aligned, GlobalSpan::store_16 has checked.
inline void st_global_16(void* address, uint4 value) { memcpy(address, static_cast<const void*>(&value), 16); }

template <class T>
T ld_acquire(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  emulator::check_flag(address, int(sizeof(T)), "ld_acquire");
  emulator::flag_read(address, emulator::Order::acquire, "ld_acquire");
  return *static_cast<const volatile T*>(address);
}
template <class T>
T ld_relaxed(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  emulator::check_flag(address, int(sizeof(T)), "ld_relaxed");
  emulator::flag_read(address, emulator::Order::relaxed, "ld_relaxed");
  return *static_cast<const volatile T*>(address);
}
template <class T>
void st_release(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  emulator::check_flag(address, int(sizeof(T)), "st_release");
  emulator::flag_write(address, emulator::Order::release);
  *address = value;
}
template <class T>
void st_relaxed(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  emulator::check_flag(address, int(sizeof(T)), "st_relaxed");
  emulator::flag_write(address, emulator::Order::relaxed);
  *address = value;
}
inline void red_release_add(uint32_t* address, uint32_t value) {
  emulator::atomic("red_release_add", address, emulator::Order::release,
                   [value](uint32_t before) { return before + value; });
}
inline uint32_t atom_add_acq_rel(uint32_t* address, uint32_t value) {
  return emulator::atomic("atom_add_acq_rel", address, emulator::Order::acquire_release,
                          [value](uint32_t before) { return before + value; });
}
inline void fence_acq_rel_gpu() { emulator::fence(); }
inline void fence_acq_rel_cluster() { emulator::fence(); }

inline void nanosleep(uint32_t nanoseconds) { emulator::nanosleep(nanoseconds); }
inline uint64_t globaltimer() { return emulator::clock_nanoseconds(); }
inline uint64_t clock() { return uint64_t(clock64()); }
inline void prefetch_l2(const void*) {}
inline float exp2_approx(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

}  // namespace ptx
}  // namespace fusedseq

#include "emulated_hopper.h"
