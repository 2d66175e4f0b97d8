#include "cpu/gemm.h"

#include "cpu/accumulate.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace fusedseq {
namespace FSQ_ISA {

// acc (+)= base, a row `pitch` after the other.
template <class P, int NV, int M>
FSQ_INLINE void add_rows(Vec<typename P::Sum> (&acc)[M][NV], const typename P::Sum* base, int64_t pitch) {
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = acc[r][v] + load(base + r * pitch + v * kLanes<typename P::Sum>);
}
template <class P, int NV, int M>
FSQ_INLINE void store_rows(const Vec<typename P::Sum> (&acc)[M][NV], typename P::Sum* out, int64_t pitch) {
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + r * pitch + v * kLanes<typename P::Sum>, acc[r][v]);
}

// Adds a product to acc: its first chain goes on from there, each further one starts at 0. `out` is scratch for sums.
template <class P, int NV, int M>
FSQ_INLINE void add_chains(Vec<typename P::Sum> (&acc)[M][NV], const typename P::Value* a, int64_t row, int64_t step,
                           const typename P::Sum* b, int64_t b_pitch, int64_t K, typename P::Sum* out, int64_t pitch) {
  accumulate<P, NV, M>(acc, a, row, step, b, b_pitch, min64(kChain, K));
  for (int64_t k = kChain; k < K; k += kChain) {
    store_rows<P, NV, M>(acc, out, pitch);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Vec<typename P::Sum>{};
    accumulate<P, NV, M>(acc, a + k * step, row, step, b + k * b_pitch, b_pitch, min64(kChain, K - k));
    add_rows<P, NV, M>(acc, out, pitch);
  }
}

// What is not one chain: longer sums, and second ones.
template <class P, int NV, int M>
__attribute__((noinline)) static void long_tile(const Tile<P>& t) {
  Vec<typename P::Sum> acc[M][NV] = {};
  if (t.in && !t.apart) add_rows<P, NV, M>(acc, t.in, t.in_pitch);
  add_chains<P, NV, M>(acc, t.a, t.row, t.step, t.b, t.b_pitch, t.K, t.out, t.out_pitch);
  if (t.in && t.apart) add_rows<P, NV, M>(acc, t.in, t.in_pitch);
  if (t.K2 > 0) add_chains<P, NV, M>(acc, t.a2, t.row2, P::per_word, t.b2, t.b2_pitch, t.K2, t.out, t.out_pitch);
  store_rows<P, NV, M>(acc, t.out, t.out_pitch);
}

template <class P, int NV, int M>
static void tile(const Tile<P>& t) {
  if (t.K > kChain || t.K2 > 0 || t.apart) return long_tile<P, NV, M>(t);
  Vec<typename P::Sum> acc[M][NV] = {};
  if (t.in) add_rows<P, NV, M>(acc, t.in, t.in_pitch);
  accumulate<P, NV, M>(acc, t.a, t.row, t.step, t.b, t.b_pitch, t.K);
  store_rows<P, NV, M>(acc, t.out, t.out_pitch);
}

// The code for a tile by its width and height, found in one jump: short sums feel how they begin.
template <class P, int NV, int M>
constexpr void (*tile_code())(const Tile<P>&) {
  return tile < P, NV, M <= tile_rows(NV) ? M : 1 > ;
}
#define FSQ_HEIGHTS(P, NV)                                                                     \
  {tile_code<P, NV, 1>(), tile_code<P, NV, 2>(), tile_code<P, NV, 3>(), tile_code<P, NV, 4>(), \
   tile_code<P, NV, 5>(), tile_code<P, NV, 6>(), tile_code<P, NV, 7>(), tile_code<P, NV, 8>()}
template <class P>
void multiply(const Tile<P>& t) {
  static constexpr void (*codes[kMaxPanel][kMaxTile])(const Tile<P>&) = {FSQ_HEIGHTS(P, 1), FSQ_HEIGHTS(P, 2),
                                                                         FSQ_HEIGHTS(P, 3), FSQ_HEIGHTS(P, 4)};
  codes[t.nv - 1][t.m - 1](t);
}
#undef FSQ_HEIGHTS

