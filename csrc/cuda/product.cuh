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

// What arrives from all ranks: one or two buffers of `ranks` slices of `rows` rows of `width` values. Where there is
// one it is every buffer.
template <class E>
struct Slices {
  SharedSpan<E> data;
  int ranks, rows, width, buffers;

  FSQ_BOTH int pitch() const { return width + kPad<E>; }
  FSQ_BOTH int slice() const { return rows * pitch(); }
  FSQ_BOTH int at(int which, int rank) const { return ((which & (buffers - 1)) * ranks + rank) * slice(); }
  FSQ_DEVICE E get(int which, int rank, int row, int column) const {
    return data[at(which, rank) + row * pitch() + column];
  }
  FSQ_DEVICE void put(int which, int rank, int row, int column, E value) const {
    data.store(at(which, rank) + row * pitch() + column, value);
  }
  template <class Arena>
  FSQ_BOTH static Slices carve(Arena& arena, int ranks, int rows, int width, int buffers = 2) {
    Slices s;
    s.buffers = buffers;
    s.ranks = ranks;
    s.rows = rows;
    s.width = width;
    s.data = arena.template take<E>(buffers * ranks * s.slice());
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

  // weight.pair(g, u, k, x): the elements k, which is even, and k + 1 of the panel, zeros beyond the terms.
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
        E pair[2];
        weight.pair(g, u, k, pair);
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

// Weights in global memory, of a panel that fits nowhere else: read at every step, through L2, as A of mma.sync, one
// access of 16 bytes for a lane: [tiles of units][tiles of terms][N][32 lanes].
template <int N>
struct Packed {
  static constexpr bool kThere = true;
  const uint4* data;

  FSQ_BOTH static int64_t size(int units, int terms) {
    return int64_t(units / kUnitTile) * (terms / kTermTile) * N * 32;
  }
};

// Where a panel has all that registers do not hold.
struct Unpacked {
  static constexpr bool kThere = false;
};

// What the lane of element i of a packed panel holds; `weight` as in Held.
template <class E, int N, class Weight>
FSQ_DEVICE uint4 pack_fragment(int i, int terms, const Weight& weight) {
  const int lane = i % 32, g = i / 32 % N, tile = i / 32 / N % (terms / kTermTile);
  const int unit = i / 32 / N / (terms / kTermTile) * kUnitTile + lane / 4, k = tile * kTermTile + lane % 4 * 2;
  uint32_t a[4];
  FSQ_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int u = unit + j % 2 * 8, kk = k + j / 2 * 8;
    E pair[2];
    weight.pair(g, u, kk, pair);
    memcpy(&a[j], pair, 4);
  }
  return {a[0], a[1], a[2], a[3]};
}

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

// The tiles of terms that a warp multiplies: every `parts`-th of all, which lie in the slices of one rank after the
// other. Made once: it holds what would be divided at every step.
struct Task {
  int tile, part;        // of units; among the warps that share it
  int count;             // tiles of terms
  int begin, in, slice;  // element of the first within a buffer of slices, its tile within its slice; tiles of a slice
  int hop, far, back;    // to the next: tiles, elements; and elements more where it lies beyond the slice

  template <class E>
  FSQ_DEVICE Task(const Panel<E>& w, const Slices<E>& v, int parts) {
    const int warp = int(threadIdx.x) / 32, tiles = w.units / kUnitTile;
    tile = warp % tiles;
    part = warp / tiles;
    slice = v.width / kTermTile;
    count = (w.terms / kTermTile - part + parts - 1) / parts;
    in = part % slice;
    begin = part / slice * v.slice() + in * kTermTile;
    hop = parts % slice;
    far = parts / slice * v.slice() + hop * kTermTile;
    back = v.slice() - v.width;
  }
};

// Where a warp is among its tiles.
struct Walk {
  int at, in;

