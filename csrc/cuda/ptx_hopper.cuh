// The PTX instructions that only Hopper has: wgmma, tensor copies, register budgets of a warpgroup. Part of ptx.cuh,
// which includes it; semantics: PTX ISA 9.0, section 9.7.15 for wgmma.
//
// wgmma runs beside the threads, so registers need as much care as memory. An array of registers that a wgmma uses is
// named to wgmma_fence before, and accumulators to the wgmma_wait that hands them back; in between nobody may touch
// them, operands included. On a device that keeps the compiler from moving accesses across; the emulator finds those
// that are there.
#pragma once

#include <type_traits>

#include "cuda/matrix.h"

// wgmma and setmaxnreg are of sm_90a, not of all that follows.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FSQ_SM90A(...) __VA_ARGS__
#else
#define FSQ_SM90A(...) __trap()
#endif

namespace fusedseq {
namespace ptx {

namespace detail {

// The compiler must have these registers (float or uint32_t, or arrays of such) written before and read after this
// point.
template <class R>
FSQ_PTX void pin(R& registers) {
  if constexpr (std::is_array_v<R>) {
#pragma unroll
    for (int i = 0; i < int(std::extent_v<R>); ++i) pin(registers[i]);
  } else if constexpr (std::is_same_v<R, float>) {
    asm volatile("" : "+f"(registers)::"memory");
  } else {
    static_assert(std::is_same_v<R, uint32_t>, "registers are float or uint32_t");
    asm volatile("" : "+r"(registers)::"memory");
  }
}

// An instruction that reads these registers.
template <class R>
FSQ_PTX void touch(const R& registers) {
  if constexpr (std::is_array_v<R>) {
#pragma unroll
    for (int i = 0; i < int(std::extent_v<R>); ++i) touch(registers[i]);
  } else {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(uint64_t(0)), "r"(registers) : "memory");
  }
}

}  // namespace detail

// Orders this thread's accesses to these registers before the wgmma that follow: before the first one, and whenever the
// thread has read or written registers that the next one uses. All lanes of the warp. sm_90a
template <class... R>
FSQ_PTX void wgmma_fence(R&... registers) {
  (detail::pin(registers), ...);
  FSQ_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
// Makes a group of the wgmma that the warp has issued since the last one. sm_90a
FSQ_PTX void wgmma_commit() { FSQ_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }
// Waits until at most `Pending` groups of the warp are unfinished, and hands back the registers of those that are.
// sm_90a
template <int Pending, class... R>
FSQ_PTX void wgmma_wait(R&... registers) {
  FSQ_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"));
  (detail::pin(registers), ...);
}

// Keeps registers that hold A from one turn of a loop to the next: a use of them behind everything that the turn
// issues. nvcc 13.0 else gives them away after their wgmma of the first turn, to the operands of another wgmma of the
// loop, and the second turn multiplies those. `never` is false where this is called, and the compiler must not know.
template <class... R>
FSQ_PTX void wgmma_keep(bool never, const R&... registers) {
  if (never) (detail::touch(registers), ...);
}

// The instruction names registers and operands by number: lists of numbers and registers for R accumulators, and one
// row a size with the numbers that follow them, of which the two forms take what they need.
#define FSQ_LIST4 "%0,%1,%2,%3"
#define FSQ_LIST8 \
  FSQ_LIST4       \
  ","             \
  "%4,%5,%6,%7"
#define FSQ_LIST16 \
  FSQ_LIST8        \
  ","              \
  "%8,%9,%10,%11,%12,%13,%14,%15"
#define FSQ_LIST32 \
  FSQ_LIST16       \
  ","              \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FSQ_LIST48 \
  FSQ_LIST32       \
  ","              \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FSQ_LIST64 \
  FSQ_LIST48       \
  ","              \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FSQ_LIST96                                                   \
  FSQ_LIST64                                                         \
  ","                                                                \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FSQ_LIST128                                                              \
  FSQ_LIST96                                                                     \
  ","                                                                            \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FSQ_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FSQ_F8(i) FSQ_F4(i), FSQ_F4(i + 4)
#define FSQ_F16(i) FSQ_F8(i), FSQ_F8(i + 8)
#define FSQ_F32(i) FSQ_F16(i), FSQ_F16(i + 16)
#define FSQ_F64(i) FSQ_F32(i), FSQ_F32(i + 32)
#define FSQ_REGISTERS4 FSQ_F4(0)
#define FSQ_REGISTERS8 FSQ_F8(0)
#define FSQ_REGISTERS16 FSQ_F16(0)
#define FSQ_REGISTERS32 FSQ_F32(0)
#define FSQ_REGISTERS48 FSQ_F32(0), FSQ_F16(32)
#define FSQ_REGISTERS64 FSQ_F64(0)
#define FSQ_REGISTERS96 FSQ_F64(0), FSQ_F32(64)
#define FSQ_REGISTERS128 FSQ_F64(0), FSQ_F64(64)
#define FSQ_WGMMA(N, R, TYPE, A, B, P, TAIL, ...)                                                                \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" FSQ_LIST##R "}, " A ", %" #B ", p, 1, 1, " TAIL "; }"                               \
               : FSQ_REGISTERS##R                                                                                \
               : __VA_ARGS__                                                                                     \
               : "memory");
#define FSQ_SHARED_FORM(TYPE, N, R, n0, n1, n2, n3, n4, n5, n6)                                                     \
  FSQ_WGMMA(N, R, TYPE, "%" #n0, n1, n2, "%" #n3 ", %" #n4, "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(MajorA)), \
            "n"(int(MajorB)))
#define FSQ_REGISTER_FORM(TYPE, N, R, n0, n1, n2, n3, n4, n5, n6)                                                  \
  FSQ_WGMMA(N, R, TYPE, "{%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 "}", n4, n5, "%" #n6, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
            "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(MajorB)))
#define FSQ_SHARED_BF16(N, R, ...) FSQ_SHARED_FORM("bf16", N, R, __VA_ARGS__)
#define FSQ_SHARED_F16(N, R, ...) FSQ_SHARED_FORM("f16", N, R, __VA_ARGS__)
#define FSQ_REGISTER_BF16(N, R, ...) FSQ_REGISTER_FORM("bf16", N, R, __VA_ARGS__)
#define FSQ_REGISTER_F16(N, R, ...) FSQ_REGISTER_FORM("f16", N, R, __VA_ARGS__)
#define FSQ_EACH_SIZE(FORM)                                           \
  if constexpr (R == 4) FORM(8, 4, 4, 5, 6, 7, 8, 9, 10)              \
  if constexpr (R == 8) FORM(16, 8, 8, 9, 10, 11, 12, 13, 14)         \
  if constexpr (R == 16) FORM(32, 16, 16, 17, 18, 19, 20, 21, 22)     \
  if constexpr (R == 32) FORM(64, 32, 32, 33, 34, 35, 36, 37, 38)     \
  if constexpr (R == 48) FORM(96, 48, 48, 49, 50, 51, 52, 53, 54)     \
  if constexpr (R == 64) FORM(128, 64, 64, 65, 66, 67, 68, 69, 70)    \
  if constexpr (R == 96) FORM(192, 96, 96, 97, 98, 99, 100, 101, 102) \
  if constexpr (R == 128) FORM(256, 128, 128, 129, 130, 131, 132, 133, 134)

template <int R>
constexpr bool is_wgmma_size = R == 4 || R == 8 || R == 16 || R == 32 || R == 48 || R == 64 || R == 96 || R == 128;

// D[64,N] = A[64,16] B[16,N] (+ D if `accumulate`), N = 2 R, float32 sums, by the four warps of a warpgroup: 128
// threads that begin at a multiple of 128. T: __nv_bfloat16 or __half. `a`, `b`: matrix_descriptor of operands in
// shared memory, the same in all threads. With g = lane / 4, t = lane % 4 and w the warp's number in the group:
//   d[4 j + i] = D[16 w + g + 8 (i / 2)][8 j + 2 t + i % 2]. sm_90a
template <class T, Major MajorB = Major::k, Major MajorA = Major::k, int R>
FSQ_PTX void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<R>, "wgmma: N is 8, 16, 32, 64, 96, 128, 192 or 256, and d has half as many registers");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FSQ_EACH_SIZE(FSQ_SHARED_BF16)
  } else {
    static_assert(std::is_same_v<T, __half>, "wgmma takes __nv_bfloat16 and __half");
    FSQ_EACH_SIZE(FSQ_SHARED_F16)
  }
