#include "cpu/gemm.h"

#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S, int NV, int M>
static void tile(const Tile<S>& t) {
  constexpr int L = kLanes<S>;
  Vec<S> acc[M][NV];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = load(t.in + r * t.in_pitch + v * L);
  const S *a = t.a, *b = t.b, *const end = b + t.K * NV * L;
  const int64_t row = t.row, step = t.step;
  for (; b != end; b += NV * L, a += step) {
    Vec<S> x[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) x[r] = splat(a[r * row]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<S> w = load(b + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] = fma(x[r], w, acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(t.out + r * t.out_pitch + v * L, acc[r][v]);
}

template <class S, int NV, int M>
static void tile_of_height(const Tile<S>& t) {
  if (t.m == M) return tile<S, NV, M>(t);
  if constexpr (M > 1) tile_of_height<S, NV, M - 1>(t);
}

template <class S>
void multiply(const Tile<S>& t) {
  switch (t.nv) {
    case 1:
      return tile_of_height<S, 1, tile_rows(1)>(t);
    case 2:
      return tile_of_height<S, 2, tile_rows(2)>(t);
    case 3:
      return tile_of_height<S, 3, tile_rows(3)>(t);
    default:
      return tile_of_height<S, 4, tile_rows(4)>(t);
  }
}

template <class S>
void multiply_panel(const S* a, int64_t lda, int64_t rows, int64_t K, const S* b, int nv, const S* in, int64_t in_pitch,
                    S* c, int64_t ldc) {
  constexpr int64_t kBlock = 512;
  for (int64_t k = 0; k == 0 || k < K; k += kBlock) {
    for_row_tiles(rows, nv, [&](int64_t r, int m) {
      multiply(Tile<S>{m, nv, a + r * lda + k, lda, 1, b + k * nv * kLanes<S>, min64(kBlock, K - k),
                       k > 0 ? c + r * ldc : in + r * in_pitch, k > 0 ? ldc : in_pitch, c + r * ldc, ldc});
    });
  }
}

// Masks of __builtin_shuffle that interleave the low (high) halves of two vectors.
template <class S>
struct Interleave {
  typename VecOf<S>::bits lo, hi;
  Interleave() {
    constexpr int L = kLanes<S>;
    for (int i = 0; i < L; ++i) {
      lo[i] = i / 2 + (i % 2) * L;
      hi[i] = lo[i] + L / 2;
    }
  }
};

// In-register transpose of kLanes rows: log2(lanes) perfect shuffles of the first half with the second.
template <class S>
FSQ_INLINE void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int L = kLanes<S>;
  const Interleave<S> mask;
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    Vec<S> out[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      out[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], mask.lo);
      out[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], mask.hi);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = out[i];
  }
}

// dst[k * pitch + lane] = w[(row0 + lane) * K + k] for `count` rows, zero for the other lanes.
template <class S>
static void pack_transposed(S* dst, int64_t pitch, const void* w, DType dtype, int64_t row0, int64_t count, int64_t K) {
  constexpr int L = kLanes<S>;
  for (int64_t k = 0; k < K; k += L) {
    const int64_t n = min64(L, K - k);
    Vec<S> rows[L];
    for (int i = 0; i < L; ++i) rows[i] = i < count ? load_as<S>(w, dtype, (row0 + i) * K + k, n) : Vec<S>{};
    transpose<S>(rows);
    for (int i = 0; i < n; ++i) store(dst + (k + i) * pitch, rows[i]);
  }
}

template <class S>
void pack_gates(S* dst, int ng, int u, const void* w, DType dtype, int gate0, int64_t H, int64_t unit0, int64_t K) {
  constexpr int L = kLanes<S>;
  for (int g = 0; g < ng; ++g)
    for (int i = 0; i < u; ++i) {
      const int64_t unit = unit0 + i * L;
      pack_transposed<S>(dst + (g * u + i) * L, ng * u * L, w, dtype, (gate0 + g) * H + unit,
                         min64(L, max64(0, H - unit)), K);
    }
}

template <class S>
void pack_columns(S* dst, int nv, const void* w, DType dtype, int64_t N, int64_t col0, int64_t row0, int64_t K) {
  constexpr int L = kLanes<S>;
  for (int64_t k = 0; k < K; ++k)
    for (int v = 0; v < nv; ++v) {
      const int64_t c = col0 + v * L;
      store(dst + (k * nv + v) * L, c < N ? load_as<S>(w, dtype, (row0 + k) * N + c, N - c) : Vec<S>{});
    }
}

#define FSQ_INSTANTIATE(S)                                                                                             \
  template void multiply<S>(const Tile<S>&);                                                                           \
  template void multiply_panel<S>(const S*, int64_t, int64_t, int64_t, const S*, int, const S*, int64_t, S*, int64_t); \
  template void pack_gates<S>(S*, int, int, const void*, DType, int, int64_t, int64_t, int64_t);                       \
  template void pack_columns<S>(S*, int, const void*, DType, int64_t, int64_t, int64_t, int64_t);
FSQ_INSTANTIATE(float)
FSQ_INSTANTIATE(double)

}  // namespace FSQ_ISA
}  // namespace fusedseq
