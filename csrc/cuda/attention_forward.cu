// Attention's forward pass: online softmax over the keys that a tile of rows sees (Dao et al. 2022, arXiv:2205.14135,
// 2307.08691), products by mma.sync.
//
// A CTA owns a tile of rows of one pair, each warp 16 MT of them. Of keys and values there is one tile of 64 in shared
// memory each: values arrive while scores are made, the next keys while values are used. Few rows with many keys
// (decoding) get CTAs of one warp, and their keys are cut into parts.
#include "cuda/attention.h"

#include "cuda/attention_operand.cuh"
#include "cuda/attention_scores.cuh"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kKeys = 64, kKeyTiles = kKeys / 8;
constexpr float kSlack = 8;  // RowSum::absorb

// W: padded size of a head. PLAIN: plain_logits(). WARPS warps with MT tiles of 16 rows each.
template <class E, int W, bool PLAIN, int WARPS, int MT>
struct Forward {
  static constexpr int kThreads = 32 * WARPS, kRows = 16 * MT * WARPS;
  // Whether registers hold a warp's queries from the first tile of keys to the last.
  static constexpr bool kHold = W <= 64;
  // CTAs of an SM, which bounds the registers of a thread.
  static constexpr int kResident = WARPS == 1 ? 8 : WARPS == 8 ? 1 : 2;

  struct Memory {
    Operand<E, W> q, k, v;
    SharedSpan<int> diagonal;  // of each row the key that it is aligned with: what a plain call's masks take

    template <class Arena>
    FSQ_BOTH static Memory carve(Arena& arena) {
      Memory m;
      m.q = Operand<E, W>::carve(arena, kRows);
      m.k = Operand<E, W>::carve(arena, kKeys);
      m.v = Operand<E, W>::carve(arena, kKeys);
      if (PLAIN) m.diagonal = arena.template take<int>(kRows);
      return m;
    }
  };
};

struct Layout {
  int64_t tiles, section;
  bool q, kv, out;  // 16-byte rows
};

typedef float Scores[kKeyTiles][4];

// Row r of the products of a tile at key j0: minus infinity where the row, aligned with key d, does not see the key.
FSQ_DEVICE void hide(Scores& x, int r, const Window& window, int d, int j0) {
  FSQ_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) FSQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int j = j0 + accumulator_column(n, e);
    if (!window.near(j - d) || !window.has(j)) x[n][2 * r + e] = -infinity();
  }
}

// The same where a bit of `seen` is not set.
FSQ_DEVICE void hide(Scores& x, int r, uint32_t seen) {
  if (seen == ~0u >> (32 - 2 * kKeyTiles)) return;
  FSQ_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) FSQ_UNROLL
  for (int e = 0; e < 2; ++e)
    if (!(seen >> (2 * n + e) & 1)) x[n][2 * r + e] = -infinity();
}

// Row r of the products becomes logits, minus infinity where a bit of `seen` is not set.
FSQ_DEVICE void alter(Scores& x, int r, const AttentionParams& p, const Sequence& s, const Query& q,
                      const GlobalKeys& far, const KeyTile& tile, uint32_t seen) {
  const bool altered = altered_logits(p);
  const Logits logits(p, s, q);
  FSQ_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) FSQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    float& y = x[n][2 * r + e];
    float tangent;
    if (!(seen >> (2 * n + e) & 1))
      y = -infinity();
    else if (altered)
      y = logits.of(p, q, y, tile.key(far, accumulator_column(n, e)), tangent);
    else
      y *= logits.scale * float(kLog2e);
  }
}

// Row r of the weights: zero where dropout says so.
FSQ_DEVICE void drop(Scores& x, int r, const Random& random, const Sequence& s, const Query& q, const GlobalKeys& far,
                     const KeyTile& tile) {
  const uint32_t kept = kept_keys<kKeyTiles>(random, s, q, far, tile);
  FSQ_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) FSQ_UNROLL
  for (int e = 0; e < 2; ++e)
    if (!(kept >> (2 * n + e) & 1)) x[n][2 * r + e] = 0;
}

