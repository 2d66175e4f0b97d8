// Remembers, for every two bytes of memory, who wrote them last and who read them since, to find accesses that no
// synchronisation orders.
#pragma once

#include <stddef.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "order.h"

namespace fusedseq {
namespace emulator {

constexpr ThreadId kMbarrier = 0xfffffffeu;  // "wrote" the bytes of a live mbarrier

struct Record {
  ThreadId id;
  Stamp stamp : 30;
  Stamp bytes : 2;  // which of the two; none: no record
};

struct Granule {
  Record write, reads[2];  // two readers of perhaps many: a race with the others shows under another seed
};

// One access: whose, when, what it knows: a thread's clock and, if it is an asynchronous copy's, what the thread that
// issued it did until then.
struct Access {
  ThreadId id;
  Stamp stamp;
  const Clock* seen;
  bool write;
  uint32_t chance;  // random, decides which reader is forgotten
  ThreadId issuer = kNobody;
  Stamp issued = 0;
};

// Notes the access to bytes [offset, offset + bytes) of what `granules` shadows; the record that it races with, or
// null.
const Record* note(Granule* granules, size_t offset, int bytes, const Access& access);

// Shadows those parts of global memory that are touched.
class GlobalShadow {
 public:
  const Record* note(const void* address, int bytes, const Access& access);
  void clear() { pages_.clear(), last_ = nullptr; }

 private:
  static constexpr size_t kPage = 4096;
  Granule* page(uintptr_t number);
  std::unordered_map<uintptr_t, std::unique_ptr<Granule[]>> pages_;
  uintptr_t last_number_ = 0;
  Granule* last_ = nullptr;
};

}  // namespace emulator
}  // namespace fusedseq
