// The recurrent product of one step, weights and state in shared memory: sums[gate][unit][row] = sum over k of
// w[gate][unit][k] v[row][k].
//
// A warp computes a tile of 16 units, all gates of them, by up to two tiles of 8 rows: units are the M of `mma.sync`,
// rows its N. Warps that share a tile of units take turns with the tiles of 16 terms ("parts"), whose sums the reader
// adds up. float32 has no tensor-core instruction that keeps its digits, so there every thread multiplies and adds for
// the very units and rows that it would own in an accumulator of mma.sync. Where TF32 will do, operands are rounded
// when they come into shared memory, each once, and not whenever a warp reads them.
#pragma once
#include "cuda/value.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kUnitTile = 16, kTermTile = 16, kRowTile = 8, kMaxRows = 16;

// Elements of 16 bytes: what a lane's address of ldmatrix names, half the terms of one mma.sync.
template <class E>
constexpr int kVector = 16 / int(sizeof(E));
// Elements that a row of shared memory is longer than its data, so that eight rows lie in different banks.
template <class E>
constexpr int kPad = kVector<E>;

template <class E>
FSQ_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, Tf32>)
    ptx::mma_m16n8k8_tf32(d, a, b);
  else
    ptx::mma_m16n8k16<E>(d, a, b);
}

// What arrives from all ranks: two buffers of `ranks` slices of `rows` rows of `width` values.
template <class E>
struct Slices {
  SharedSpan<E> data;
  int ranks, rows, width;

  FSQ_BOTH int pitch() const { return width + kPad<E>; }
  FSQ_BOTH int slice() const { return rows * pitch(); }
  FSQ_BOTH int at(int which, int rank) const { return (which * ranks + rank) * slice(); }
  template <class Arena>
  FSQ_BOTH static Slices carve(Arena& arena, int ranks, int rows, int width) {
    Slices s;
    s.ranks = ranks;
    s.rows = rows;
    s.width = width;
    s.data = arena.template take<E>(2 * ranks * s.slice());
    return s;
  }
};

// Weights of this rank: `gates` blocks of `units` rows of `terms` values.
template <class E>
struct Panel {
  SharedSpan<E> data;
  int units, terms;

  FSQ_BOTH int pitch() const { return terms + kPad<E>; }
  template <class Arena>
  FSQ_BOTH static Panel carve(Arena& arena, int gates, int units, int terms) {
    Panel p;
    p.units = units;
    p.terms = terms;
    p.data = arena.template take<E>(gates * units * p.pitch());
    return p;
  }
};

// Sums in shared memory: [parts][gates][rows][units + 1].
struct Sums {
  SharedSpan<float> data;
  int gates, rows, units;

  FSQ_BOTH int at(int part, int gate, int row, int unit) const {
    return ((part * gates + gate) * rows + row) * (units + 1) + unit;
  }
  template <class Arena>
  FSQ_BOTH static Sums carve(Arena& arena, int parts, int gates, int rows, int units) {
    Sums s;
    s.gates = gates;
    s.rows = rows;
    s.units = units;
    s.data = arena.template take<float>(parts * gates * rows * (units + 1));
    return s;
  }
};

template <int N>
using Accumulators = float[N][kMaxRows / kRowTile][4];

// One tile of 16 terms: terms k0 .. of the panel by column j of the slice at `from`.
template <int N, class E>
FSQ_DEVICE void multiply_tile(const Panel<E>& w, const Slices<E>& v, int tile, int k0, int from, int j,
                              Accumulators<N>& acc) {
  constexpr int kHalf = kVector<E>;
  const int lane = int(threadIdx.x) % 32, half = lane % 16;
  FSQ_UNROLL
  for (int k = 0; k < kTermTile; k += 2 * kHalf) {
    uint32_t b[4];
    // Matrices: rows 0..7 with the first and the second half of the terms, then rows 8..15.
    if (v.rows > kRowTile) {
      ptx::ldmatrix<4>(b, v.data.address(from + (lane % 8 + lane / 16 * 8) * v.pitch() + j + k + half / 8 * kHalf));
    } else {
      uint32_t few[2];
      ptx::ldmatrix<2>(few, v.data.address(from + lane % 8 * v.pitch() + j + k + half / 8 * kHalf));
      b[0] = few[0];
      b[1] = few[1];
      b[2] = b[3] = 0;
    }
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    FSQ_UNROLL
    for (int g = 0; g < N; ++g) {
      uint32_t a[4];
      ptx::ldmatrix<4>(
          a, w.data.address((g * w.units + tile * kUnitTile + half) * w.pitch() + k0 + k + lane / 16 * kHalf));
      multiply_add<E>(acc[g][0], a, first);
      if (v.rows > kRowTile) multiply_add<E>(acc[g][1], a, second);
    }
  }
}

template <int N>
FSQ_DEVICE void multiply_tile(const Panel<float>& w, const Slices<float>& v, int tile, int k0, int from, int j,
                              Accumulators<N>& acc) {
  const int lane = int(threadIdx.x) % 32, unit = tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int k = 0; k < kTermTile; k += 4) {
    FSQ_UNROLL
    for (int n = 0; n < kMaxRows / kRowTile; ++n) {
      if (n * kRowTile >= v.rows) continue;
      const float4 x0 = v.data.template load<float4>(from + (n * kRowTile + row) * v.pitch() + j + k);
      const float4 x1 = v.data.template load<float4>(from + (n * kRowTile + row + 1) * v.pitch() + j + k);
      FSQ_UNROLL
      for (int i = 0; i < 2 * N; ++i) {
        const int g = i / 2, below = i % 2;
        const float4 a = w.data.template load<float4>((g * w.units + unit + below * 8) * w.pitch() + k0 + k);
        float* const d = acc[g][n] + 2 * below;
        d[0] = fma(a.w, x0.w, fma(a.z, x0.z, fma(a.y, x0.y, fma(a.x, x0.x, d[0]))));
        d[1] = fma(a.w, x1.w, fma(a.z, x1.z, fma(a.y, x1.y, fma(a.x, x1.x, d[1]))));
      }
    }
  }
}

// By all warps of the block: the sums of buffer `which`. A barrier must follow before they are read.
template <int N, class E>
FSQ_DEVICE void multiply(const Panel<E>& w, const Slices<E>& v, int which, int parts, const Sums& sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, tiles = w.units / kUnitTile;
  const int tile = warp % tiles, part = warp / tiles;
  Accumulators<N> acc = {};
  int rank = 0, j = part * kTermTile;
  for (int k0 = j; k0 < w.terms; k0 += parts * kTermTile, j += parts * kTermTile) {
    for (; j >= v.width; j -= v.width) ++rank;
    multiply_tile(w, v, tile, k0, v.at(which, rank), j, acc);
  }
  const int unit = tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int g = 0; g < N; ++g) FSQ_UNROLL
  for (int n = 0; n < kMaxRows / kRowTile; ++n)
    if (n * kRowTile < v.rows) FSQ_UNROLL
  for (int i = 0; i < 4; ++i)
    sums.data.store(sums.at(part, g, n * kRowTile + row + i % 2, unit + i / 2 * 8), acc[g][n][i]);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
