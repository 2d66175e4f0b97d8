// Fibers: user-space threads of control that run on the OS thread which switches to them.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fusedseq {
namespace emulator {

// A suspended flow of control.
struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Prepares `fiber` to call entry() on the given stack, of `bytes` bytes from `stack`; entry must not return.
void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Suspends the running flow into `from` and continues `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulator
}  // namespace fusedseq
