#include "shadow.h"

#include <algorithm>

namespace fusedseq {
namespace emulator {

namespace {

bool concerns(const Record& record, Stamp bytes, const Access& access) {
  return (record.bytes & bytes) && record.id != access.id &&
         !(record.id == access.issuer && record.stamp <= access.issued);
}

// A record that the new one makes superfluous, or the one to forget.
Record& replaced(Granule& granule, const Access& access) {
  for (Record& read : granule.reads)
    if (!read.bytes || read.id == access.id) return read;
  for (Record& read : granule.reads)
    if (covers(access.seen, read.id, read.stamp)) return read;
  return granule.reads[access.chance & 1];
}

const Record* note_granule(Granule& granule, Stamp bytes, const Access& access) {
  const Record& write = granule.write;
  if (concerns(write, bytes, access) && !covers(access.seen, write.id, write.stamp)) return &write;
  const Record record = {access.id, access.stamp, bytes};
  if (!access.write) {
    replaced(granule, access) = record;
    return nullptr;
  }
  for (Record& read : granule.reads)
    if (concerns(read, bytes, access) && !covers_read(access.seen, read.id, read.stamp)) return &read;
  for (Record& read : granule.reads) read.bytes &= ~bytes;
  granule.write = record;
  return nullptr;
}

}  // namespace

const Record* note(Granule* granules, size_t offset, int bytes, const Access& access) {
  size_t at = offset;
  const size_t end = offset + size_t(bytes);
  while (at < end) {
    const Stamp first = Stamp(at & 1), count = Stamp(std::min<size_t>(2 - first, end - at));
    const Stamp mask = ((1u << count) - 1) << first;
    if (const Record* race = note_granule(granules[at / 2], mask, access)) return race;
    at += count;
  }
  return nullptr;
}

Granule* GlobalShadow::page(uintptr_t number) {
  if (!last_ || number != last_number_) {
    std::unique_ptr<Granule[]>& found = pages_[number];
    if (!found) found.reset(new Granule[kPage / 2]());
    last_number_ = number;
    last_ = found.get();
  }
  return last_;
}

const Record* GlobalShadow::note(const void* address, int bytes, const Access& access) {
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  while (bytes > 0) {
    const int here = int(std::min<uintptr_t>(uintptr_t(bytes), kPage - at % kPage));
    if (const Record* race = emulator::note(page(at / kPage), at % kPage, here, access)) return race;
    at += uintptr_t(here);
    bytes -= here;
  }
  return nullptr;
}

}  // namespace emulator
}  // namespace fusedseq
