// Checks of accesses to shared memory, to memory of peers in a cluster and to global memory that blocks exchange.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

constexpr uint32_t kWindow = 1024;  // where shared memory begins in the window; 0 is no address
constexpr int kRankShift = 24;      // a mapped address carries its block's rank + 1 above

// In the middle of a stretch without barriers another thread may run.
void maybe_preempt() {
  if (--machine.accesses_to_preempt > 0) return;
  machine.accesses_to_preempt = 1 + int(random_below(400));
  yield_ready();
}

[[noreturn]] void fail_race(const Record& race, const std::string& memory, const std::string& me, bool write) {
  if (race.id == kMbarrier) fail("an ordinary access to %s, where a live mbarrier lies", memory.c_str());
  fail("race: %s %s %s, which %s has %s, and no barrier orders the two", me.c_str(), write ? "writes" : "reads",
       memory.c_str(), describe(race.id).c_str(), write ? "accessed" : "written");
}

std::string place(const Block* block, uint32_t offset, int bytes) {
  return format("bytes %u to %u of the shared memory of block (%u,%u,%u)", offset, offset + uint32_t(bytes) - 1,
                block->index.x, block->index.y, block->index.z);
}

void note_remote(const Thread& thread, Block* block) {
  if (!knows_block(thread.seen.get(), block->linear))
    fail("an access to the shared memory of block (%u,%u,%u), which may not have started: no cluster barrier before",
         block->index.x, block->index.y, block->index.z);
  block->remote[thread.id] = machine.now;
}

uint32_t own_offset(const void* data, const char* call) {
  const char* base = self()->block->shared;
  const char* at = static_cast<const char*>(data);
  if (at < base || at > base + machine.shared_bytes)
    fail("%s: the pointer is not into this block's shared memory", call);
  return uint32_t(at - base);
}

uint32_t check(const void* data, int size, int i, int element, int bytes, const char* call) {
  if (i < 0 || int64_t(i) * element + bytes > int64_t(size) * element)
    fail("%s out of bounds: %d bytes at element %d of a span of %d elements of %d bytes", call, bytes, i, size,
         element);
  const uint32_t offset = own_offset(data, call) + uint32_t(i * element);
  if (offset + uint32_t(bytes) > uint32_t(machine.shared_bytes))
    fail("%s out of bounds: byte %u of %d bytes of shared memory", call, offset + uint32_t(bytes) - 1,
         machine.shared_bytes);
  if (offset % uint32_t(bytes))
    fail("%s misaligned: %d bytes at byte %u of shared memory (element %d)", call, bytes, offset, i);
  return offset;
}

char* check_global(const void* data, int64_t size, int64_t i, int element, int bytes, bool aligned, const char* call) {
  if (i < 0 || i * element + bytes > size * element)
    fail("%s out of bounds: %d bytes at element %lld of a span of %lld elements of %d bytes", call, bytes, (long long)i,
         (long long)size, element);
  char* at = const_cast<char*>(static_cast<const char*>(data)) + i * element;
  if (aligned && reinterpret_cast<uintptr_t>(at) % uintptr_t(bytes))
    fail("%s misaligned: %d bytes at element %lld, address %p", call, bytes, (long long)i, static_cast<void*>(at));
  return at;
}

void note_global(const void* at, int bytes, bool write) {
  const Thread* me = self();
  const Access access = {me->id, machine.now, me->seen.get(), write, random_below(2)};
  if (const Record* race = machine.global_shadow.note(at, bytes, access))
    fail_race(*race, format("%d bytes of exchanged global memory at %p", bytes, at), "this thread", write);
}

// Whether what `id` did at `stamp` happened before the exit of one of the block's threads, and so of the block.
bool covered_at_exit(const Block& block, bool (*covers)(const Clock*, ThreadId, Stamp), ThreadId id, Stamp stamp) {
  return std::any_of(block.final_clocks.begin(), block.final_clocks.end(),
                     [=](const ClockRef& clock) { return covers(clock.get(), id, stamp); });
}

}  // namespace

