// Flags and atomics: what they publish and what reading them makes visible; time.
#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

bool acquires(Order order) { return order == Order::acquire || order == Order::acquire_release; }
bool releases(Order order) { return order == Order::release || order == Order::acquire_release; }

void read(const void* address, Order order) {
  const auto found = machine.flags.find(address);
  if (found == machine.flags.end()) return;
  Thread* me = self();
  if (acquires(order))
    acquire(found->second);
  else
    me->unfenced = join(me->unfenced, found->second);
}

// What a write publishes: of a relaxed one, that which a fence before it has.
ClockRef published(Order order) { return releases(order) ? release() : self()->fenced; }

}  // namespace

void check_flag(const void* address, int bytes, const char* call) {
  if (reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes))
    fail("%s misaligned: %d bytes at %p", call, bytes, address);
}

void flag_read(const void* address, Order order, const char* call) {
  yield_polling(call);
  read(address, order);
}

void flag_write(const void* address, Order order) {
  if (chance(2)) yield_ready();
  machine.flags[address] = published(order);
  progress();
}

void flag_update(const void* address, Order order) {
  if (chance(2)) yield_ready();
  read(address, order);
  ClockRef& flag = machine.flags[address];
  flag = join(flag, published(order));
}

void atomic_done(bool changed, const char* call) {
  if (changed)
    progress();
  else
    yield_polling(call);
}

void fence() {
  Thread* me = self();
  acquire(me->unfenced);
  me->fenced = release();
}

void nanosleep(uint32_t nanoseconds) {
  machine.nanoseconds += nanoseconds;
  yield_polling("nanosleep");
}

uint64_t clock_nanoseconds() {
  machine.clock_read = true;
  return machine.nanoseconds += 20;
}

void trap(const char* call) { fail("%s", call); }

const Index3& current_thread() { return current->index; }
const Index3& current_block() { return self()->block->index; }
const Index3& block_size() { return machine.block_size; }
const Index3& grid_size() { return machine.grid; }
int current_lane() { return self()->lane; }

}  // namespace emulator
}  // namespace fusedseq
