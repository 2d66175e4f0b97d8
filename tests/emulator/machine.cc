#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>

namespace fusedseq {
namespace emulator {

Machine machine;
ThreadView* current = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024, kGuard = 4096;
constexpr int64_t kMaxIdlePreempts = 200000;
constexpr int kMaxTimeJumps = 12;

std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    void* made = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED || mprotect(made, kGuard, PROT_NONE)) {
      fprintf(stderr, "emulator: no memory for the stack of a thread\n");
      abort();
    }
    free_stacks.push_back(static_cast<char*>(made));
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

Index3 unravel(uint32_t linear, const Index3& size) {
  return {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

bool stalled(const Thread* thread) {
  return thread->warp == machine.stalled_warp || thread->block == machine.stalled_block;
}

// From time to time one warp or block is left behind, so that the others run far ahead of it.
void choose_stalled() {
  machine.picks_to_stall = 64 + int(random_below(1024));
  machine.stalled_warp = nullptr;
  machine.stalled_block = nullptr;
  const Thread* victim = machine.ready[random_below(uint32_t(machine.ready.size()))];
  const uint32_t kind = random_below(4);
  if (kind == 0) machine.stalled_block = victim->block;
  if (kind == 1) machine.stalled_warp = victim->warp;
}

Thread* take(std::vector<Thread*>& from, size_t at) {
  Thread* thread = from[at];
  from[at] = from.back();
  from.pop_back();
  return thread;
}

// Only threads that spin are left: once all have looked in vain again and again, only time can help them.
bool spinning_in_vain() {
  if (machine.idle_polls <= 32 * int64_t(machine.polling.size()) + 64) return false;
  if (!machine.clock_read || machine.time_jumps >= kMaxTimeJumps) return true;
  machine.nanoseconds += uint64_t(1000000000) << machine.time_jumps++;
  machine.idle_polls = 0;
  return false;
}

// The next thread to run, or null where none can.
Thread* pick() {
  machine.nanoseconds += 5;
  while (!machine.deliveries.empty() && machine.error.empty() && (machine.ready.empty() || chance(8))) deliver_one();
  if (!machine.error.empty()) return nullptr;
  Thread* next = nullptr;
  if (!machine.ready.empty() && (machine.polling.empty() || !chance(16))) {
    machine.idle_polls = 0;
    if (--machine.picks_to_stall < 0) choose_stalled();
    size_t at = random_below(uint32_t(machine.ready.size()));
    for (int tries = 0; tries < 8 && stalled(machine.ready[at]); ++tries)
      at = random_below(uint32_t(machine.ready.size()));
    next = take(machine.ready, at);
  } else if (!machine.polling.empty()) {
    if (machine.ready.empty() && spinning_in_vain()) return nullptr;
    next = take(machine.polling, random_below(uint32_t(machine.polling.size())));
  } else {
    return nullptr;
  }
  next->state = State::ready;
  return next;
}

void run_others() {
  Thread* me = self();
  Thread* next = pick();
  if (next == me) return;
  current = next;
  switch_fiber(me->fiber, next ? next->fiber : machine.main);
}

void exit_thread() {
  Thread* me = self();
  if (const char* what = unfinished(*me)) fail("this thread exits while %s", what);
  leave_barriers(me);
  me->state = State::exited;
  leave_cluster(me);
  Block* block = me->block;
  if (block->final_clocks.empty() || block->final_clocks.back().get() != me->seen.get())
    block->final_clocks.push_back(me->seen);
  progress();
  if (--block->live == 0) {
    check_block_exit(block);
    if (--block->cluster->live == 0) {
      machine.retired = block->cluster;
      current = nullptr;
      switch_fiber(me->fiber, machine.main);
    }
  }
  run_others();
  abort();  // an exited thread is never picked
}

void thread_main() {
  machine.body(machine.arguments);
  exit_thread();
}

void start_block(Cluster* cluster, uint32_t linear, uint32_t rank) {
  cluster->blocks.emplace_back(new Block);
  Block* block = cluster->blocks.back().get();
  block->linear = linear;
  block->rank = rank;
  block->index = unravel(linear, machine.grid);
  block->cluster = cluster;
  const size_t bytes = (size_t(machine.shared_bytes) + 1023) / 1024 * 1024 + 1024;
  block->shared = static_cast<char*>(aligned_alloc(1024, bytes));
  for (size_t i = 0; i < bytes; i += 4) memcpy(block->shared + i, &kPoison, 4);
  block->shadow.resize(size_t(machine.shared_bytes + 1) / 2);
  block->barriers.resize(16);
  block->live = machine.threads_per_block;
  // As __launch_bounds__(threads, 1) divides them.
  const int registers = std::min(65536 / machine.threads_per_block, 255) / 8 * 8;
  block->free_registers = 65536 / 8 * 8 - registers * machine.threads_per_block;
  block->warpgroups.resize(size_t(machine.threads_per_block + kWarpgroupSize - 1) / kWarpgroupSize);
  for (Warpgroup& group : block->warpgroups) group.registers = registers;
  block->warps.resize(size_t(machine.threads_per_block + int(kWarpSize) - 1) / kWarpSize);
  block->threads.reset(new Thread[size_t(machine.threads_per_block)]);
  for (int i = 0; i < machine.threads_per_block; ++i) {
    Thread& thread = block->threads[size_t(i)];
    thread.index = unravel(uint32_t(i), machine.block_size);
    thread.block = block;
    thread.linear = i;
    thread.lane = i % int(kWarpSize);
    thread.warp = &block->warps[size_t(i) / kWarpSize];
    thread.warp->lanes[thread.lane] = &thread;
    thread.id = linear * kThreadsPerBlock + uint32_t(i);
    thread.stack = take_stack();
    prepare(thread.fiber, thread.stack + kGuard, kStack - kGuard, thread_main);
    machine.ready.push_back(&thread);
  }
}

void start_cluster(uint32_t number) {
  machine.clusters.emplace_back(new Cluster);
  Cluster* cluster = machine.clusters.back().get();
  cluster->live = machine.cluster_size;
  cluster->missing = cluster->threads = machine.cluster_size * machine.threads_per_block;
  for (int rank = 0; rank < machine.cluster_size; ++rank)
    start_block(cluster, number * uint32_t(machine.cluster_size) + uint32_t(rank), uint32_t(rank));
}

void end_cluster(Cluster* cluster) {
  for (auto& block : cluster->blocks) {
    for (int i = 0; i < machine.threads_per_block; ++i) free_stacks.push_back(block->threads[size_t(i)].stack);
    free(block->shared);
  }
  const auto matches = [&](const std::unique_ptr<Cluster>& candidate) { return candidate.get() == cluster; };
  machine.clusters.erase(std::find_if(machine.clusters.begin(), machine.clusters.end(), matches));
}

// Who waits for what, threads of a block that wait for the same in one line.
std::string deadlock() {
  std::string text = "deadlock: no thread can go on.";
  for (auto& cluster : machine.clusters)
    for (auto& block : cluster->blocks) {
      std::map<std::string, std::vector<int>> groups;
      for (int i = 0; i < machine.threads_per_block; ++i) {
        const Thread& thread = block->threads[size_t(i)];
        std::string what = thread.state == State::exited    ? "exited"
                           : thread.state == State::polling ? format("spin on %s", thread.waits_for)
                                                            : format("wait in %s", thread.waits_for);
        if (thread.state == State::blocked && thread.waits_detail >= 0) what += format(" %d", thread.waits_detail);
        groups[what].push_back(i);
      }
      for (const auto& group : groups) {
        text += "\n  block " + describe(block->index) + ", threads";
        const std::vector<int>& members = group.second;
        for (size_t i = 0; i < members.size();) {
          size_t j = i;
          while (j + 1 < members.size() && members[j + 1] == members[j] + 1) ++j;
          text += j > i ? format(" %d-%d", members[i], members[j]) : format(" %d", members[i]);
          i = j + 1;
        }
        text += ": " + group.first;
      }
      if (text.size() > 4000) return text + "\n  ...";
    }
  return text;
}

}  // namespace

uint32_t random_below(uint32_t bound) {
  uint64_t& x = machine.random_state;  // xorshift64*, Vigna 2016
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return uint32_t((x * 0x2545f4914f6cdd1dull >> 32) * bound >> 32);
}

bool chance(uint32_t one_in) { return random_below(one_in) == 0; }

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list list;
  va_start(list, text);
  vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  return buffer;
}

void fail(const char* text, ...) {
  char buffer[2048];
  va_list list;
  va_start(list, text);
  vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  machine.error = describe(*self()) + ": " + buffer;
  Thread* me = self();
  current = nullptr;
  switch_fiber(me->fiber, machine.main);
  abort();  // a launch that failed never continues
}

std::string describe(const Index3& index) { return format("(%u,%u,%u)", index.x, index.y, index.z); }

std::string describe(ThreadId id) {
  if (id & kAgent) return (id & ~kAgent) >> 25 == kTensorCores >> 25 ? "a wgmma" : "an asynchronous copy";
  id &= ~kArrival;
  return "thread " + describe(unravel(id % kThreadsPerBlock, machine.block_size)) + " of block " +
         describe(unravel(id / kThreadsPerBlock, machine.grid));
}
std::string describe(const Thread& thread) { return describe(thread.id); }

void progress() {
  machine.idle_polls = 0;
  machine.idle_preempts = 0;
  machine.time_jumps = 0;
  machine.clock_read = false;
}

void yield_ready() {
  machine.ready.push_back(self());
  if (++machine.idle_preempts > kMaxIdlePreempts)
    fail("livelock: the threads access shared memory on and on, and none reaches a barrier");
  run_others();
}

void yield_polling(const char* call) {
  Thread* me = self();
  me->state = State::polling;
  me->waits_for = call;
  machine.polling.push_back(me);
  ++machine.idle_polls;
  run_others();
}

void wait(const char* call, int detail) {
  Thread* me = self();
  me->state = State::blocked;
  me->waits_for = call;
  me->waits_detail = detail;
  wait_blocked();
}

void wait_blocked() {
  progress();
  run_others();
}

void wake(Thread* thread) {
  if (thread->state != State::blocked) return;
  thread->state = State::ready;
  machine.ready.push_back(thread);
}

void run_grid(size_t capacity) {
  const uint32_t blocks = machine.grid.x * machine.grid.y * machine.grid.z;
  const uint32_t total = blocks / uint32_t(machine.cluster_size);
  for (uint32_t i = 0; i < total; ++i) machine.waiting_clusters.push_back(i);
  for (uint32_t i = total; i > 1; --i)
    std::swap(machine.waiting_clusters[i - 1], machine.waiting_clusters[random_below(i)]);
  while (machine.error.empty()) {
    if (machine.retired) {
      end_cluster(machine.retired);
      machine.retired = nullptr;
    }
    while (machine.clusters.size() < capacity && !machine.waiting_clusters.empty()) {
      start_cluster(machine.waiting_clusters.back());
      machine.waiting_clusters.pop_back();
    }
    if (machine.clusters.empty()) break;
    Thread* next = pick();
    if (!next) {
      if (machine.error.empty()) machine.error = deadlock();
      break;
    }
    current = next;
    switch_fiber(machine.main, next->fiber);
  }
  current = nullptr;
}

void reset() {
  while (!machine.clusters.empty()) end_cluster(machine.clusters.back().get());
  machine.~Machine();
  new (&machine) Machine;
}

}  // namespace emulator
}  // namespace fusedseq
