// The gradient of attention's bias: a CTA owns a tile of the table and sums, in order, what it is broadcast over.
#include "cuda/attention_backward.h"
#include "cuda/attention_gradients.cuh"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps, kKeys = 32, kPitch = kKeys + 1;

template <class E, int W>
struct Memory {
  Operand<E, W> q, dout, k, v;
  RowTable<true> rows;
  KeptTable kept;
  SharedSpan<float> sums;  // [kRows][kPitch]

  template <class Arena>
  FSQ_BOTH static Memory carve(Arena& arena, bool dropout) {
    Memory m;
    m.q = Operand<E, W>::carve(arena, kRows);
    m.dout = Operand<E, W>::carve(arena, kRows);
    m.k = Operand<E, W>::carve(arena, kKeys);
    m.v = Operand<E, W>::carve(arena, kKeys);
    m.rows = RowTable<true>::carve(arena, kRows);
    m.kept = KeptTable::carve(arena, dropout ? kRows : 0, kKeys);
    m.sums = arena.template take<float>(kRows * kPitch);
    return m;
  }
};

struct Layout {
  int64_t row_tiles, key_tiles, sequences;
  bool q, k, v, dout;  // 16-byte rows
};

// What a job goes over: its own part of a dimension of the table, or all of one that the table is broadcast over.
struct Span {
  int64_t first, last;

  FSQ_DEVICE Span(int64_t& job, int64_t stride, int64_t size) : first(0), last(size) {
    if (stride == 0) return;
    first = job % size;
    last = first + 1;
    job /= size;
  }
};

// Whether a row of the tile and a key of it can meet in this sequence.
FSQ_DEVICE bool meets(const CudaAttentionParams& c, const Sequence& s, int row0, int key0) {
  const AttentionParams& p = c.a;
  const int d_low = most(row0 - s.q0, 0) + s.diagonal, d_high = least(row0 + kRows - s.q0, s.L) - 1 + s.diagonal;
  const int j_low = most(key0 - s.k0, 0), j_high = least(key0 + kKeys - s.k0, s.S) - 1;
  if (d_low > d_high || j_low > j_high) return false;
  if (c.ranks) {
    const int32_t* const ranks = c.ranks + s.b * c.ranks_sb + s.k0;
    if (ranks[j_high + 1] > ranks[j_low]) return true;
  }
  return (p.left < 0 || j_high >= d_low - p.left) && (p.right < 0 || j_low <= d_high + p.right);
}

