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

// Weights of this rank: `gates` blocks of `units` rows of `terms` values, of which the first `held` are in registers.
template <class E>
struct Panel {
  SharedSpan<E> data;
  int units, terms, held;

  FSQ_BOTH int pitch() const { return terms - held + kPad<E>; }
  FSQ_BOTH int at(int row, int k) const { return row * pitch() + k - held; }
  template <class Arena>
  FSQ_BOTH static Panel carve(Arena& arena, int gates, int units, int terms, int held = 0) {
    Panel p;
    p.units = units;
    p.terms = terms;
    p.held = held < terms ? held : terms;
    p.data = arena.template take<E>(p.held < terms ? gates * units * p.pitch() : 0);
    return p;
  }
};

// Weights in registers: a warp's first Tiles tiles of 16 terms, for N gates, as A of mma.sync.
template <int N, int Tiles>
struct Held {
  uint32_t a[Tiles][N][4];

  // weight(g, u, k): an element of the panel, zero beyond the terms.
  template <class E, class Weight>
  FSQ_DEVICE void load(const Panel<E>& w, int parts, const Weight& weight) {
    static_assert(sizeof(E) == 2, "registers hold pairs");
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, tiles = w.units / kUnitTile;
    const int unit = warp % tiles * kUnitTile + lane / 4, k0 = warp / tiles * kTermTile + lane % 4 * 2;
    FSQ_UNROLL
    for (int t = 0; t < Tiles; ++t) {
      FSQ_UNROLL
      for (int g = 0; g < N; ++g) FSQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int u = unit + i % 2 * 8, k = k0 + t * parts * kTermTile + i / 2 * 8;
        const E pair[2] = {weight(g, u, k), weight(g, u, k + 1)};
        memcpy(&a[t][g][i], pair, 4);
      }
    }
  }
};
template <int N>
struct Held<N, 0> {
  template <class E, class Weight>
  FSQ_DEVICE void load(const Panel<E>&, int, const Weight&) {}
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

template <int N, int Rows>
using Accumulators = float[N][Rows / kRowTile][4];

// The state of up to two tiles of rows as B of mma.sync, terms from `at` on, which is row 0 of a slice.
template <int Rows, class E>
FSQ_DEVICE void load_state(const Slices<E>& v, int at, uint32_t (&b)[2][2]) {
  const int lane = int(threadIdx.x) % 32, column = at + lane % 16 / 8 * kVector<E>;
  if (Rows > kRowTile && v.rows > kRowTile) {
    // Matrices: rows 0..7 with the first and the second half of the terms, then rows 8..15.
    uint32_t all[4];
    ptx::ldmatrix<4>(all, v.data.address(column + (lane % 8 + lane / 16 * 8) * v.pitch()));
    memcpy(b, all, sizeof(all));
  } else {
    ptx::ldmatrix<2>(b[0], v.data.address(column + lane % 8 * v.pitch()));
    b[1][0] = b[1][1] = 0;
  }
}
template <int Rows, class E>
FSQ_DEVICE void multiply_rows(float (&d)[Rows / kRowTile][4], const uint32_t (&a)[4], const uint32_t (&b)[2][2],
                              const Slices<E>& v) {
  multiply_add<E>(d[0], a, b[0]);
  if constexpr (Rows > kRowTile)
    if (v.rows > kRowTile) multiply_add<E>(d[1], a, b[1]);
}

// One tile of 16 terms: terms k0 .. of the panel by column j of the slice at `from`.
template <int N, int Rows, class E>
FSQ_DEVICE void multiply_tile(const Panel<E>& w, const Slices<E>& v, int tile, int k0, int from, int j,
                              Accumulators<N, Rows>& acc) {
  const int lane = int(threadIdx.x) % 32, unit = tile * kUnitTile + lane % 16;
  FSQ_UNROLL
  for (int k = 0; k < kTermTile; k += 2 * kVector<E>) {
    uint32_t b[2][2];
    load_state<Rows>(v, from + j + k, b);
    FSQ_UNROLL
    for (int g = 0; g < N; ++g) {
      uint32_t a[4];
      ptx::ldmatrix<4>(a, w.data.address(w.at(g * w.units + unit, k0 + k + lane / 16 * kVector<E>)));
      multiply_rows<Rows>(acc[g], a, b, v);
    }
  }
}

// The same of float32 that keeps its digits, by every thread for what it would own in an accumulator of mma.sync.
template <int N, int Rows>
FSQ_DEVICE void multiply_tile_exactly(const Panel<float>& w, const Slices<float>& v, int tile, int k0, int from, int j,
                                      Accumulators<N, Rows>& acc) {
  const int lane = int(threadIdx.x) % 32, unit = tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int k = 0; k < kTermTile; k += 4) {
    FSQ_UNROLL
    for (int n = 0; n < Rows / kRowTile; ++n) {
      if (n * kRowTile >= v.rows) continue;
      const float4 x0 = v.data.template load<float4>(from + (n * kRowTile + row) * v.pitch() + j + k);
      const float4 x1 = v.data.template load<float4>(from + (n * kRowTile + row + 1) * v.pitch() + j + k);
      FSQ_UNROLL
      for (int i = 0; i < 2 * N; ++i) {
        const int g = i / 2, below = i % 2;
        const float4 a = w.data.template load<float4>(w.at(g * w.units + unit + below * 8, k0 + k));
        float* const d = acc[g][n] + 2 * below;
        d[0] = fma(a.w, x0.w, fma(a.z, x0.z, fma(a.y, x0.y, fma(a.x, x0.x, d[0]))));
        d[1] = fma(a.w, x1.w, fma(a.z, x1.z, fma(a.y, x1.y, fma(a.x, x1.x, d[1]))));
      }
    }
  }
}

// By all warps of the block: the sums of buffer `which`. A barrier must follow before they are read.
template <int N, int Rows, class E, int Tiles>
FSQ_DEVICE void multiply(const Panel<E>& w, const Held<N, Tiles>& held, const Slices<E>& v, int which, int parts,
                         const Sums& sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, tiles = w.units / kUnitTile;
  const int tile = warp % tiles, part = warp / tiles;
  Accumulators<N, Rows> acc = {};
  int rank = 0, k0 = part * kTermTile, j = k0;
  const auto advance = [&] {
    k0 += parts * kTermTile;
    j += parts * kTermTile;
    for (; j >= v.width; j -= v.width) ++rank;
  };
  for (; j >= v.width; j -= v.width) ++rank;
  if constexpr (Tiles > 0) {
    FSQ_UNROLL
    for (int t = 0; t < Tiles; ++t) {
      if (k0 < w.terms) {
        uint32_t b[2][2];
        load_state<Rows>(v, v.at(which, rank) + j, b);
        FSQ_UNROLL
        for (int g = 0; g < N; ++g) multiply_rows<Rows>(acc[g], held.a[t][g], b, v);
      }
      advance();
    }
  }
  for (; k0 < w.terms; advance()) {
    if constexpr (std::is_same_v<E, float>)
      multiply_tile_exactly<N, Rows>(w, v, tile, k0, v.at(which, rank), j, acc);
    else
      multiply_tile<N, Rows>(w, v, tile, k0, v.at(which, rank), j, acc);
  }
  const int unit = tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int g = 0; g < N; ++g) FSQ_UNROLL
  for (int n = 0; n < Rows / kRowTile; ++n)
    if (n * kRowTile < v.rows) FSQ_UNROLL
  for (int i = 0; i < 4; ++i)
    sums.data.store(sums.at(part, g, n * kRowTile + row + i % 2, unit + i / 2 * 8), acc[g][n][i]);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
