// Who happened before whom: vector clocks, after Flanagan & Freund, "FastTrack: efficient and precise dynamic race
// detection" (PLDI 2009), folded by block and warp because barriers order whole groups at once.
//
// Time is one counter, raised at every synchronisation. A thread's access carries its id and the time; it happened
// before what another thread does if that thread's clock has an entry for the id at that time or later.
#pragma once

#include <stdint.h>

#include <vector>

namespace fusedseq {
namespace emulator {

using Stamp = uint32_t;     // 29 bits are used
using ThreadId = uint32_t;  // kThreadsPerBlock * block + thread, or kAgent + n for an asynchronous copy

constexpr uint32_t kThreadsPerBlock = 1024, kWarpSize = 32;
constexpr ThreadId kAgent = 0x80000000u;
constexpr ThreadId kTensorCores = 0x40000000u;  // with kAgent and a warp's number: its wgmma
constexpr ThreadId kArrival = 0x40000000u;      // with a thread's id: its arrivals that publish no writes
constexpr ThreadId kNobody = 0xffffffffu;

struct Clock;

// A counted reference; threads that passed the same barrier hold the same clock. Null: nothing happened before.
class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) { hold(); }
  ClockRef(const ClockRef& other) : clock_(other.clock_) { hold(); }
  ClockRef& operator=(const ClockRef& other) {
    if (other.clock_ != clock_) {
      drop();
      clock_ = other.clock_;
      hold();
    }
    return *this;
  }
  ~ClockRef() { drop(); }
  const Clock* get() const { return clock_; }

 private:
  void hold();
  void drop();
  Clock* clock_ = nullptr;
};

// Immutable once shared.
struct Clock {
  struct Entry {
    uint32_t id;
    Stamp stamp;
  };
  int references = 0;
  std::vector<Entry> blocks, warps, threads;  // each sorted by id
  ClockRef reads;                             // of what is in here only the reads happened before
};

inline void ClockRef::hold() {
  if (clock_) ++clock_->references;
}
inline void ClockRef::drop() {
  if (clock_ && --clock_->references == 0) delete clock_;
}

// Whether what thread `id` did at `stamp` happened before; the second for an access that read.
bool covers(const Clock* clock, ThreadId id, Stamp stamp);
bool covers_read(const Clock* clock, ThreadId id, Stamp stamp);

// Everything that happened before either.
ClockRef join(const ClockRef& a, const ClockRef& b);

// `clock` and all that thread `id` did up to `stamp`.
ClockRef with_thread(const ClockRef& clock, ThreadId id, Stamp stamp);

// The same as with_thread for every thread of a warp (its number: id / kWarpSize) or block.
ClockRef with_warp(const ClockRef& clock, uint32_t warp, Stamp stamp);
ClockRef with_blocks(const ClockRef& clock, const std::vector<uint32_t>& blocks, Stamp stamp);

// `clock`, and that these blocks have started.
ClockRef with_started(const ClockRef& clock, const std::vector<uint32_t>& blocks);

// What the arrivals at a barrier publish, put together when it is over.
class Publication {
 public:
  // All that thread `id`, whose clock is `seen`, did up to `stamp`; or only its reads, and the arrival itself.
  void add(const ClockRef& seen, ThreadId id, Stamp stamp);
  void add_reads(const ClockRef& seen, ThreadId id, Stamp stamp);
  // What `id` did, without what it knew.
  void add(ThreadId id, Stamp stamp);
  // `before` and the publication, which is then empty.
  ClockRef take(const ClockRef& before);

 private:
  ClockRef seen_, read_seen_;
  std::vector<Clock::Entry> threads_, read_threads_;
};

}  // namespace emulator
}  // namespace fusedseq
