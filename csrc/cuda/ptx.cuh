// Every PTX instruction of the CUDA backend, one small function each; no other file than this and ptx_hopper.cuh, which
// it includes, holds inline assembly.
//
// Under FSQ_EMULATE the same functions, with the same signatures, come from tests/emulator/emulated_ptx.h, and the
// emulator checks what a GPU leaves undefined (docs/emulator.md). Semantics: PTX ISA 9.0, sections 9.7 and 9.7.14.5
// (matrix fragments).
//
// Conventions: `shared` is a 32-bit shared-window address (SharedSpan::address, shared_address); `remote` such an
// address mapped into another CTA of the cluster (mapa). Functions marked sm_90 trap on an older architecture: a
// launcher must not choose their kernel there.
#pragma once

#ifdef FSQ_EMULATE
#include "emulated_ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define FSQ_PTX static __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FSQ_SM90(...) __VA_ARGS__
#else
#define FSQ_SM90(...) __trap()
#endif

namespace fusedseq {
namespace ptx {

FSQ_PTX uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

FSQ_PTX uint32_t lane() {
  uint32_t value;
  asm("mov.u32 %0, %%laneid;" : "=r"(value));
  return value;
}

// Tensor cores.
// D[16,8] += A[16,K] B[K,8], float32 sums. With g = lane / 4 and t = lane % 4:
//   K = 16, halves packed low first: a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] =
//   A[g+8][2t+8..];
//           b[0] = B[2t..][g], b[1] = B[2t+8..][g]
//   K = 8, tf32: a[0] = A[g][t], a[1] = A[g+8][t], a[2] = A[g][t+4], a[3] = A[g+8][t+4]; b[0] = B[t][g], b[1] =
//   B[t+4][g] d[0], d[1] = D[g][2t], D[g][2t+1]; d[2], d[3] = D[g+8][2t], D[g+8][2t+1]

// T: __nv_bfloat16 or __half.
template <class T>
FSQ_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands are float32 bits of which the tensor core reads the upper 19; to_tf32 rounds instead.
FSQ_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Round to nearest, ties away from zero. On sm_80 and sm_90 a test, an addition and a mask: infinities stay, and so
// does a NaN, unless only its lowest 13 bits say that it is one (arithmetic gives none such).
FSQ_PTX uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// N (1, 2, 4) matrices of 8x8 halves from shared memory. Lane 8i + j passes the address of row j of matrix i, 16-byte
// aligned (lanes past 8N: any valid address). r[i] = M_i[g][2t], M_i[g][2t+1]; with Trans M_i[2t][g], M_i[2t+1][g].
template <int N, bool Trans = false>
FSQ_PTX void ldmatrix(uint32_t (&r)[N], uint32_t shared) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  if constexpr (N == 1 && !Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared) : "memory");
  if constexpr (N == 1 && Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared) : "memory");
  if constexpr (N == 2 && !Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared)
                 : "memory");
  if constexpr (N == 2 && Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared)
                 : "memory");
  if constexpr (N == 4 && !Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  if constexpr (N == 4 && Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// Asynchronous copies global -> shared of one thread.

// Bytes (4, 8, 16) bytes to `shared`, the first `valid` of them from `global`, zeros after; both aligned to Bytes.
// The data may be read from this thread after cp_async_wait, from others after a barrier as well.
template <int Bytes>
FSQ_PTX void cp_async(uint32_t shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint64_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16)  // past L1, where nobody reads it again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(Bytes), "r"(valid)
                 : "memory");
}

FSQ_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's committed groups are unfinished.
template <int Pending>
FSQ_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Barriers of a block.

// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads, whole warps.
FSQ_PTX void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives without waiting; those who wait see what this thread wrote before.
FSQ_PTX void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// mbarrier: 8 bytes of shared memory, 8-byte aligned.