#else
  __trap();
#endif
}
// The same with A in registers, as mma_m16n8k16 has it, of the rows 16 w .. 16 w + 15. sm_90a
template <class T, Major MajorB = Major::k, int R>
FSQ_PTX void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<R>, "wgmma: N is 8, 16, 32, 64, 96, 128, 192 or 256, and d has half as many registers");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FSQ_EACH_SIZE(FSQ_REGISTER_BF16)
  } else {
    static_assert(std::is_same_v<T, __half>, "wgmma takes __nv_bfloat16 and __half");
    FSQ_EACH_SIZE(FSQ_REGISTER_F16)
  }
#else
  __trap();
#endif
}

#undef FSQ_EACH_SIZE
#undef FSQ_WGMMA
#undef FSQ_SHARED_FORM
#undef FSQ_REGISTER_FORM
#undef FSQ_SHARED_BF16
#undef FSQ_SHARED_F16
#undef FSQ_REGISTER_BF16
#undef FSQ_REGISTER_F16
#undef FSQ_F4
#undef FSQ_F8
#undef FSQ_F16
#undef FSQ_F32
#undef FSQ_F64
#undef FSQ_LIST4
#undef FSQ_LIST8
#undef FSQ_LIST16
#undef FSQ_LIST32
#undef FSQ_LIST48
#undef FSQ_LIST64
#undef FSQ_LIST96
#undef FSQ_LIST128
#undef FSQ_REGISTERS4
#undef FSQ_REGISTERS8
#undef FSQ_REGISTERS16
#undef FSQ_REGISTERS32
#undef FSQ_REGISTERS48
#undef FSQ_REGISTERS64
#undef FSQ_REGISTERS96
#undef FSQ_REGISTERS128