template <class P>
void multiply_panel(const typename P::Value* a, int64_t lda, int64_t rows, int64_t K, const typename P::Sum* b,
                    int64_t b_pitch, int nv, const typename P::Sum* in, int64_t in_pitch, typename P::Sum* c,
                    int64_t ldc) {
  for (int64_t k = 0; k == 0 || k < K; k += kChain) {
    for_row_tiles(rows, nv, [&](int64_t r, int m) {
      multiply(Tile<P>{m, nv, a + r * lda + k * P::per_word, lda, P::per_word, b + k * b_pitch, b_pitch,
                       min64(kChain, K - k), k > 0 ? c + r * ldc : in + r * in_pitch, k > 0 ? ldc : in_pitch,
                       c + r * ldc, ldc, nullptr, 0, nullptr, 0, 0, k > 0});
    });
  }
}

template <class P>
void pack_transposed(typename P::Sum* dst, int64_t pitch, const void* w, DType dtype, const int64_t* at, int64_t count,
                     int64_t K) {
  typedef typename P::Sum S;
  constexpr int L = kLanes<S>;
  const bool whole = P::per_word == 1 && count == L && dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32);
  for (int64_t k = 0; k < words<P>(K); k += L) {
    const int64_t n = min64(L, words<P>(K) - k), value = k * P::per_word;
    Vec<S> rows[L];
    if (whole && n == L)
      for (int i = 0; i < L; ++i) rows[i] = load(static_cast<const S*>(w) + at[i] + k);
    else
      for (int i = 0; i < L; ++i) rows[i] = i < count ? load_words<P>(w, dtype, at[i] + value, n, K - value) : Vec<S>{};
    transpose<S>(rows);
    for (int i = 0; i < n; ++i) store(dst + (k + i) * pitch, rows[i]);
  }
}

template <class P>
void pack_gates(typename P::Sum* dst, int ng, int u, const void* w, DType dtype, int gate0, int64_t H, int64_t unit0,
                int64_t K) {
  constexpr int L = kLanes<typename P::Sum>;
  for (int g = 0; g < ng; ++g)
    for (int i = 0; i < u; ++i) {
      const int64_t unit = unit0 + i * L;
      int64_t at[L];
      for (int r = 0; r < L; ++r) at[r] = ((gate0 + g) * H + unit + r) * K;
      pack_transposed<P>(dst + (g * u + i) * L, ng * u * L, w, dtype, at, min64(L, max64(0, H - unit)), K);
    }
}

template <class P>
void pack_columns(typename P::Sum* dst, int nv, const void* w, DType dtype, int64_t N, int64_t col0, int64_t row0,
                  int64_t K) {
  typedef typename P::Sum S;
  constexpr int L = kLanes<S>;
  for (int64_t k = 0; k < K; ++k)
    for (int v = 0; v < nv; ++v) {
      const int64_t c = col0 + v * L;
      put_row<P>(dst + (k / P::per_word * nv + v) * L, k,
                 c < N ? load_as<S>(w, dtype, (row0 + k) * N + c, N - c) : Vec<S>{});
    }
}

#define FSQ_INSTANTIATE(P)                                                                                  \
  template void pack_transposed<P>(P::Sum*, int64_t, const void*, DType, const int64_t*, int64_t, int64_t); \
  template void multiply<P>(const Tile<P>&);                                                                \
  template void multiply_panel<P>(const P::Value*, int64_t, int64_t, int64_t, const P::Sum*, int64_t, int,  \
                                  const P::Sum*, int64_t, P::Sum*, int64_t);                                \
  template void pack_gates<P>(P::Sum*, int, int, const void*, DType, int, int64_t, int64_t, int64_t);       \
  template void pack_columns<P>(P::Sum*, int, const void*, DType, int64_t, int64_t, int64_t, int64_t);
FSQ_INSTANTIATE(Whole<float>)
FSQ_INSTANTIATE(Whole<double>)
#if FSQ_BF16_PAIRS
FSQ_INSTANTIATE(Bf16Pairs)
#endif

}  // namespace FSQ_ISA
}  // namespace fusedseq
