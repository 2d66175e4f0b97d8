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

}  // namespace

bool covers(const Clock* clock, ThreadId id, Stamp stamp) {
  if (!clock) return false;
  if (!(id & kAgent) &&
      (covered(clock->blocks, id / kThreadsPerBlock, stamp) || covered(clock->warps, id / kWarpSize, stamp)))
    return true;
  return covered(clock->threads, id, stamp);
}

ClockRef join(const ClockRef& a, const ClockRef& b) {
  if (!b.get() || a.get() == b.get()) return a;
  if (!a.get()) return b;
  Clock* made = new Clock;
  merge(made->blocks, a.get()->blocks, b.get()->blocks);
  merge(made->warps, a.get()->warps, b.get()->warps);
  merge(made->threads, a.get()->threads, b.get()->threads);
  return ClockRef(made);
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

}  // namespace emulator
}  // namespace fusedseq
