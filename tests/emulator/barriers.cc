// Barriers of a warp, of a block and of a cluster.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

// What all these threads know; threads that passed the last barrier together share one clock.
ClockRef join_seen(const std::vector<Thread*>& threads) {
  ClockRef joined;
  const Clock* last = nullptr;
  for (const Thread* thread : threads) {
    if (thread->seen.get() == last) continue;
    joined = join(joined, thread->seen);
    last = thread->seen.get();
  }
  return joined;
}

// `clock` and all that these threads of one block, which wait, did so far.
ClockRef with_threads(ClockRef clock, const std::vector<Thread*>& threads, Stamp stamp) {
  std::vector<uint32_t> lanes(threads.empty() ? 0 : threads[0]->block->warps.size());
  for (const Thread* thread : threads) lanes[size_t(thread->linear) / kWarpSize] |= 1u << thread->lane;
  for (const Thread* thread : threads) {
    const bool whole = lanes[size_t(thread->linear) / kWarpSize] == 0xffffffffu;
    if (!whole)
      clock = with_thread(clock, thread->id, stamp);
    else if (thread->lane == 0)
      clock = with_warp(clock, thread->id / kWarpSize, stamp);
  }
  return clock;
}

void complete(Block* block, Barrier& barrier) {
  ClockRef clock = barrier.published.take(join_seen(barrier.waiting));
  if (int(barrier.waiting.size()) == machine.threads_per_block)
    clock = with_blocks(clock, {block->linear}, machine.now);
  else
    clock = with_threads(clock, barrier.waiting, machine.now);
  ++machine.now;
  barrier.vote_result = barrier.votes;
  for (Thread* thread : barrier.waiting) {
    thread->seen = clock;
    wake(thread);
  }
  barrier.waiting.clear();
  barrier.arrived.clear();
  barrier.votes = 0;
  barrier.aligned_block = false;
  barrier.expected = 0;
  progress();
}

const char* barrier_name(bool aligned_block, bool waits) {
  return aligned_block ? "__syncthreads" : waits ? "barrier_sync" : "barrier_arrive";
}

void arrive(int id, int threads, bool aligned_block, bool waits, bool vote) {
  Thread* me = self();
  Block* block = me->block;
  const char* call = barrier_name(aligned_block, waits);
  if (id < 0 || id > 15) fail("%s: barrier %d; there are 0 to 15", call, id);
  if (threads < 1 || threads > machine.threads_per_block || (!aligned_block && threads % int(kWarpSize)))
    fail("%s %d: %d threads; must be a multiple of 32, at most the block's %d", call, id, threads,
         machine.threads_per_block);
  if (aligned_block && block->live < machine.threads_per_block)
    fail("divergent __syncthreads: %d threads of the block have exited", machine.threads_per_block - block->live);
  Barrier& barrier = block->barriers[size_t(id)];
  if (barrier.expected && barrier.expected != threads)
    fail("%s %d of %d threads, while others wait there for %d", call, id, threads, barrier.expected);
  barrier.expected = threads;
  barrier.aligned_block |= aligned_block;
  barrier.votes += vote;
  if (waits) {
    barrier.waiting.push_back(me);
  } else {
    if (std::find(barrier.arrived.begin(), barrier.arrived.end(), me->id) != barrier.arrived.end())
      fail("barrier_arrive %d: this thread has arrived already, and the barrier is not over", id);
    barrier.arrived.push_back(me->id);
    barrier.published.add(me->seen, me->id, machine.now++);
  }
  const bool last = int(barrier.waiting.size() + barrier.arrived.size()) == threads;
  if (waits) {
    me->state = State::blocked;
    me->waits_for = call;
    me->waits_detail = aligned_block ? -1 : id;
  }
  if (last) complete(block, barrier);
  if (waits) wait_blocked();
}

// Whether the thread has done nothing since it arrived and published: it waits, or is the one that arrived just now.
bool at_arrival(const Thread& thread) {
  return thread.cluster_publishes &&
         (&thread == self() || (thread.state == State::blocked && thread.waits_for == kClusterWait));
}

