#pragma once
#include "fusedseq.h"
#include "memory.h"

namespace fusedseq {

// Scratch that one caller keeps from call to call: as much as its largest call needed, up to a limit.
class KeptScratch : public Scratch {
 public:
  explicit KeptScratch(int64_t limit) : Scratch{nullptr, 0, 0}, limit_(limit) {}
  KeptScratch(const KeptScratch&) = delete;
  ~KeptScratch() { free(data); }
  void grow() {
    if (needed <= bytes || needed > limit_) return;
    free(data);
    data = allocate_scratch(needed);
    bytes = data ? needed : 0;
  }

 private:
  const int64_t limit_;
};

}  // namespace fusedseq
