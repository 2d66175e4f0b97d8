// Products on packed panels, the one place where floating-point work is done in bulk.
//
// C += A B, where B is packed in panels of NV vectors (for every k, NV vectors side by side) and A is read one value at
// a time and broadcast. A tile of M rows x NV vectors of C stays in registers over a run of K. Each element of C is a
// sum of chains of fused multiply-adds, each of kChain words in the order of k, whatever the tile, so that a row's
// result does not depend on how many rows there are, and rounding grows with the length of a chain and not of K.
#pragma once
#include "cpu/operand.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kMaxPanel = 4;  // vectors
constexpr int kMaxTile = 8;   // rows
constexpr int64_t kChain = 256;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Rows of a tile by its width in vectors, so that accumulators, a column of A and a vector of B fill the registers.
constexpr int tile_rows(int nv) {
  if (kRegisters == 32) return nv >= 4 ? 6 : 8;
  return nv >= 4 ? 3 : nv == 3 ? 4 : nv == 2 ? 6 : 8;
}

// One tile: out[r][v] = in[r][v] + sum_k a[r * row + k * step] * b[k * b_pitch][v], k counting words. `in` and `out`
// have rows of nv vectors; `in` may be null (0), in_pitch 0 repeats one row (a bias); b_pitch is that of a panel, or of
// a matrix used as it lies in memory; row and step count values.
template <class P>
struct Tile {
  typedef typename P::Sum S;
  typedef typename P::Value Value;
  int m, nv;
  const Value* a;
  int64_t row, step;
  const S* b;
  int64_t b_pitch, K;
  const S* in;
  int64_t in_pitch;
  S* out;
  int64_t out_pitch;
  // A second product onto the same sums, after the first: a2 (step: one word) times b2.
  const Value* a2 = nullptr;
  int64_t row2 = 0;
  const S* b2 = nullptr;
  int64_t b2_pitch = 0, K2 = 0;
  bool apart = false;  // the first chain starts at 0 and `in` is added after it, for a product cut along K
};
template <class P>
void multiply(const Tile<P>& t);

// Calls f(first row, count) over n rows in tiles of nearly equal height, `tall` at most.
template <class F>
FSQ_INLINE void for_tiles(int64_t n, int64_t tall, F f) {
  const int64_t tiles = (n + tall - 1) / tall;
  for (int64_t t = 0, r = 0; t < tiles; ++t) {
    const int64_t m = (n - r) / (tiles - t);
    f(r, int(m));
    r += m;
  }
}

// The same for panels of nv vectors.
template <class F>
FSQ_INLINE void for_row_tiles(int64_t n, int nv, F f) {
  for_tiles(n, tile_rows(nv), f);
}

// Calls f(first vector, count) over vectors [begin, end) in panels of at most `widest`.
template <class F>
FSQ_INLINE void for_panels(int64_t begin, int64_t end, int widest, F f) {
  for (int64_t v = begin; v < end; v += widest) f(v, int(end - v < widest ? end - v : widest));
}

// All rows of one panel: c = in + A B with K words. K is walked in blocks, so that a tile's rows of A stay in the
// first-level cache.
template <class P>
void multiply_panel(const typename P::Value* a, int64_t lda, int64_t rows, int64_t K, const typename P::Sum* b,
                    int64_t b_pitch, int nv, const typename P::Sum* in, int64_t in_pitch, typename P::Sum* c,
                    int64_t ldc);

// dst[k * pitch + lane] = word k of the row of w that begins at at[lane], for `count` rows; zero for the other lanes.
template <class P>
void pack_transposed(typename P::Sum* dst, int64_t pitch, const void* w, DType dtype, const int64_t* at, int64_t count,
                     int64_t K);

// A panel of ng gates x u unit vectors for C = A W^T with W [G*H, K] in dtype: columns ordered gate by gate, units past
// H are zero. K counts values, here and below.
template <class P>
void pack_gates(typename P::Sum* dst, int ng, int u, const void* w, DType dtype, int gate0, int64_t H, int64_t unit0,
                int64_t K);

// A panel of nv vectors for C = A W with W [K, N]: columns col0... of rows row0..row0+K; columns past N are zero.
template <class P>
void pack_columns(typename P::Sum* dst, int nv, const void* w, DType dtype, int64_t N, int64_t col0, int64_t row0,
                  int64_t K);

}  // namespace FSQ_ISA
}  // namespace fusedseq