  FSQ_DEVICE void advance(const Task& task) {
    at += task.far;
    in += task.hop;
    if (in >= task.slice) {
      in -= task.slice;
      at += task.back;
    }
  }
};

// The state of one or two tiles of rows as B of mma.sync; `from`: of this lane, in the slice and at the terms.
template <int Tiles, class E>
FSQ_DEVICE void load_state(uint32_t from, uint32_t (&b)[Tiles][2]) {
  if constexpr (Tiles == 2) {
    // Matrices: rows 0..7 with the first and the second half of the terms, then rows 8..15.
    uint32_t all[4];
    ptx::ldmatrix<4>(all, from);
    memcpy(b, all, sizeof(all));
  } else {
    ptx::ldmatrix<2>(b[0], from);
  }
}

// One tile of 16 terms. w, v: shared addresses of this lane's row of the panel and of the state, at the first term;
// gate: bytes from one gate's rows to the next.
template <int N, int Tiles, class E>
FSQ_DEVICE void multiply_tile(uint32_t w, uint32_t gate, uint32_t v, float (&acc)[N][Tiles][4]) {
  FSQ_UNROLL
  for (int k = 0; k < kTermTile * int(sizeof(E)); k += 32) {
    uint32_t b[Tiles][2];
    load_state<Tiles, E>(v + uint32_t(k), b);
    FSQ_UNROLL
    for (int g = 0; g < N; ++g) {
      uint32_t a[4];
      ptx::ldmatrix<4>(a, w + uint32_t(g) * gate + uint32_t(k));
      FSQ_UNROLL
      for (int n = 0; n < Tiles; ++n) multiply_add<E>(acc[g][n], a, b[n]);
    }
  }
}

// The same of float32 that keeps its digits, by every thread for what it would own in an accumulator of mma.sync.
template <int N, int Tiles>
FSQ_DEVICE void multiply_tile_exactly(const Panel<float>& w, const Slices<float>& v, int tile, int k0, int from,
                                      float (&acc)[N][Tiles][4]) {
  const int lane = int(threadIdx.x) % 32, unit = tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int k = 0; k < kTermTile; k += 4) {
    FSQ_UNROLL
    for (int n = 0; n < Tiles; ++n) {
      const float4 x0 = v.data.template load<float4>(from + (n * kRowTile + row) * v.pitch() + k);
      const float4 x1 = v.data.template load<float4>(from + (n * kRowTile + row + 1) * v.pitch() + k);
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

// One product waits for the one before it in the same sum, some 30 clocks; a warp that has one gate alone forms four
// sums side by side.
template <int N, class E>
constexpr int kChains = std::is_same_v<E, float> || N > 2 ? 1 : 4 / N;

template <int N, int Tiles, class E, int HeldTiles, class Packing>
FSQ_DEVICE void multiply_rows(const Task& task, const Panel<E>& w, const Held<N, HeldTiles>& held,
                              const Packing& packed, const Slices<E>& v, int which, int parts, const Sums& sums) {
  constexpr int kSums = kChains<N, E>;
  constexpr uint32_t kBytes = sizeof(E);
  const int lane = int(threadIdx.x) % 32;
  float acc[kSums][N][Tiles][4] = {};
  Walk walk{v.at(which, 0) + task.begin, task.in};
  int left = task.count, k0 = task.part * kTermTile;
  if constexpr (std::is_same_v<E, float>) {
    for (; left > 0; --left, k0 += parts * kTermTile, walk.advance(task))
      multiply_tile_exactly<N, Tiles>(w, v, task.tile, k0, walk.at, acc[0]);
  } else {
    const int state_row = Tiles == 2 ? lane % 8 + lane / 16 * 8 : lane % 8;
    const uint32_t state = v.data.address(state_row * v.pitch() + lane % 16 / 8 * kVector<E>);
    if constexpr (HeldTiles > 0) {
      FSQ_UNROLL
      for (int t = 0; t < HeldTiles; ++t) {
        if (t < task.count) {
          uint32_t b[Tiles][2];
          load_state<Tiles, E>(state + uint32_t(walk.at) * kBytes, b);
          FSQ_UNROLL
          for (int g = 0; g < N; ++g) FSQ_UNROLL
          for (int n = 0; n < Tiles; ++n) multiply_add<E>(acc[t % kSums][g][n], held.a[t][g], b[n]);
        }
        walk.advance(task);
      }
      left -= HeldTiles;
      k0 += HeldTiles * parts * kTermTile;
    }
    if constexpr (Packing::kThere) {
      // Loads for as many tiles as there are registers for are under way together.
      constexpr int kDeep = N > 2 ? 2 : 8 / N;
      const int hop = parts * N * 32;
      const uint4* from = packed.data + (int64_t(task.tile) * (w.terms / kTermTile) + task.part) * N * 32 + lane;
      for (; left > 0; left -= kDeep, from += kDeep * hop) {
        uint4 a[kDeep][N];
        FSQ_UNROLL
        for (int c = 0; c < kDeep; ++c)
          if (c < left) FSQ_UNROLL
        for (int g = 0; g < N; ++g) a[c][g] = from[c * hop + g * 32];
        FSQ_UNROLL
        for (int c = 0; c < kDeep; ++c) {
          if (c >= left) continue;
          uint32_t b[Tiles][2];
          load_state<Tiles, E>(state + uint32_t(walk.at) * kBytes, b);
          FSQ_UNROLL
          for (int g = 0; g < N; ++g) {
            const uint32_t fragment[4] = {a[c][g].x, a[c][g].y, a[c][g].z, a[c][g].w};
            FSQ_UNROLL
            for (int n = 0; n < Tiles; ++n) multiply_add<E>(acc[c % kSums][g][n], fragment, b[n]);
          }
          walk.advance(task);
        }
      }
    } else if (left > 0) {
      const uint32_t gate = uint32_t(w.units * w.pitch()) * kBytes, hop = uint32_t(parts * kTermTile) * kBytes;
      uint32_t from = w.data.address(w.at(task.tile * kUnitTile + lane % 16, k0 + lane / 16 * kVector<E>));
      const auto one = [&](auto& into) {
        multiply_tile<N, Tiles, E>(from, gate, state + uint32_t(walk.at) * kBytes, into);
        from += hop;
        walk.advance(task);
      };
      constexpr int kTogether = kSums > 1 ? kSums : 2;
      for (; left >= kTogether; left -= kTogether) FSQ_UNROLL
      for (int c = 0; c < kTogether; ++c) one(acc[c % kSums]);
      FSQ_UNROLL
      for (int c = 0; c < kTogether - 1; ++c)
        if (c < left) one(acc[c % kSums]);
    }
  }
  const int unit = task.tile * kUnitTile + lane / 4, row = lane % 4 * 2;
  FSQ_UNROLL
  for (int g = 0; g < N; ++g) FSQ_UNROLL
  for (int n = 0; n < Tiles; ++n) FSQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    float sum = acc[0][g][n][i];
    FSQ_UNROLL
    for (int c = 1; c < kSums; ++c) sum += acc[c][g][n][i];
    sums.data.store(sums.at(task.part, g, n * kRowTile + row + i % 2, unit + i / 2 * 8), sum);
  }
}

// By all warps of the block: the sums of buffer `which`. A barrier must follow before they are read.
template <int N, int Rows, class E, int HeldTiles, class Packing>
FSQ_DEVICE void multiply(const Task& task, const Panel<E>& w, const Held<N, HeldTiles>& held, const Packing& packed,
                         const Slices<E>& v, int which, int parts, const Sums& sums) {
  if (Rows > kRowTile && v.rows > kRowTile)
    multiply_rows<N, Rows / kRowTile>(task, w, held, packed, v, which, parts, sums);
  else
    multiply_rows<N, 1>(task, w, held, packed, v, which, parts, sums);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