bool knows_block(const Clock* clock, uint32_t block) {
  if (!clock) return false;
  const auto any = [](const std::vector<Clock::Entry>& entries, uint32_t first, uint32_t last) {
    for (const Clock::Entry& entry : entries)
      if (entry.id >= first && entry.id < last) return true;
    return false;
  };
  constexpr uint32_t warps = kThreadsPerBlock / kWarpSize;
  return any(clock->blocks, block, block + 1) || any(clock->warps, block * warps, (block + 1) * warps) ||
         any(clock->threads, block * kThreadsPerBlock, (block + 1) * kThreadsPerBlock);
}

void note_shared(const Thread& thread, Block* block, uint32_t offset, int bytes, bool write) {
  const Access access = {thread.id, machine.now, thread.seen.get(), write, random_below(2)};
  if (const Record* race = note(block->shadow.data(), offset, bytes, access))
    fail_race(*race, place(block, offset, bytes), thread.id == self()->id ? "this thread" : describe(thread), write);
}

void note_agent(ThreadId agent, const Thread& issuer, Block* block, uint32_t offset, int bytes, bool write) {
  Access access = {agent, machine.now, issuer.seen.get(), write, random_below(2)};
  access.issuer = issuer.id;
  access.issued = machine.now;
  if (const Record* race = note(block->shadow.data(), offset, bytes, access))
    fail_race(*race, place(block, offset, bytes), describe(agent), write);
}

void note_agent(ThreadId agent, Block* block, uint32_t offset, int bytes, bool write) {
  note_agent(agent, *self(), block, offset, bytes, write);
}

void check_proxy(Block* block, uint32_t offset, uint32_t bytes, const char* call) {
  for (uint32_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    const Record& write = block->shadow[i].write;
    if (!write.bytes || write.id & kAgent || write.id / kThreadsPerBlock != block->linear) continue;
    const Thread& writer = block->threads[write.id % kThreadsPerBlock];
    if (write.stamp >= writer.proxy_fence)
      fail("%s at byte %u of shared memory, which %s wrote without fence_proxy_async after it", call, 2 * i,
           describe(write.id).c_str());
  }
}

ThreadId new_agent() { return kAgent | (0x7ffffff0u - machine.agents++); }
ThreadId tensor_core(const Thread& thread) { return kAgent | kTensorCores | thread.id / kWarpSize; }

char* shared_base() { return self()->block->shared; }

const void* shared_read(const void* data, int size, int i, int element, int bytes) {
  const uint32_t offset = check(data, size, i, element, bytes, "shared load");
  maybe_preempt();
  note_shared(*self(), self()->block, offset, bytes, false);
  return self()->block->shared + offset;
}

void* shared_write(void* data, int size, int i, int element, int bytes) {
  const uint32_t offset = check(data, size, i, element, bytes, "shared store");
  maybe_preempt();
  note_shared(*self(), self()->block, offset, bytes, true);
  return self()->block->shared + offset;
}

void* shared_atomic(void* data, int size, int i, int element) {
  const uint32_t offset = check(data, size, i, element, element, "shared atomic");
  maybe_preempt();
  const Thread* me = self();
  Access access = {me->id, machine.now, me->seen.get(), true, random_below(2)};
  access.atomic = true;
  if (const Record* race = note(me->block->shadow.data(), offset, element, access))
    fail_race(*race, place(me->block, offset, element), "this thread", true);
  return me->block->shared + offset;
}

uint32_t shared_window_address(const void* data, int size, int i, int element) {
  if (i < 0 || i >= size) fail("address out of bounds: element %d of a span of %d elements", i, size);
  return kWindow + own_offset(data, "address") + uint32_t(i * element);
}

uint32_t shared_window_address(const void* pointer) { return kWindow + own_offset(pointer, "shared_address"); }

void check_sub(int size, int first, int count) {
  if (first < 0 || count < 0 || first + count > size)
    fail("elements %d to %d of a span of %d elements", first, first + count, size);
}

const void* global_read(const void* data, int64_t size, int64_t i, int element, int bytes) {
  const char* at = check_global(data, size, i, element, bytes, bytes <= 16, "exchange load");
  maybe_preempt();
  note_global(at, bytes, false);
  return at;
}

