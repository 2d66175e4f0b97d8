// Fibers: user-space threads of control that run on the OS thread which switches to them.
#pragma once

#include <stddef.h>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif

namespace fusedseq {
namespace emulator {

// A suspended flow of control. One that was not prepared is the OS thread's own.
struct Fiber {
#if defined(__x86_64__) && defined(__ELF__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void (*entry)() = nullptr;
  // For AddressSanitizer, which must know on which stack it is.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer_stack = nullptr;
};

// Prepares `fiber` to call entry() on the given stack, of `bytes` bytes from `stack`; entry must not return.
void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Suspends the running flow into `from` and continues `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulator
}  // namespace fusedseq
