// ptx_hopper.cuh's functions on the emulator: same names, same signatures.
#pragma once

#include "cuda/matrix.h"
#include "emulator.h"

namespace fusedseq {
namespace ptx {

namespace detail {

template <class R>
emulator::Registers all_of(R& registers) {
  using Element = std::remove_all_extents_t<R>;
  static_assert(std::is_same_v<Element, float> || std::is_same_v<Element, uint32_t>, "registers are float or uint32_t");
  return {static_cast<void*>(&registers), int(sizeof(R) / 4)};
}

template <class T>
constexpr emulator::Product product_of() {
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bf16 || std::is_same_v<T, __half>, "wgmma takes __nv_bfloat16 and __half");
  return bf16 ? emulator::Product::bf16 : emulator::Product::f16;
}

}  // namespace detail

template <class... R>
void wgmma_fence(R&... registers) {
  const emulator::Registers named[] = {detail::all_of(registers)..., {nullptr, 0}};
  emulator::wgmma_fence(named, int(sizeof...(R)));
}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int Pending, class... R>
void wgmma_wait(R&... registers) {
  const emulator::Registers named[] = {detail::all_of(registers)..., {nullptr, 0}};
  emulator::wgmma_wait(Pending, named, int(sizeof...(R)));
}
template <class... R>
void wgmma_keep(bool never, const R&...) {
  if (never) emulator::trap("wgmma_keep(true)");
}

template <int R>
constexpr bool is_wgmma_size = R == 4 || R == 8 || R == 16 || R == 32 || R == 48 || R == 64 || R == 96 || R == 128;

template <class T, Major MajorB = Major::k, Major MajorA = Major::k, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<R>, "wgmma: N is 8, 16, 32, 64, 96, 128, 192 or 256, and d has half as many registers");
  emulator::wgmma({detail::product_of<T>(), 2 * R, MajorA == Major::mn, MajorB == Major::mn}, d, nullptr, a, b,
                  accumulate);
}
template <class T, Major MajorB = Major::k, int R>
void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<R>, "wgmma: N is 8, 16, 32, 64, 96, 128, 192 or 256, and d has half as many registers");
  emulator::wgmma({detail::product_of<T>(), 2 * R, false, MajorB == Major::mn}, d, a, 0, b, accumulate);
}

template <int Rank>
void tensor_load(uint32_t shared, const TensorMap* map, const int (&at)[Rank], uint32_t mbarrier) {
  static_assert(Rank >= 2 && Rank <= 5, "tensor maps have 2 to 5 dimensions");
  emulator::tensor_load(shared, map, at, Rank, mbarrier);
}
template <int Rank>
void tensor_store(const TensorMap* map, const int (&at)[Rank], uint32_t shared) {
  static_assert(Rank >= 2 && Rank <= 5, "tensor maps have 2 to 5 dimensions");
  emulator::tensor_store(map, at, Rank, shared);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int Pending>
void bulk_wait() {
  emulator::bulk_wait(Pending);
}
template <int Pending>
void bulk_wait_read() {
  emulator::bulk_wait(Pending);
}
inline void prefetch_tensor_map(const TensorMap*) {}

template <int N>
void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg: a multiple of 8 from 24 to 256");
  emulator::setmaxnreg(N, false);
}
template <int N>
void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg: a multiple of 8 from 24 to 256");
  emulator::setmaxnreg(N, true);
}

[[noreturn]] inline void abandon() { emulator::trap("abandon()"); }

}  // namespace ptx
}  // namespace fusedseq
