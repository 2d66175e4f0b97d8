// The emulated GPU from the inside: threads, warps, blocks, clusters and the scheduler. What the stand-in headers call
// is emulator.h.
#pragma once

#include <stdint.h>

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "order.h"
#include "settings.h"
#include "shadow.h"

namespace fusedseq {
namespace emulator {

struct Block;
struct Cluster;
struct Warp;

constexpr const char* kClusterWait = "cluster_wait";
constexpr int kWarpgroupSize = 128;
constexpr uint32_t kPoison = 0x7fff7fffu;  // NaN as float32, float64, bfloat16 and float16; a large integer

enum class State { ready, polling, blocked, exited };

// One cp.async of a thread that has not been waited for.
struct PendingCopy {
  Block* block;
  uint32_t offset;
  const void* source;
  int bytes, valid;
  bool taken;  // the source has been read
  unsigned char data[16];
};

// One tensor_store of a thread that has not been waited for: bytes [offset, offset + bytes) to where `write` puts them.
struct PendingStore {
  uint32_t offset, bytes;
  std::function<void(const unsigned char*)> write;
};
struct StoreGroup {
  std::vector<PendingStore> stores;
  Stamp stamp;  // when it was committed
};

// A thread's use of wgmma. They are numbered; a group is all up to the number of its last.
struct Products {
  // Registers that a wgmma_fence named, as they were then.
  struct Fenced {
    const char* data;
    std::vector<char> was;
    uint64_t fence;
  };
  // Accumulators in flight: the register array is poisoned, its values are here.
  struct Flight {
    float* d;
    std::vector<float> sums;
    uint64_t last;  // wgmma that adds to them
  };
  // Registers that hold A of a wgmma in flight.
  struct Operand {
    const uint32_t* a;
    uint32_t was[4];
    uint64_t last;
  };
  struct Returned {
    const char* data;
    size_t bytes;
    uint64_t fence;
  };
  struct Group {
    uint64_t last;
    ClockRef clock;  // of what the tensor cores did
  };
  uint64_t issued = 0, committed = 0, fences = 0;
  std::vector<Fenced> fenced;
  std::vector<Returned> returned;
  std::vector<std::unique_ptr<Flight>> flights;
  std::vector<Operand> operands;
  std::vector<Group> groups;  // committed and not waited for
};

struct Thread : ThreadView {
  Fiber fiber;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  ThreadId id = 0;
  int linear = 0, lane = 0;
  State state = State::ready;
  const char* waits_for = "";  // the call that it is in
  int waits_detail = -1;       // barrier number
  ClockRef seen;               // what happened before its next step
  ClockRef fenced;             // what its last fence published
  ClockRef unfenced;           // what relaxed loads read: seen after the next fence
  Stamp proxy_fence = 0;       // time of the last fence.proxy.async
  std::vector<PendingCopy> open_copies;
  std::vector<std::vector<PendingCopy>> copy_groups;
  std::vector<PendingStore> open_stores;
  std::vector<StoreGroup> store_groups;
  ThreadId store_agent = kNobody;
  Products products;
  uint64_t cluster_arrival = 0;    // phase + 1 in which it arrived and has not waited; 0: none
  bool cluster_publishes = false;  // there, all that it did
  ClockRef cluster_seen;           // what it knew there, or had fenced
  Stamp cluster_stamp = 0;
};

// A warp collective that some lanes have reached.
struct Meeting {
  const char* kind;
  uint32_t mask, arrived;
  void* requests[kWarpSize];
};

struct Warp {
  Thread* lanes[kWarpSize] = {};
  std::vector<Meeting> meetings;
};

// What the threads of a warpgroup do together and some have begun.
struct Warpgroup {
  const char* kind = nullptr;
  int arrived = 0;
  void* requests[kWarpgroupSize] = {};
  int registers = 0;  // of each thread, for setmaxnreg
};

struct Barrier {
  int expected = 0;            // threads; 0: nobody has arrived
  bool aligned_block = false;  // __syncthreads and its relatives
  std::vector<Thread*> waiting;
  std::vector<ThreadId> arrived;  // without waiting
  Publication published;          // by them
  int votes = 0, vote_result = 0;
};

struct Mbarrier {
  uint32_t offset;
  uint32_t count, pending;
  int64_t bytes = 0;  // of asynchronous data expected and not there
  uint64_t phase = 0;
  ThreadId initialiser;
  Stamp initialised;
  ThreadId agent;  // of the asynchronous copies that it counts
  // Published in this phase, to waits of block scope by arrivals of this block and by reads of all, and to waits of
  // cluster scope by all; and in the phases that are over.
  Publication arrived, arrived_cluster;
  ClockRef completed, completed_cluster;
};

// The bulk copy out of a block's shared memory that came last to one mbarrier of a peer.
struct Sent {
  Stamp arrived;
  ThreadId issuer;
  const Block* to;
};

struct Block {
  Index3 index;
  uint32_t linear = 0, rank = 0;
  Cluster* cluster = nullptr;
  char* shared = nullptr;
  int live = 0;
  std::unique_ptr<Thread[]> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;
  std::vector<Barrier> barriers;
  std::vector<Mbarrier> mbarriers;
  std::vector<Granule> shadow;
  std::unordered_map<ThreadId, Stamp> remote;  // last access of each thread of a peer to its shared memory
  std::unordered_map<ThreadId, Sent> sent;     // by the agent of the mbarrier
  std::vector<ClockRef> final_clocks;          // of its exited threads
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0;     // blocks
  int missing = 0;  // threads that the barrier waits for
  int threads = 0;  // that have not exited
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
  ClockRef joined;  // what the last completed phase published
};

// Asynchronous data on its way into shared memory, with the mbarrier that will count it.
struct Delivery {
  Block* block;
  uint32_t offset, mbarrier;
  std::vector<unsigned char> data;
  const void* source;                          // read at delivery if `data` is empty
  std::function<void(unsigned char*)> gather;  // the same, where the source is not of one piece
  uint32_t bytes;
  Block* from;    // the block whose shared memory `source` is, or null
  ClockRef seen;  // what had happened when it was issued, besides what
  ThreadId issuer;
  Stamp issued;      // had done until then
  bool tells_reads;  // whoever waits for the data knows that the issuer's reads before it are over
};

// One launch. There is one machine, and one launch on it at a time.
struct Machine {
  Settings settings;
  Index3 grid, block_size;
  int threads_per_block = 0, shared_bytes = 0, cluster_size = 1;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  std::string error;
  Stamp now = 1;
  uint64_t random_state = 1;
  uint64_t nanoseconds = 0;
  Fiber main;
  std::vector<std::unique_ptr<Cluster>> clusters;  // resident
  std::vector<uint32_t> waiting_clusters;
  Cluster* retired = nullptr;
  std::vector<Thread*> ready, polling;
  std::vector<Delivery> deliveries;
  GlobalShadow global_shadow;
  std::unordered_map<const void*, ClockRef> flags;  // what a flag in memory publishes
  int64_t idle_polls = 0;                           // since a thread did anything else than poll
  int64_t idle_preempts = 0;                        // since a thread reached a synchronisation
  bool clock_read = false;                          // since progress was made
  int time_jumps = 0;
  int accesses_to_preempt = 1;
  int picks_to_stall = 0;
  const Warp* stalled_warp = nullptr;  // to be starved for a while
  const Block* stalled_block = nullptr;
  uint32_t agents = 0;
};

extern Machine machine;

inline Thread* self() { return static_cast<Thread*>(current); }

uint32_t random_below(uint32_t bound);
bool chance(uint32_t one_in);

std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Ends the launch with this error about the running thread; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// "(1,0,0)"; "thread (0,0,0) of block (1,0,0)"
std::string describe(const Index3& index);
std::string describe(const Thread& thread);
std::string describe(ThreadId id);

// The running thread lets others run: it stays runnable; it is spinning; it waits until wake.
void yield_ready();
void yield_polling(const char* call);
void wait(const char* call, int detail = -1);
void wait_blocked();  // once the thread's state says for what
void wake(Thread* thread);
// Something has happened that a spinning thread may be waiting for.
void progress();

// Runs all blocks of the launch that `machine` describes, at most `capacity` clusters at a time, or until an error;
// then frees what is left of it.
void run_grid(size_t capacity);
void reset();

float half_to_float(uint32_t half);

// Publishes what the running thread did: its clock as others may see it.
ClockRef release();
void acquire(const ClockRef& clock);

// Waits until all lanes of the mask have called it with the same `kind`; the last one runs complete(requests, mask),
// with null for the lanes outside.
void meet(const char* kind, uint32_t mask, void* request, void (*complete)(void** requests, uint32_t mask));

// Shared memory behind a window address; fails if it is not `bytes` bytes, aligned to `align`, of a live block.
struct Target {
  Block* block;
  uint32_t offset;
  char* data() const { return block->shared + offset; }
};
Target resolve(uint32_t address, int bytes, int align, const char* call);
// Notes an access to shared memory by `thread`, or by the asynchronous copy `agent` that the running thread issues, and
// fails if it races with an earlier one. After the latter the caller must advance the time.
void note_shared(const Thread& thread, Block* block, uint32_t offset, int bytes, bool write);
void note_agent(ThreadId agent, Block* block, uint32_t offset, int bytes, bool write);
void note_agent(ThreadId agent, const Thread& issuer, Block* block, uint32_t offset, int bytes, bool write);
// Fails if the asynchronous proxy, which reads or overwrites these bytes, may not see what threads stored there.
void check_proxy(Block* block, uint32_t offset, uint32_t bytes, const char* call);
// An identity for asynchronous operations that end in order.
ThreadId new_agent();
// That of the wgmma of a thread's warp.
ThreadId tensor_core(const Thread& thread);

// Waits until all 128 threads of the warpgroup have called it with the same `kind`; the last one runs
// complete(requests).
void meet_warpgroup(const char* kind, void* request, void (*complete)(void** requests));
// Sends data to an mbarrier's block, where `delivery` says what.
void start_delivery(const Target& to, Delivery delivery, uint32_t mbarrier, const char* call);
// An asynchronous operation of this thread under way, in words, or null.
const char* unfinished(const Thread& thread);

// In the running thread's exit.
void leave_barriers(Thread* thread);
void leave_cluster(Thread* thread);
// Once all threads of the block have exited: fails unless everybody else is known to be done with its shared memory.
void check_block_exit(Block* block);

// Finishes one delivery, chosen at random. Runs in any context: an error goes to machine.error.
void deliver_one();
// Whether the clock knows that the block has started.
bool knows_block(const Clock* clock, uint32_t block);

}  // namespace emulator
}  // namespace fusedseq
