// Rows of a [rows, d] tensor: columns in blocks that share one evaluation of Philox, and sums over rows.
#pragma once
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int64_t kBlock = 64;

// Bit j: column 64 * block + j of a row is kept.
FSQ_INLINE uint64_t kept_columns(const Dropout& dropout, int64_t row, int64_t block) {
  return kept_keys(dropout.seed, dropout.threshold, row >> 32, 0, row & 0xffffffff, block);
}

// Calls f(first column, columns left, lane block) for every vector of a block of columns; `columns left` counts to d.
template <class S, class F>
FSQ_INLINE void for_vectors(int64_t block, int64_t d, F f) {
  constexpr int L = kLanes<S>, kVecs = int(kBlock) / L;
  const int64_t first = block * kBlock;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v)
    if (first + v * L < d) f(first + v * L, d - first - v * L, v);
}

// v with 0 in the lanes from n on.
template <class S>
FSQ_INLINE Vec<S> first_n(Vec<S> v, int64_t n) {
  return n >= kLanes<S> ? v : kept<S>(v, (uint64_t(1) << n) - 1);
}

// What a thread is worth waking for.
constexpr int64_t kSmall = 16384;
FSQ_INLINE int row_threads(int threads, int64_t rows, int64_t d) { return rows * d < kSmall ? 1 : threads; }

// Sums over rows: each group of rows, the same whatever the threads, has partial sums of its own, added up in order.
struct Groups {
  int64_t rows, size, count;
  explicit Groups(int64_t rows) : rows(rows), size(max64(16, (rows + 63) / 64)), count((rows + size - 1) / size) {}
  Range range(int64_t g) const { return {g * size, min64(rows, (g + 1) * size)}; }
};

// out[j] = sum over groups of partial[g * pitch + j] for the columns [begin, end).
template <class S>
static void add_groups(S* out, const S* partial, int64_t count, int64_t pitch, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += kLanes<S>) {
    Vec<S> sum{};
    for (int64_t g = 0; g < count; ++g) sum = sum + load_n(partial + g * pitch + j, end - j);
    store_n(out + j, sum, end - j);
  }
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