template <class E, int W>
// Three CTAs fit a multiprocessor; without the bound ptxas aims at four and spills.
__global__ void __launch_bounds__(kThreads, 3)
    attention_backward_bias_kernel(const __grid_constant__ CudaAttentionGradParams g, const Layout layout) {
  constexpr int NT = kKeys / 8;
  const AttentionParams& p = g.fwd.a;
  SharedArena arena = dynamic_shared();
  const Memory<E, W> memory = Memory<E, W>::carve(arena, p.dropout);
  const int thread = int(threadIdx.x), warp_row = thread / 32 * 16, G = heads_of_group(p);
  int64_t job = int64_t(blockIdx.x);
  const Span keys(job, g.dbias.ss, layout.key_tiles), rows(job, g.dbias.sl, layout.row_tiles);
  const Span heads(job, g.dbias.sh, p.Hq), batch(job, g.dbias.sb, layout.sequences);
  const Random random = random_of(g.fwd);
  float sums[NT][4] = {};

  for (int64_t n = batch.first; n < batch.last; ++n) {
    const Sequence s(p, int(n));
    const GradientNumbers numbers = GradientNumbers::of<true>(p, s);
    for (int64_t h = heads.first; h < heads.last; ++h)
      for (int64_t row_tile = rows.first; row_tile < rows.last; ++row_tile)
        for (int64_t key_tile = keys.first; key_tile < keys.last; ++key_tile) {
          const int row0 = int(row_tile) * kRows, key0 = int(key_tile) * kKeys, hkv = int(h) / G;
          if (!meets(g.fwd, s, row0, key0)) continue;
          const auto query = [&](int r) {
            const int i = row0 + r - s.q0;
            Query q(p, s, hkv, i * G + int(h) % G);
            q.real = i >= 0 && i < s.L;
            return q;
          };
          const auto key = [&](int column) { return key0 + column - s.k0; };
          __syncthreads();  // nobody reads the last tile any more
          const auto load = [&](const Operand<E, W>& to, const Heads& t, int64_t head, int64_t width, bool aligned,
                                int first, int from, int count) {
            to.load(static_cast<const E*>(t.data) + s.b * t.sb + head * t.sh, int(width), aligned, thread, kThreads,
                    [&](int r) {
                      const int at = first + r - from;
                      return at >= 0 && at < count ? int64_t(first + r) * t.sn : int64_t(-1);
                    });
          };
          load(memory.q, p.q, h, p.E, layout.q, row0, s.q0, s.L);
          load(memory.dout, g.dout, h, p.Ev, layout.dout, row0, s.q0, s.L);
          load(memory.k, p.k, hkv, p.E, layout.k, key0, s.k0, s.S);
          load(memory.v, p.v, hkv, p.Ev, layout.v, key0, s.k0, s.S);
          memory.rows.fill(g, s, thread, kThreads, query);
          ptx::cp_async_commit();
          if (p.dropout) memory.kept.fill(random, s, kRows, key0, kKeys, thread, kThreads, query);
          ptx::cp_async_wait<0>();
          __syncthreads();

          float x[1][NT][4] = {}, y[1][NT][4] = {};
          multiply_rows(x, memory.q, warp_row, memory.k);
          multiply_rows(y, memory.dout, warp_row, memory.v);
          FSQ_UNROLL
          for (int c = 0; c < NT; ++c) FSQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int r = accumulator_row(warp_row, e / 2), column = accumulator_column(c, e), j = key(column);
            const bool global = g.fwd.ranks && j >= 0 && j < s.S && p.global_keys[s.b * p.global_sb + s.k0 + j];
            const bool kept = !p.dropout || memory.kept.bits(r, key0 % kRandomKeys + column) & 1;
            float unused = 0;
            gradient<true, true>(p, numbers, memory.rows, r, j, g.fwd.ranks ? Look::both : Look::window, global, true,
                                 kept, x[0][c][e], y[0][c][e], unused);
            sums[c][e] += y[0][c][e];
          }
        }
  }

  FSQ_UNROLL
  for (int c = 0; c < NT; ++c) FSQ_UNROLL
  for (int e = 0; e < 4; ++e)
    memory.sums.store(accumulator_row(warp_row, e / 2) * kPitch + accumulator_column(c, e), sums[c][e]);
  __syncthreads();
  const int height = g.dbias.sl ? kRows : 1, width = g.dbias.ss ? kKeys : 1;
  float* const to = static_cast<float*>(g.dbias.data) + batch.first * g.dbias.sb + heads.first * g.dbias.sh;
  for (int n = thread; n < height * width; n += kThreads) {
    const int64_t i = rows.first * kRows + n / width, j = keys.first * kKeys + n % width;
    if ((g.dbias.sl && i >= p.L) || (g.dbias.ss && j >= p.S)) continue;
    float sum = 0;
    for (int r = g.dbias.sl ? n / width : 0; r < (g.dbias.sl ? n / width + 1 : kRows); ++r)
      for (int c = g.dbias.ss ? n % width : 0; c < (g.dbias.ss ? n % width + 1 : kKeys); ++c)
        sum += memory.sums[r * kPitch + c];
    to[(g.dbias.sl ? i * g.dbias.sl : 0) + (g.dbias.ss ? j * g.dbias.ss : 0)] = sum;
  }
}

}  // namespace

int attention_backward_bias_bytes(const AttentionParams& p) {
  return for_heads(p, [&](auto e, auto w) {
    SharedArena arena;
    Memory<decltype(e), decltype(w)::value>::carve(arena, p.dropout);
    return arena.bytes();
  });
}

std::string attention_backward_bias(const CudaAttentionGradParams& g) {
  const AttentionParams& p = g.fwd.a;
  const Layout layout{tiles_of(p.L, kRows), tiles_of(p.S, kKeys), p.cu_q ? p.N : p.B, aligned(p.q),
                      aligned(p.k),         aligned(p.v),         aligned(g.dout)};
  const int64_t jobs = (g.dbias.ss ? layout.key_tiles : 1) * (g.dbias.sl ? layout.row_tiles : 1) *
                       (g.dbias.sh ? p.Hq : 1) * (g.dbias.sb ? layout.sequences : 1);
  if (jobs == 0) return "";
  return for_heads(p, [&](auto e, auto w) {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    SharedArena arena;
    Memory<E, W>::carve(arena, p.dropout);
    Launch launch("attention_backward_bias", describe(p), dim3(unsigned(jobs)), dim3(kThreads));
    launch.shared = arena.bytes();
    launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
    return run(&attention_backward_bias_kernel<E, W>, launch, g, layout);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
