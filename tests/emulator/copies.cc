// cp.async: copies of one thread, from global to shared memory, that it waits for group by group.
#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

void take(PendingCopy& copy) {
  memset(copy.data, 0, sizeof copy.data);
  memcpy(copy.data, copy.source, size_t(copy.valid));
  copy.taken = true;
}

// A thread's copies are one agent, for they finish in the order of its groups.
ThreadId agent_of(const Thread* thread) { return kAgent | thread->id; }

void finish(std::vector<PendingCopy>& group) {
  Thread* me = self();
  const ClockRef before = me->seen;
  me->seen = with_thread(before, agent_of(me), machine.now);
  for (PendingCopy& copy : group) {
    if (!copy.taken) take(copy);
    note_shared(*me, copy.block, copy.offset, copy.bytes, true);
    memcpy(copy.block->shared + copy.offset, copy.data, size_t(copy.bytes));
  }
  me->seen = before;
}

}  // namespace

void cp_async(uint32_t address, const void* source, int bytes, int valid) {
  const Target to = resolve(address, bytes, bytes, "cp_async");
  Thread* me = self();
  if (to.block != me->block) fail("cp_async: the destination lies in another block");
  if (valid < 0 || valid > bytes) fail("cp_async: %d valid bytes of %d", valid, bytes);
  if (reinterpret_cast<uintptr_t>(source) % uintptr_t(bytes))
    fail("cp_async misaligned: the source %p must be a multiple of %d", source, bytes);
  note_agent(agent_of(me), to.block, to.offset, bytes, true);
  ++machine.now;
  for (int i = 0; i < bytes; i += 4) memcpy(to.data() + i, &kPoison, 4);
  PendingCopy copy = {to.block, to.offset, source, bytes, valid, false, {}};
  if (chance(2)) take(copy);
  me->open_copies.push_back(copy);
}

void cp_async_commit() {
  Thread* me = self();
  me->copy_groups.push_back(std::move(me->open_copies));
  me->open_copies.clear();
}

void cp_async_wait(int pending) {
  Thread* me = self();
  auto& groups = me->copy_groups;
  if (int(groups.size()) <= pending) return;
  const size_t count = groups.size() - size_t(pending);
  for (size_t i = 0; i < count; ++i) finish(groups[i]);
  groups.erase(groups.begin(), groups.begin() + long(count));
  if (chance(8)) yield_ready();
}

}  // namespace emulator
}  // namespace fusedseq
