#include "fiber.h"

#include <stdint.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedseq {
namespace emulator {

namespace {

Fiber *leaving = nullptr, *entering = nullptr;

void before_switch(Fiber& from, Fiber& to) {
  leaving = &from;
  entering = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.sanitizer_stack, to.stack, to.stack_bytes);
#endif
}

// On the stack that was entered.
void after_switch() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(entering->sanitizer_stack, &leaving->stack, &leaving->stack_bytes);
#endif
}

void first_entry() {
  after_switch();
  entering->entry();
}

void describe_stack(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  fiber.entry = entry;
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.sanitizer_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, bytes);  // a fiber that was abandoned has left its marks
#endif
}

}  // namespace

}  // namespace emulator
}  // namespace fusedseq

#if defined(__x86_64__) && defined(__ELF__)

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
  describe_stack(fiber, stack, bytes, entry);
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;                               // where first_entry would return to; as after a call
  *--slot = reinterpret_cast<void*>(first_entry);  // popped by ret
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

void switch_fiber(Fiber& from, Fiber& to) {
  before_switch(from, to);
  fsq_switch_fiber(&from.stack_pointer, to.stack_pointer);
  after_switch();
}

}  // namespace emulator
}  // namespace fusedseq

#else

namespace fusedseq {
namespace emulator {

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  describe_stack(fiber, stack, bytes, entry);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first_entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) {
  before_switch(from, to);
  swapcontext(&from.context, &to.context);
  after_switch();
}

}  // namespace emulator
}  // namespace fusedseq

#endif