// Tensor copies: the box of a tensor map whose first element has the coordinates `at`, innermost first; they may lie
// outside of the tensor. One thread issues them.

// To shared memory, 128-byte aligned, row after row (swizzled as the map says), zeros for what lies outside. The
// mbarrier counts the bytes of the whole box. sm_90
template <int Rank>
FSQ_PTX void tensor_load(uint32_t shared, const TensorMap* map, const int (&at)[Rank], uint32_t mbarrier) {
  static_assert(Rank >= 2 && Rank <= 5, "tensor maps have 2 to 5 dimensions");
  const uint64_t from = reinterpret_cast<uint64_t>(map);
  if constexpr (Rank == 2)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2,%3}], [%4];" ::"r"(shared),
                     "l"(from), "r"(at[0]), "r"(at[1]), "r"(mbarrier) : "memory"));
  if constexpr (Rank == 3)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2,%3,%4}], [%5];" ::"r"(shared),
                     "l"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(mbarrier) : "memory"));
  if constexpr (Rank == 4)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2,%3,%4,%5}], [%6];" ::"r"(shared),
                     "l"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(mbarrier) : "memory"));
  if constexpr (Rank == 5)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2,%3,%4,%5,%6}], [%7];" ::"r"(shared),
                     "l"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(mbarrier) : "memory"));
}
// From shared memory; what lies outside is left out. The thread commits and waits as below. sm_90
template <int Rank>
FSQ_PTX void tensor_store(const TensorMap* map, const int (&at)[Rank], uint32_t shared) {
  static_assert(Rank >= 2 && Rank <= 5, "tensor maps have 2 to 5 dimensions");
  const uint64_t to = reinterpret_cast<uint64_t>(map);
  if constexpr (Rank == 2)
    FSQ_SM90(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1,%2}], [%3];" ::"l"(to),
                          "r"(at[0]), "r"(at[1]), "r"(shared) : "memory"));
  if constexpr (Rank == 3)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1,%2,%3}], [%4];" ::"l"(to),
                     "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared) : "memory"));
  if constexpr (Rank == 4)
    FSQ_SM90(
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1,%2,%3,%4}], [%5];" ::"l"(to),
                     "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared) : "memory"));
  if constexpr (Rank == 5)
    FSQ_SM90(asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%1,%2,%3,%4,%5}], [%6];" ::"l"(to),
        "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(shared) : "memory"));
}
// Makes a group of this thread's tensor_store since the last one. sm_90
FSQ_PTX void bulk_commit() { FSQ_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory")); }
// Waits until at most `Pending` of this thread's groups still write; _read: still read shared memory. Before the block
// leaves, it must have waited for the reads. sm_90
template <int Pending>
FSQ_PTX void bulk_wait() {
  FSQ_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory"));
}
template <int Pending>
FSQ_PTX void bulk_wait_read() {
  FSQ_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory"));
}
FSQ_PTX void prefetch_tensor_map(const TensorMap* map) {
  FSQ_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory"));
}

// The registers of each thread of a warpgroup become N, a multiple of 8 from 24 to 256; a kernel that does so has the
// bounds __launch_bounds__(threads, 1). `dec` gives up registers, `inc` waits until the block has given up enough.
// sm_90a
template <int N>
FSQ_PTX void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg: a multiple of 8 from 24 to 256");
  FSQ_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N>
FSQ_PTX void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg: a multiple of 8 from 24 to 256");
  FSQ_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}

// Ends the launch in an error, by a store that no address takes. A trap would do the same, but in a kernel that has one
// ptxas gives no thread more registers than it begins with, whatever setmaxnreg says.
FSQ_PTX void abandon() { asm volatile("st.global.u32 [%0], %1;" ::"l"(uint64_t(0)), "r"(0) : "memory"); }

}  // namespace ptx
}  // namespace fusedseq

#undef FSQ_SM90A