template <class E, int W, bool PLAIN, int WARPS, int MT>
__global__ void __launch_bounds__(Forward<E, W, PLAIN, WARPS, MT>::kThreads, Forward<E, W, PLAIN, WARPS, MT>::kResident)
    attention_forward(const __grid_constant__ CudaAttentionParams c, const Layout layout) {
  typedef Forward<E, W, PLAIN, WARPS, MT> F;
  const AttentionParams& p = c.a;
  SharedArena arena = dynamic_shared();
  const typename F::Memory memory = F::Memory::carve(arena);
  const int thread = int(threadIdx.x), warp_row = thread / 32 * 16 * MT;
  const Work work(p, int64_t(blockIdx.x), p.cu_q, layout.tiles, layout.section, heads_of_group(p), F::kRows,
                  p.causal != 0);
  const Sequence s(p, work.n);
  const int rows = s.L * heads_of_group(p), last_row = work.first + F::kRows - 1;
  if (work.first >= rows) return;

  const int part = int(blockIdx.y), lower = c.parts > 1 ? part * int(c.part) : 0;
  const int upper = c.parts > 1 ? lower + int(c.part) : s.S;
  const int reach = p.causal ? least(least(last_row, rows - 1) / heads_of_group(p) + s.diagonal + 1, s.S) : s.S;
  const GlobalKeys far = PLAIN ? GlobalKeys() : GlobalKeys(c, s, reach);
  KeyWalk<!PLAIN, kKeys> walk{key_range(p, s, work.first, last_row, lower, upper, kKeys), {0, 0}, far.last};
  walk.tile.j0 = walk.near.first;
  if (c.parts > 1 && part + 1 < c.parts) walk.far_end = far.first;
  walk.settle(far);

  const auto query_at = [&](int r) {
    const Query q(p, s, work.hkv, work.first + r);
    return q.real ? s.b * p.q.sb + q.h * p.q.sh + int64_t(s.q0 + q.i) * p.q.sn : int64_t(-1);
  };
  memory.q.load(static_cast<const E*>(p.q.data), int(p.E), layout.q, thread, F::kThreads, query_at);
  if (PLAIN)
    for (int r = thread; r < F::kRows; r += F::kThreads)
      memory.diagonal.store(r, Query(p, s, work.hkv, work.first + r).d);
  const auto load = [&](const Operand<E, W>& to, const Heads& t, int64_t width) {
    const E* const base = static_cast<const E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn;
    if (layout.kv && !walk.picked())
      to.template load_even<F::kThreads>(base, int(width), F::kThreads / (W / kChunk) * t.sn, s.S - walk.tile.j0,
                                         thread, [&](int r) { return (walk.tile.j0 + r) * t.sn; });
    else
      to.load(base, int(width), layout.kv, thread, F::kThreads, [&](int r) {
        const int j = walk.key(far, r);
        return j < s.S ? j * t.sn : int64_t(-1);
      });
    ptx::cp_async_commit();
  };

  float sums[MT][W / 8][4] = {};
  RowSum row_sums[MT][2];
  FSQ_UNROLL
  for (int m = 0; m < MT; ++m) FSQ_UNROLL
  for (int r = 0; r < 2; ++r) row_sums[m][r] = {-infinity(), 0.0f};
  const Random random = random_of(c);
  // A scale above 0 that is all that makes logits is applied by the softmax, which finds a row's maximum before it.
  const bool scaled = PLAIN || (!altered_logits(p) && p.scale > 0);
  const float scale = scaled ? float(p.scale * kLog2e) : 1.0f;
  // Where the keys begin and end that this warp's rows see near the diagonal; empty if it has none.
  const int warp_first = work.first + warp_row, warp_last = least(warp_first + 16 * MT, rows) - 1;
  const int warp_begin = Query(p, s, work.hkv, warp_first).begin;
  const int warp_end = warp_first < rows ? Query(p, s, work.hkv, warp_last).end : 0;

  // Moves on to the first tile that a table of booleans lets some row see.
  uint32_t seen[MT][2];
  const auto look = [&] {
    for (; !PLAIN; walk.step(far)) {
      if (walk.done()) return;
      const bool edge = walk.tile.picked() || !walk.near.whole(walk.tile.j0, kKeys);
      uint32_t any = 0;
      FSQ_UNROLL
      for (int m = 0; m < MT; ++m) FSQ_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Query q(p, s, work.hkv, accumulator_row(work.first + warp_row + 16 * m, r));
        any |= seen[m][r] = visible_keys<kKeyTiles>(p, s, q, far, walk.tile, edge);
      }
      if (!p.dense.data || __syncthreads_or(any != 0)) return;
    }
  };
  look();
  ptx::cp_async_commit();
  if (!walk.done()) load(memory.k, p.k, p.E);
  LeftRows<MT, W> held;
  if (F::kHold && !walk.done()) {
    ptx::cp_async_wait<1>();  // keys may still be under way
    __syncthreads();
    held.load(memory.q, warp_row);
  }

  while (!walk.done()) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // keys are there, and nobody reads values any more
    const KeyTile tile = walk.tile;
    load(memory.v, p.v, p.Ev);
    const bool busy = warp_first < rows && (walk.picked() || (tile.j0 < warp_end && tile.j0 + kKeys > warp_begin));
    uint32_t weights[MT][kKeyTiles / 2][4];
    if (busy) {
      float x[MT][kKeyTiles][4] = {};
      if constexpr (F::kHold)
        multiply_rows(x, held, memory.k);
      else
        multiply_rows(x, memory.q, warp_row, memory.k);
      if (!PLAIN || !walk.near.whole(tile.j0, kKeys)) {
        const Window window(p, s);
        FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = accumulator_row(warp_row + 16 * m, r);
          if constexpr (PLAIN)
            hide(x[m], r, window, memory.diagonal[row], tile.j0);
          else if (scaled)
            hide(x[m], r, seen[m][r]);
          else
            alter(x[m], r, p, s, Query(p, s, work.hkv, work.first + row), far, tile, seen[m][r]);
        }
      }
      float shrink[MT][2];
      FSQ_UNROLL
      for (int m = 0; m < MT; ++m) FSQ_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = accumulator_row(warp_first + 16 * m, r);
        shrink[m][r] = row_sums[m][r].absorb(x[m], r, scale, kSlack);
        if (!PLAIN && p.dropout) drop(x[m], r, random, s, Query(p, s, work.hkv, row), far, tile);
      }
      bool shrinks = false;
      FSQ_UNROLL
      for (int m = 0; m < MT; ++m) shrinks |= shrink[m][0] != 1 || shrink[m][1] != 1;
      if (__any_sync(0xffffffffu, shrinks)) {
        FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int n = 0; n < W / 8; ++n) FSQ_UNROLL
        for (int e = 0; e < 4; ++e) sums[m][n][e] *= shrink[m][e / 2];
      }
      FSQ_UNROLL
      for (int m = 0; m < MT; ++m) FSQ_UNROLL
      for (int n = 0; n < kKeyTiles; n += 2) as_left<E>(weights[m][n / 2], x[m][n], x[m][n + 1]);
    }

    walk.step(far);
    look();
    ptx::cp_async_wait<0>();
    __syncthreads();  // values are there, and nobody reads keys any more
    if (!walk.done()) load(memory.k, p.k, p.E);
    if (busy) multiply_columns(sums, weights, memory.v);
  }

  FSQ_UNROLL
  for (int m = 0; m < MT; ++m) FSQ_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Query q(p, s, work.hkv, accumulator_row(work.first + warp_row + 16 * m, r));
    const float total = row_sum(row_sums[m][r].total), top = row_sums[m][r].top;
    const int64_t at = (s.b * p.Hq + q.h) * p.L + s.q0 + q.i;
    if (!q.real) continue;
    const int first = accumulator_column(0, 0);
    if (c.parts > 1) {
      const int64_t row = part * p.B * p.Hq * p.L + at;
      if (first == 0) {
        c.part_top[row] = top;
        c.part_total[row] = total;
      }
      FSQ_UNROLL
      for (int n = 0; n < W / 8; ++n) FSQ_UNROLL
      for (int e = 0; e < 2; ++e)
        if (8 * n + first + e < p.Ev) c.part_out[row * p.Ev + 8 * n + first + e] = sums[m][n][2 * r + e];
      continue;
    }
    const RowEnd end(p, q.h, top, total);
    if (first == 0) static_cast<float*>(p.lse)[at] = end.lse;
    E* const out = static_cast<E*>(p.out.data) + s.b * p.out.sb + q.h * p.out.sh + int64_t(s.q0 + q.i) * p.out.sn;
    FSQ_UNROLL
    for (int n = 0; n < W / 8; ++n) {
      const float low = sums[m][n][2 * r] * end.factor, high = sums[m][n][2 * r + 1] * end.factor;
      if (layout.out && 8 * n + 8 <= p.Ev) {
        *reinterpret_cast<uint32_t*>(out + 8 * n + first) = pack<E>(low, high);
      } else {
        if (8 * n + first < p.Ev) out[8 * n + first] = narrow<E>(low);
        if (8 * n + first + 1 < p.Ev) out[8 * n + first + 1] = narrow<E>(high);
      }
    }
  }
}

