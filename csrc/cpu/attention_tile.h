// Products of attention's forward pass: rows of queries lie in lanes, keys or features are the tile's rows.
//
// A panel is kMaxPanel vectors of queries, side by side in memory for every feature or key; the left operand is K or V,
// one value at a time. So neither is packed, a narrow head fills a tile as a wide one does, and what softmax needs of a
// row is never summed across lanes. The sums here are short: starting and ending a tile counts, and a table finds the
// code for its shape in one jump.
#pragma once
#include "cpu/accumulate.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
constexpr int kPanelRows = kMaxPanel * kLanes<S>;

#if defined(__AVX512F__)
FSQ_INLINE VecF larger(VecF a, VecF b) { return _mm512_max_ps(a, b); }
FSQ_INLINE VecD larger(VecD a, VecD b) { return _mm512_max_pd(a, b); }
#else
template <class V>
FSQ_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
#endif

enum class Start { zero, there, scaled };

// Products: out[r][row] = scale sum_k a[r * pitch + k] b[k][row] and top = max(top, out), rows of b and out kPanelRows
// apart. Sums: out[r][row] (+)= sum_k a[r + k * pitch] b[k][row], after what `start` says of out; top is the factor.
template <class P>
struct PanelTile {
  typedef typename P::Sum S;
  const typename P::Value* a;
  int64_t pitch;  // in values
  const S* b;
  int64_t K;  // words
  S* out;
  S *top, scale;
  Start start;
};

template <class P, int NV, int M>
static void product_tile(const PanelTile<P>& t) {
  typedef typename P::Sum S;
  constexpr int L = kLanes<S>, kRows = kPanelRows<S>;
  Vec<S> acc[M][NV] = {};
  accumulate<P, NV, M>(acc, t.a, t.pitch, P::per_word, t.b, kRows, t.K);
  const Vec<S> scale = splat(t.scale);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    Vec<S> top = load(t.top + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec<S> x = acc[r][v] * scale;
      store(t.out + r * kRows + v * L, x);
      top = larger(x, top);  // NaN does not count
    }
    store(t.top + v * L, top);
  }
}

template <class P, int NV, int M>
static void sum_tile(const PanelTile<P>& t) {
  typedef typename P::Sum S;
  constexpr int L = kLanes<S>, kRows = kPanelRows<S>;
  Vec<S> acc[M][NV] = {};
  if (t.start != Start::zero)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] = load(t.out + r * kRows + v * L);
  if (t.start == Start::scaled)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<S> by = load(t.top + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] = acc[r][v] * by;
    }
  accumulate<P, NV, M>(acc, t.a, P::per_word, t.pitch, t.b, kRows, t.K);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) store(t.out + r * kRows + v * L, acc[r][v]);
}

// The code for a tile by its width and height.
template <class P>
using TileCode = void (*)(const PanelTile<P>&);
template <class P, int NV, int M>
constexpr TileCode<P> product_code() {
  return product_tile < P, NV, M <= tile_rows(NV) ? M : 1 > ;
}
template <class P, int NV, int M>
constexpr TileCode<P> sum_code() {
  return sum_tile < P, NV, M <= tile_rows(NV) ? M : 1 > ;
}
#define FSQ_HEIGHTS(code, P, NV)                                           \
  {code<P, NV, 1>(), code<P, NV, 2>(), code<P, NV, 3>(), code<P, NV, 4>(), \
   code<P, NV, 5>(), code<P, NV, 6>(), code<P, NV, 7>(), code<P, NV, 8>()}
template <class P>
FSQ_INLINE TileCode<P> product_of(int nv, int m) {
  static constexpr TileCode<P> codes[kMaxPanel][kMaxTile] = {
      FSQ_HEIGHTS(product_code, P, 1), FSQ_HEIGHTS(product_code, P, 2), FSQ_HEIGHTS(product_code, P, 3),
      FSQ_HEIGHTS(product_code, P, 4)};
  return codes[nv - 1][m - 1];
}
template <class P>
FSQ_INLINE TileCode<P> sum_of(int nv, int m) {
  static constexpr TileCode<P> codes[kMaxPanel][kMaxTile] = {FSQ_HEIGHTS(sum_code, P, 1), FSQ_HEIGHTS(sum_code, P, 2),
                                                             FSQ_HEIGHTS(sum_code, P, 3), FSQ_HEIGHTS(sum_code, P, 4)};
  return codes[nv - 1][m - 1];
}
#undef FSQ_HEIGHTS

}  // namespace FSQ_ISA
}  // namespace fusedseq
