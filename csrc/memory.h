// Memory for scratch: aligned to cache lines, and on huge pages where it is large, since panels are read at random and
// mapping 4 KiB at a time can take longer than the scan.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#if !defined(_WIN32)
#include <sys/mman.h>
#endif

namespace fusedseq {

constexpr int64_t kHugePage = 2 << 20;

// Null if there is no memory; freed with free().
static inline char* allocate_scratch(int64_t bytes) {
  const bool huge = bytes >= 4 * kHugePage;
  const int64_t unit = huge ? kHugePage : 64, size = (bytes + unit - 1) / unit * unit;
  char* const p = static_cast<char*>(aligned_alloc(size_t(unit), size_t(size)));
#if defined(MADV_HUGEPAGE)
  if (huge && p) madvise(p, size_t(size), MADV_HUGEPAGE);  // a hint; a refusal is no loss
#endif
  return p;
}

}  // namespace fusedseq