void complete_cluster(Cluster* cluster) {
  const Stamp stamp = machine.now++;
  ClockRef clock;
  Publication published;
  std::vector<uint32_t> whole, all;
  for (auto& block : cluster->blocks) {
    Thread* const threads = block->threads.get();
    Thread* const end = threads + machine.threads_per_block;
    all.push_back(block->linear);
    const bool together = std::all_of(threads, end, at_arrival);
    if (together) whole.push_back(block->linear);
    for (Thread* thread = threads; thread != end; ++thread) {
      if (together)
        clock = join(clock, thread->seen);
      else if (thread->cluster_publishes)
        published.add(thread->cluster_seen, thread->id, thread->cluster_stamp);
      else
        clock = join(clock, thread->cluster_seen);
      thread->cluster_publishes = false;
      thread->cluster_seen = ClockRef();
    }
  }
  clock = published.take(clock);
  cluster->joined = with_started(with_blocks(clock, whole, stamp), all);
  ++cluster->phase;
  cluster->missing = cluster->threads;
  for (Thread* thread : cluster->waiting) wake(thread);
  cluster->waiting.clear();
  progress();
}

}  // namespace

ClockRef release() {
  Thread* me = self();
  return with_thread(me->seen, me->id, machine.now++);
}

void acquire(const ClockRef& clock) { self()->seen = join(self()->seen, clock); }

void sync_block() { arrive(0, machine.threads_per_block, true, true, false); }

int sync_block_count(bool predicate) {
  arrive(0, machine.threads_per_block, true, true, predicate);
  return self()->block->barriers[0].vote_result;
}

void barrier(int id, int threads, bool waits) { arrive(id, threads, false, waits, false); }

void sync_warp(uint32_t mask) {
  Thread* me = self();
  meet("__syncwarp", mask, me, [](void** lanes, uint32_t) {
    std::vector<Thread*> threads;
    for (uint32_t lane = 0; lane < kWarpSize; ++lane)
      if (lanes[lane]) threads.push_back(static_cast<Thread*>(lanes[lane]));
    const ClockRef clock = with_threads(join_seen(threads), threads, machine.now);
    ++machine.now;
    for (Thread* thread : threads) thread->seen = clock;
  });
}

void leave_barriers(Thread* thread) {
  for (size_t id = 0; id < thread->block->barriers.size(); ++id) {
    const Barrier& barrier = thread->block->barriers[id];
    if (barrier.aligned_block && !barrier.waiting.empty())
      fail("divergent __syncthreads: this thread exits while %zu threads wait there, %s among them",
           barrier.waiting.size(), describe(*barrier.waiting[0]).c_str());
  }
  for (const Meeting& meeting : thread->warp->meetings)
    if (meeting.mask >> thread->lane & 1)
      fail("this thread exits while lanes 0x%08x of its warp wait for it in %s", meeting.arrived, meeting.kind);
  const Warpgroup& group = thread->block->warpgroups[size_t(thread->linear) / kWarpgroupSize];
  if (group.arrived)
    fail("this thread exits while %d threads of its warpgroup wait for it in %s", group.arrived, group.kind);
}

void cluster_arrive(bool publishes) {
  Thread* me = self();
  Cluster* cluster = me->block->cluster;
  if (me->cluster_arrival) fail("cluster_arrive: this thread has arrived already and not waited");
  me->cluster_arrival = cluster->phase + 1;
  me->cluster_publishes = publishes;
  me->cluster_seen = publishes ? me->seen : me->fenced;
  me->cluster_stamp = machine.now++;
  if (--cluster->missing == 0) complete_cluster(cluster);
}

void cluster_wait() {
  Thread* me = self();
  Cluster* cluster = me->block->cluster;
  if (!me->cluster_arrival) fail("cluster_wait: this thread has not arrived");
  if (cluster->phase < me->cluster_arrival) {
    cluster->waiting.push_back(me);
    wait(kClusterWait);
  } else if (chance(2)) {
    yield_ready();
  }
  // The next phase cannot end before this thread arrives for it.
  me->cluster_arrival = 0;
  acquire(cluster->joined);
}

void leave_cluster(Thread* thread) {
  Cluster* cluster = thread->block->cluster;
  --cluster->threads;
  if (thread->cluster_arrival != cluster->phase + 1 && --cluster->missing == 0 && cluster->threads)
    complete_cluster(cluster);
}

uint32_t cluster_rank() { return self()->block->rank; }
uint32_t cluster_size() { return uint32_t(machine.cluster_size); }

}  // namespace emulator
}  // namespace fusedseq
