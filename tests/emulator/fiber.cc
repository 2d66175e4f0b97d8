#include "fiber.h"

#include <stdint.h>

#if defined(__x86_64__)

// void fsq_switch_fiber(void** save, void* load): the System V ABI asks a function to preserve these six registers
// and the stack pointer. Nobody changes the floating-point control words, so they stay as they are.
asm(R"(
.text
.p2align 4
.type fsq_switch_fiber, @function
fsq_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fsq_switch_fiber, . - fsq_switch_fiber
)");
extern "C" void fsq_switch_fiber(void** save, void* load);

namespace fusedseq {
namespace emulator {

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;                         // where entry would return to; leaves the stack as after a call
  *--slot = reinterpret_cast<void*>(entry);  // popped by ret
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

void switch_fiber(Fiber& from, Fiber& to) { fsq_switch_fiber(&from.stack_pointer, to.stack_pointer); }

}  // namespace emulator
}  // namespace fusedseq

#else

namespace fusedseq {
namespace emulator {

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

}  // namespace emulator
}  // namespace fusedseq

#endif