void* global_write(void* data, int64_t size, int64_t i, int element, int bytes) {
  char* at = check_global(data, size, i, element, bytes, true, "exchange store");
  maybe_preempt();
  note_global(at, bytes, true);
  return at;
}

Target resolve(uint32_t address, int bytes, int align, const char* call) {
  const uint32_t rank = address >> kRankShift, at = address & ((1u << kRankShift) - 1);
  Thread* me = self();
  if (rank > uint32_t(machine.cluster_size)) fail("%s: 0x%08x is no address of shared memory", call, address);
  Block* block = rank ? me->block->cluster->blocks[rank - 1].get() : me->block;
  if (at < kWindow || at - kWindow + uint32_t(bytes) > uint32_t(machine.shared_bytes))
    fail("%s out of bounds: %d bytes at byte %d of %d bytes of shared memory", call, bytes, int(at) - int(kWindow),
         machine.shared_bytes);
  if (at % uint32_t(align))
    fail("%s misaligned: byte %u of shared memory must be a multiple of %d", call, at - kWindow, align);
  if (block->live == 0)
    fail("%s: block (%u,%u,%u), whose shared memory this is, has exited", call, block->index.x, block->index.y,
         block->index.z);
  return {block, at - kWindow};
}

uint32_t mapa(uint32_t address, uint32_t rank) {
  const Target target = resolve(address, 1, 1, "mapa");
  if (rank >= uint32_t(machine.cluster_size)) fail("mapa: rank %u in a cluster of %d", rank, machine.cluster_size);
  return ((rank + 1) << kRankShift) | (target.offset + kWindow);
}

void remote_read(void* value, uint32_t address, int bytes) {
  maybe_preempt();
  const Target target = resolve(address, bytes, bytes, "ld.shared::cluster");
  if (target.block != self()->block) note_remote(*self(), target.block);
  note_shared(*self(), target.block, target.offset, bytes, false);
  memcpy(value, target.data(), size_t(bytes));
}

void remote_write(uint32_t address, const void* value, int bytes) {
  maybe_preempt();
  const Target target = resolve(address, bytes, bytes, "st.shared::cluster");
  if (target.block != self()->block) note_remote(*self(), target.block);
  note_shared(*self(), target.block, target.offset, bytes, true);
  memcpy(target.data(), value, size_t(bytes));
}

// The threads' clocks as they exited decide, not whether a copy happens to be over: the hardware owes nobody its speed.
// A copy is over, at either end, for those who waited for the mbarrier that counts it, and for whom they told.
void check_block_exit(Block* block) {
  for (const Delivery& delivery : machine.deliveries) {
    if (delivery.block == block) fail("the block exits while an asynchronous copy into its shared memory is under way");
    if (delivery.from == block)
      fail("the block exits while a bulk copy out of its shared memory, which %s sent to block %s, is under way",
           describe(delivery.issuer).c_str(), describe(delivery.block->index).c_str());
  }
  for (const Mbarrier& barrier : block->mbarriers)
    if (barrier.bytes > 0)
      fail("the block exits while its mbarrier at byte %u of the shared memory expects %lld bytes that have not come",
           barrier.offset, (long long)barrier.bytes);
  for (const auto& access : block->remote) {
    if (covered_at_exit(*block, covers, access.first, access.second)) continue;
    if (access.first & kAgent)
      fail("the block exits without having waited for an asynchronous copy into its shared memory");
    fail(
        "the block exits while a peer may still access its shared memory: no barrier orders the access of %s before "
        "the exit",
        describe(access.first).c_str());
  }
  for (const auto& copy : block->sent)
    if (!covered_at_exit(*block, covers_read, copy.first, copy.second.arrived))
      fail(
          "the block exits while a bulk copy may still read its shared memory: no barrier orders the receipt of what "
          "%s "
          "sent to block %s before the exit",
          describe(copy.second.issuer).c_str(), describe(copy.second.to->index).c_str());
}

}  // namespace emulator
}  // namespace fusedseq