FSQ_PTX void mbarrier_init(uint32_t shared, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared), "r"(arrivals) : "memory");
}
FSQ_PTX void mbarrier_inval(uint32_t shared) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared) : "memory");
}
// Makes this thread's mbarrier_init known to the cluster and to the asynchronous copies; a barrier must follow. sm_90
FSQ_PTX void fence_mbarrier_init() { FSQ_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory")); }

FSQ_PTX void mbarrier_arrive(uint32_t shared) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared) : "memory");
}
// Expects `bytes` more of asynchronous data in this phase, then arrives. sm_90
FSQ_PTX void mbarrier_arrive_expect_tx(uint32_t shared, uint32_t bytes) {
  FSQ_SM90(asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared),
                        "r"(bytes) : "memory"));
}
// Arrives at an mbarrier of another CTA; what this thread did before is seen by those who wait there with
// mbarrier_try_wait_cluster. sm_90
FSQ_PTX void mbarrier_arrive_remote(uint32_t remote) {
  FSQ_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory"));
}
FSQ_PTX void mbarrier_arrive_expect_tx_remote(uint32_t remote, uint32_t bytes) {
  FSQ_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(remote),
                        "r"(bytes) : "memory"));
}
// The same two, but they publish only reads: that what this thread (or, by a barrier before, its block) has read may be
// overwritten. Asynchronous data needs no more, for its mbarrier counts it where it lands. Cheap: the two above wait
// until the whole GPU sees this thread's writes (a MEMBAR.ALL.GPU in SASS), these are one instruction. sm_90
FSQ_PTX void mbarrier_arrive_remote_reads(uint32_t remote) {
  FSQ_SM90(asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory"));
}
FSQ_PTX void mbarrier_arrive_expect_tx_remote_reads(uint32_t remote, uint32_t bytes) {
  FSQ_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(remote), "r"(bytes) : "memory"));
}
// Whether the phase of this parity (0 for the first) is over; may sleep a little. Sees what arrivals of this CTA and
// asynchronous copies published, and what remote arrivals said of reads.
FSQ_PTX bool mbarrier_try_wait(uint32_t shared, uint32_t parity) {
  uint32_t done = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared), "r"(parity)
               : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared), "r"(parity)
               : "memory");
#endif
  return done != 0;
}
// The same, and sees what remote arrivals published (at the price of a CCTL.IVALL in SASS). sm_90
FSQ_PTX bool mbarrier_try_wait_cluster(uint32_t shared, uint32_t parity) {
  uint32_t done = 0;
  FSQ_SM90(
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, "
                   "1, 0, p; }" : "=r"(done) : "r"(shared),
                   "r"(parity) : "memory"));
  return done != 0;
}

// Clusters (sm_90).

FSQ_PTX uint32_t cluster_rank() {
  uint32_t value = 0;
  FSQ_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value)));
  return value;
}
FSQ_PTX uint32_t cluster_size() {
  uint32_t value = 1;
  FSQ_SM90(asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(value)));
  return value;
}
// All threads of the cluster arrive; what they did before is seen by those who have waited.
FSQ_PTX void cluster_arrive() { FSQ_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory")); }
// Arrives and publishes nothing.
FSQ_PTX void cluster_arrive_relaxed() {
  FSQ_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;" :: : "memory"));
}
FSQ_PTX void cluster_wait() { FSQ_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")); }

// Where `shared` of this CTA lies in the CTA of that rank.
FSQ_PTX uint32_t mapa(uint32_t shared, uint32_t rank) {
  uint32_t remote = 0;
  FSQ_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank)));
  return remote;
}

// A value of 2, 4, 8 or 16 bytes, aligned to its size, in another CTA's shared memory. Ordered by the cluster barrier
// or by a remote arrival and its wait.
template <class T>
FSQ_PTX T ld_remote(uint32_t remote) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t w = 0;
    FSQ_SM90(asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(w) : "r"(remote) : "memory"));
    memcpy(&value, &w, 2);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t w = 0;
    FSQ_SM90(asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(w) : "r"(remote) : "memory"));
    memcpy(&value, &w, 4);
  } else if constexpr (sizeof(T) == 8) {
    uint32_t w[2] = {};
    FSQ_SM90(
        asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(remote) : "memory"));
    memcpy(&value, w, 8);
  } else {
    uint32_t w[4] = {};
    FSQ_SM90(asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]),
                          "=r"(w[3]) : "r"(remote) : "memory"));
    memcpy(&value, w, 16);
  }
  return value;
}
template <class T>
FSQ_PTX void st_remote(uint32_t remote, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 2) {
    uint16_t w;
    memcpy(&w, &value, 2);
    FSQ_SM90(asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(remote), "h"(w) : "memory"));
  } else if constexpr (sizeof(T) == 4) {
    uint32_t w;
    memcpy(&w, &value, 4);
    FSQ_SM90(asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(w) : "memory"));
  } else if constexpr (sizeof(T) == 8) {
    uint32_t w[2];
    memcpy(w, &value, 8);
    FSQ_SM90(asm volatile("st.shared::cluster.v2.u32 [%0], {%1,%2};" ::"r"(remote), "r"(w[0]), "r"(w[1]) : "memory"));
  } else {
    uint32_t w[4];
    memcpy(w, &value, 16);
    FSQ_SM90(asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(remote), "r"(w[0]), "r"(w[1]),
                          "r"(w[2]), "r"(w[3]) : "memory"));
  }
}

