// Threads: one parallel region per call, spin barriers inside it. OpenMP supplies the pool (the one torch uses).
#pragma once
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <sched.h>
#endif

#include "cpu/vec.h"
#include "memory.h"

namespace fusedseq {
namespace FSQ_ISA {

FSQ_INLINE void cpu_pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Reusable barrier. Waiting spins, since a time step is microseconds; a thread that has spun long enough to suspect
// that its peer is not running gives its core away.
struct alignas(64) Barrier {
  int arrived = 0;
  char pad[60];
  int generation = 0;

  void wait(int count) {
    if (count <= 1) return;
    const int seen = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == count) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, seen + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == seen; ++spins) {
      cpu_pause();
      if (spins > 1000) sched_yield();
    }
  }
};

// Calls run(thread, count) on `count` threads, 1 <= count <= threads: the pool may grant fewer than asked.
template <class F>
static void parallel(int threads, F&& run) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  run(0, 1);
}

// Jobs handed out one by one: who gets which changes nothing.
struct Jobs {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part k of n of [0, total), as even as it goes.
FSQ_INLINE Range split(int64_t total, int k, int n) { return {total * k / n, total * (k + 1) / n}; }
FSQ_INLINE int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }
FSQ_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FSQ_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Scratch of one call, in the caller's memory if it has enough. The same code lays it out twice: first to measure
// (every take gives null), then for real.
class Arena {
 public:
  Arena() = default;
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
  Arena(const Arena&) = delete;
  ~Arena() { free(owned_); }
  bool allocate(Scratch* callers = nullptr) {
    const int64_t bytes = used_ + 64;
    if (callers && callers->needed < bytes) callers->needed = bytes;
    if (callers && callers->bytes >= bytes)
      base_ = static_cast<char*>(callers->data);
    else
      base_ = owned_ = allocate_scratch(bytes);
#if defined(__SANITIZE_ADDRESS__)
    if (base_) memset(base_, 0xff, size_t(bytes));  // NaN in every type
#endif
    used_ = 0;
    return base_ != nullptr;
  }
  int64_t used() const { return used_; }
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }

 private:
  char *base_ = nullptr, *owned_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
