#include "order.h"

#include <algorithm>

namespace fusedseq {
namespace emulator {

namespace {

using Entries = std::vector<Clock::Entry>;

Entries::const_iterator lower(const Entries& entries, uint32_t id) {
  return std::lower_bound(entries.begin(), entries.end(), id,
                          [](const Clock::Entry& entry, uint32_t key) { return entry.id < key; });
}

bool covered(const Entries& entries, uint32_t id, Stamp stamp) {
  const auto found = lower(entries, id);
  return found != entries.end() && found->id == id && found->stamp >= stamp;
}

void raise(Entries& entries, uint32_t id, Stamp stamp) {
  const auto found = entries.begin() + (lower(entries, id) - entries.begin());
  if (found == entries.end() || found->id != id)
    entries.insert(found, {id, stamp});
  else
    found->stamp = std::max(found->stamp, stamp);
}

void merge(Entries& into, const Entries& a, const Entries& b) {
  into.reserve(a.size() + b.size());
  auto i = a.begin(), j = b.begin();
  while (i != a.end() || j != b.end()) {
    if (j == b.end() || (i != a.end() && i->id < j->id))
      into.push_back(*i++);
    else if (i == a.end() || j->id < i->id)
      into.push_back(*j++);
    else {
      into.push_back({i->id, std::max(i->stamp, j->stamp)});
      ++i, ++j;
    }
  }
}

void drop_range(Entries& entries, uint32_t first, uint32_t last) {
  const auto from = entries.begin() + (lower(entries, first) - entries.begin());
  const auto to = entries.begin() + (lower(entries, last) - entries.begin());
  entries.erase(from, to);
}

Clock* copy(const ClockRef& clock) {
  Clock* made = clock.get() ? new Clock(*clock.get()) : new Clock;
  made->references = 0;
  return made;
}

// `clock` and these entries, which need not be sorted.
ClockRef with_entries(const ClockRef& clock, Entries& entries) {
  if (entries.empty()) return clock;
  std::sort(entries.begin(), entries.end(), [](const Clock::Entry& x, const Clock::Entry& y) {
    return x.id != y.id ? x.id < y.id : x.stamp > y.stamp;
  });
  const auto same = [](const Clock::Entry& x, const Clock::Entry& y) { return x.id == y.id; };
  entries.erase(std::unique(entries.begin(), entries.end(), same), entries.end());
  Clock* made = copy(clock);
  ClockRef result(made);
  made->threads.clear();
  static const Entries none;
  merge(made->threads, clock.get() ? clock.get()->threads : none, entries);
  entries.clear();
  return result;
}

}  // namespace

bool covers(const Clock* clock, ThreadId id, Stamp stamp) {
  if (!clock) return false;
  if (covered(clock->threads, id, stamp)) return true;
  if (id & kAgent) return false;
  const ThreadId thread = id & ~kArrival;
  return covered(clock->blocks, thread / kThreadsPerBlock, stamp) || covered(clock->warps, thread / kWarpSize, stamp) ||
         (thread != id && covered(clock->threads, thread, stamp));
}

bool covers_read(const Clock* clock, ThreadId id, Stamp stamp) {
  return covers(clock, id, stamp) || (clock && covers(clock->reads.get(), id, stamp));
}

// The threads of a block often join the same two clocks one after another; they shall share the result.
ClockRef join(const ClockRef& a, const ClockRef& b) {
  if (!b.get() || a.get() == b.get()) return a;
  if (!a.get()) return b;
  struct Memo {
    ClockRef a, b, joined;
  };
  static Memo memos[16];
  const size_t hash = reinterpret_cast<uintptr_t>(a.get()) * 31 + reinterpret_cast<uintptr_t>(b.get());
  Memo& memo = memos[(hash ^ hash >> 9) / 16 % 16];
  if (memo.a.get() == a.get() && memo.b.get() == b.get()) return memo.joined;
  Clock* made = new Clock;
  const ClockRef joined(made);
  merge(made->blocks, a.get()->blocks, b.get()->blocks);
  merge(made->warps, a.get()->warps, b.get()->warps);
  merge(made->threads, a.get()->threads, b.get()->threads);
  made->reads = join(a.get()->reads, b.get()->reads);
  memo = {a, b, joined};
  return joined;
}

ClockRef with_thread(const ClockRef& clock, ThreadId id, Stamp stamp) {
  Clock* made = copy(clock);
  raise(made->threads, id, stamp);
  return ClockRef(made);
}

ClockRef with_warp(const ClockRef& clock, uint32_t warp, Stamp stamp) {
  Clock* made = copy(clock);
  drop_range(made->threads, warp * kWarpSize, (warp + 1) * kWarpSize);
  raise(made->warps, warp, stamp);
  return ClockRef(made);
}

ClockRef with_blocks(const ClockRef& clock, const std::vector<uint32_t>& blocks, Stamp stamp) {
  Clock* made = copy(clock);
  for (uint32_t block : blocks) {
    drop_range(made->threads, block * kThreadsPerBlock, (block + 1) * kThreadsPerBlock);
    drop_range(made->warps, block * kThreadsPerBlock / kWarpSize, (block + 1) * kThreadsPerBlock / kWarpSize);
    raise(made->blocks, block, stamp);
  }
  return ClockRef(made);
}

ClockRef with_started(const ClockRef& clock, const std::vector<uint32_t>& blocks) {
  Clock* made = copy(clock);
  for (uint32_t block : blocks) raise(made->blocks, block, 0);
  return ClockRef(made);
}

void Publication::add(const ClockRef& seen, ThreadId id, Stamp stamp) {
  seen_ = join(seen_, seen);
  add(id, stamp);
}

void Publication::add(ThreadId id, Stamp stamp) {
  if (!threads_.empty() && threads_.back().id == id)
    threads_.back().stamp = std::max(threads_.back().stamp, stamp);
  else
    threads_.push_back({id, stamp});
}

void Publication::add_reads(const ClockRef& seen, ThreadId id, Stamp stamp) {
  add(id | kArrival, stamp);
  read_seen_ = join(read_seen_, seen);
  read_threads_.push_back({id, stamp});
}

ClockRef Publication::take(const ClockRef& before) {
  ClockRef clock = with_entries(join(before, seen_), threads_);
  const ClockRef reads = with_entries(read_seen_, read_threads_);
  if (reads.get()) {
    Clock* made = copy(clock);
    made->reads = join(made->reads, reads);
    clock = ClockRef(made);
  }
  seen_ = read_seen_ = ClockRef();
  return clock;
}

}  // namespace emulator
}  // namespace fusedseq