template <class E, int W, bool PLAIN, int WARPS, int MT>
std::string launch(const CudaAttentionParams& c) {
  typedef Forward<E, W, PLAIN, WARPS, MT> F;
  const AttentionParams& p = c.a;
  const int64_t G = p.Hq / p.Hkv;
  const Layout layout{tile_count(p, p.L, G, F::kRows), section(p), aligned(p.q), aligned(p.k) && aligned(p.v),
                      aligned(p.out)};
  const int64_t tiles = layout.tiles * (p.cu_q ? 1 : p.B) * p.Hkv;
  if (tiles == 0) return "";
  SharedArena arena;
  F::Memory::carve(arena);
  Launch launch("attention_forward", describe(p), dim3(unsigned(tiles), unsigned(c.parts)), dim3(F::kThreads));
  launch.shared = arena.bytes();
  launch.stream = static_cast<cudaStream_t>(c.stream);
  return run(&attention_forward<E, W, PLAIN, WARPS, MT>, launch, c, layout);
}

// Rows of a pair up to which one warp takes them all.
constexpr int64_t kFewRows = 16;

}  // namespace

}  // namespace FSQ_ISA

using namespace FSQ_ISA;

std::string cuda_attention_forward(const CudaAttentionParams& c) {
  const std::string error = for_heads(c.a, [&](auto e, auto w) -> std::string {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    if (c.a.L * (c.a.Hq / c.a.Hkv) <= kFewRows && !c.a.cu_q) return launch<E, W, false, 1, 1>(c);
    constexpr int kPlainTiles = W <= 128 ? 2 : 1, kWarps = W <= 128 ? 8 : 4;
    if (plain_logits(c.a)) return launch<E, W, true, 4, kPlainTiles>(c);
    return launch<E, W, false, kWarps, 1>(c);
  });
  return error.empty() && c.parts > 1 ? attention_merge_parts(c) : error;
}

}  // namespace fusedseq