// A value of 8 bytes of this CTA, by its address: where the compiler would rather form a pointer anew than keep it.
FSQ_PTX uint2 ld_shared_8(uint32_t shared) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(shared) : "memory");
  return value;
}
// x, of which the compiler no longer knows how it came about.
FSQ_PTX uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Asynchronous store of 4, 8 or 16 bytes: `remote_mbarrier`, in the same CTA as `remote`, counts sizeof(T) bytes when
// the value can be read there. The CTA may be this thread's own, but a cluster of one CTA has no such stores.
template <class T>
FSQ_PTX void st_async(uint32_t remote, T value, uint32_t remote_mbarrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof(T));
  if constexpr (sizeof(T) == 4)
    FSQ_SM90(
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote),
                     "r"(w[0]), "r"(remote_mbarrier) : "memory"));
  if constexpr (sizeof(T) == 8)
    FSQ_SM90(asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1,%2}, [%3];" ::"r"(remote),
        "r"(w[0]), "r"(w[1]), "r"(remote_mbarrier) : "memory"));
  if constexpr (sizeof(T) == 16)
    FSQ_SM90(asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(remote),
        "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(remote_mbarrier) : "memory"));
}

// The same of 16 bytes where `when` holds.
template <class T>
FSQ_PTX void st_async_if(bool when, uint32_t remote, T value, uint32_t remote_mbarrier) {
  static_assert(sizeof(T) == 16, "16 bytes");
  uint32_t w[4];
  memcpy(w, &value, sizeof(T));
  FSQ_SM90(
      asm volatile("{ .reg .pred p; setp.ne.u32 p, %6, 0; @p "
                   "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], "
                   "{%1,%2,%3,%4}, [%5]; }" ::"r"(remote),
                   "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(remote_mbarrier), "r"(uint32_t(when)) : "memory"));
}

// Bulk copies by the asynchronous proxy; `bytes` a multiple of 16, addresses 16-byte aligned. The mbarrier, in the CTA
// of the destination, counts the bytes. Data written by ordinary stores needs fence_proxy_async before. The source must
// not change, nor its CTA exit, before the copy is over: a sender knows that of a remote copy only from a barrier or an
// arrival that follows the receiver's wait.
FSQ_PTX void cp_async_bulk_to_remote(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_mbarrier) {
  FSQ_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(remote),
      "r"(shared), "r"(bytes), "r"(remote_mbarrier) : "memory"));
}
FSQ_PTX void cp_async_bulk_to_shared(uint32_t shared, const void* global, uint32_t bytes, uint32_t mbarrier) {
  FSQ_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(mbarrier) : "memory"));
}
// Orders this thread's ordinary accesses to shared memory before later ones of the asynchronous proxy.
FSQ_PTX void fence_proxy_async() { FSQ_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

// One store of 16 bytes, 16-byte aligned. An assignment says as much, but nvcc splits it where several are under way.
FSQ_PTX void st_global_16(void* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Flags in global memory, scope of the GPU.
// T: int32_t, uint32_t, int64_t, uint64_t. What is ordered before a release is seen after the acquire that reads it.

template <class T>
FSQ_PTX T ld_acquire(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return T(value);
  } else {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return T(value);
  }
}
template <class T>
FSQ_PTX T ld_relaxed(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return T(value);
  } else {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return T(value);
  }
}
template <class T>
FSQ_PTX void st_release(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  if constexpr (sizeof(T) == 4)
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(uint32_t(value))
                 : "memory");
  else
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(uint64_t(value))
                 : "memory");
}
template <class T>
FSQ_PTX void st_relaxed(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 4 or 8 bytes");
  if constexpr (sizeof(T) == 4)
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(uint32_t(value))
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(uint64_t(value))
                 : "memory");
}
// *address += value, with a release and no answer.
FSQ_PTX void red_release_add(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
}
// The value before the addition.
FSQ_PTX uint32_t atom_add_acq_rel(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}

FSQ_PTX void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FSQ_PTX void fence_acq_rel_cluster() { FSQ_SM90(asm volatile("fence.acq_rel.cluster;" :: : "memory")); }

// Time, hints, approximations.

FSQ_PTX void nanosleep(uint32_t nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }
// Nanoseconds since some moment; advances in steps of up to a microsecond.
FSQ_PTX uint64_t globaltimer() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}
// Cycles of this SM's clock since some moment.
FSQ_PTX uint64_t clock() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(value)::"memory");
  return value;
}
FSQ_PTX void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}
// 2^x within 2 ulp, subnormal results flushed to 0.
FSQ_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh(x) with a relative error of up to 2^-11: for half types only.
FSQ_PTX float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within 1 ulp, subnormal operands and results flushed to 0.
FSQ_PTX float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ptx
}  // namespace fusedseq

#include "cuda/ptx_hopper.cuh"

#undef FSQ_PTX
#undef FSQ_SM90
#endif  // FSQ_EMULATE
