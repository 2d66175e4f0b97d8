// Attention's backward pass, queries: a CTA owns dq of a tile of rows of one pair and goes over the keys that they see,
// computing the gradients of their logits a second time, so that nobody waits for anybody and no sum is atomic.
//
// Rows are the rows of the accumulators: dS is the left operand of the third product as it comes out of the first two.
#include "cuda/attention_backward.h"
#include "cuda/attention_gradients.cuh"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

// W: padded size of a head. PLAIN: plain_logits(). Two tiles of rows to a warp halve what it reads of keys, where
// registers allow it.
template <class E, int W, bool PLAIN>
struct Queries {
  static constexpr int kWarps = 4, kTiles = W <= 128 ? 2 : 1, kThreads = 32 * kWarps, kOwn = 16 * kTiles * kWarps;
  static constexpr int kStream = W <= 64 ? 64 : 32;
  static constexpr bool kHold = W <= 64 && PLAIN;             // whether registers hold a warp's rows of q and dout
  static constexpr int kPart = W == 128 && !PLAIN ? 16 : 32;  // keys of a tile that registers have room for at a time

  Operand<E, W> q, dout;
  RowTable<!PLAIN> rows;
  // Two stages of kStream keys each.
  Operand<E, W> k, v;
  KeptTable kept;

  template <class Arena>
  FSQ_BOTH static Queries carve(Arena& arena, bool dropout) {
    Queries m;
    m.q = Operand<E, W>::carve(arena, kOwn);
    m.dout = Operand<E, W>::carve(arena, kOwn);
    m.rows = RowTable<!PLAIN>::carve(arena, kOwn);
    m.k = Operand<E, W>::carve(arena, 2 * kStream);
    m.v = Operand<E, W>::carve(arena, 2 * kStream);
    m.kept = KeptTable::carve(arena, dropout ? 2 * kOwn : 0, kStream);
    return m;
  }
};

struct Layout {
  int64_t tiles, section;
  bool q, k, v, dout;  // 16-byte rows
};

template <class E, int W, bool PLAIN>
__global__ void __launch_bounds__(Queries<E, W, PLAIN>::kThreads)
    attention_backward_queries_kernel(const __grid_constant__ CudaAttentionGradParams g, const Layout layout) {
  typedef Queries<E, W, PLAIN> Q;
  constexpr int MT = Q::kTiles, NT = Q::kPart / 8;
  const AttentionParams& p = g.fwd.a;
  SharedArena arena = dynamic_shared();
  const Q memory = Q::carve(arena, p.dropout);
  const int thread = int(threadIdx.x), warp_row = thread / 32 * 16 * MT;
  const Work work(p, int64_t(blockIdx.x), p.cu_q, layout.tiles, layout.section, heads_of_group(p), Q::kOwn,
                  p.causal != 0);
  const Sequence s(p, work.n);
  const int rows = s.L * heads_of_group(p), last_row = work.first + Q::kOwn - 1;
  if (work.first >= rows) return;

  const int reach = p.causal ? least(least(last_row, rows - 1) / heads_of_group(p) + s.diagonal + 1, s.S) : s.S;
  const GlobalKeys far = PLAIN ? GlobalKeys() : GlobalKeys(g.fwd, s, reach);
  KeyWalk<!PLAIN, Q::kStream> walk{key_range(p, s, work.first, last_row, 0, s.S, Q::kStream), {0, 0}, far.last};
  walk.tile.j0 = walk.near.first;
  walk.settle(far);

  const auto query = [&](int r) { return Query(p, s, work.hkv, work.first + r); };
  const auto own = [&](const Operand<E, W>& to, const Heads& t, int64_t width, bool aligned) {
    to.load(static_cast<const E*>(t.data) + s.b * t.sb, int(width), aligned, thread, Q::kThreads, [&](int r) {
      const Query q = query(r);
      return q.real ? q.h * t.sh + int64_t(s.q0 + q.i) * t.sn : int64_t(-1);
    });
  };
  own(memory.q, p.q, p.E, layout.q);
  own(memory.dout, g.dout, p.Ev, layout.dout);
  memory.rows.fill(g, s, thread, Q::kThreads, query);

  const Random random = random_of(g.fwd);
  // Where the bits lie of the tile that is loaded, and of which block of keys: those of a whole block serve all its
  // tiles.
  int kept_stage = 0, kept_block = -1;
  const auto load = [&](int stage) {
    const KeyTile tile = walk.tile;
    const auto stream = [&](const Operand<E, W>& o, const Heads& t, int64_t width, bool aligned) {
      const E* const base = static_cast<const E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn;
      if (aligned && !walk.picked())
        o.template load_even<Q::kThreads>(base, int(width), Q::kThreads / (W / kChunk) * t.sn, s.S - tile.j0, thread,
                                          [&](int r) { return (tile.j0 + r) * t.sn; });
      else
        o.load(base, int(width), aligned, thread, Q::kThreads, [&](int r) {
          const int j = walk.key(far, r);
          return j < s.S ? j * t.sn : int64_t(-1);
        });
    };
    stream(memory.k.part(stage * Q::kStream, Q::kStream), p.k, p.E, layout.k);
    stream(memory.v.part(stage * Q::kStream, Q::kStream), p.v, p.Ev, layout.v);
    ptx::cp_async_commit();
    if (!PLAIN && p.dropout) {
      const int key = s.k0 + tile.j0, block = key / kRandomKeys;
      const bool within = !tile.picked() && (key + Q::kStream - 1) / kRandomKeys == block;
      if (within && block == kept_block) return;
      kept_block = within ? block : -1;
      kept_stage ^= 1;
      const KeptTable to = memory.kept.part(kept_stage * Q::kOwn, Q::kOwn);
      if (tile.picked())
        to.fill_picked(random, s, Q::kOwn, far, tile.at, Q::kStream, thread, Q::kThreads, query);
      else
        to.fill(random, s, Q::kOwn, key, Q::kStream, thread, Q::kThreads, query);
    }
  };

  const GradientNumbers numbers = GradientNumbers::of<!PLAIN>(p, s);
  float dq[MT][W / 8][4] = {}, slopes[MT][2] = {};
  int stage = 0;
  ptx::cp_async_commit();
  if (!walk.done()) load(0);
  LeftRows<MT, W> held_q, held_dout;
  if (Q::kHold && !walk.done()) {
    ptx::cp_async_wait<1>();  // keys may still be under way
    __syncthreads();
    held_q.load(memory.q, warp_row);
    held_dout.load(memory.dout, warp_row);
  }
  for (; !walk.done(); stage ^= 1) {
    const KeyTile tile = walk.tile;
    const bool picked = walk.picked();
    const int kept_row = kept_stage * Q::kOwn;
    walk.step(far);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other one any more
    if (!walk.done()) load(stage ^ 1);
    if constexpr (!PLAIN)
      if (p.dense.data &&
          !allows(p, memory.rows, Q::kStream, s.S, thread, Q::kThreads, [&](int n) { return tile.key(far, n); }))
        continue;

    const bool edge = picked || !walk.near.whole(tile.j0, Q::kStream);
    const int to_block = picked ? 0 : (s.k0 + tile.j0) % kRandomKeys;
    FSQ_UNROLL_BY(1)
    for (int part = 0; part < Q::kStream; part += Q::kPart) {
      if (picked ? tile.at + part >= far.last : tile.j0 + part >= walk.near.last) break;
      const int at = stage * Q::kStream + part;
      const Operand<E, W> k = memory.k.part(at, Q::kPart), v = memory.v.part(at, Q::kPart);
      float x[MT][NT][4] = {}, y[MT][NT][4] = {};
      if constexpr (Q::kHold) {
        multiply_rows(x, held_q, k);
        multiply_rows(y, held_dout, v);
      } else {
        multiply_rows(x, memory.q, warp_row, k);
        multiply_rows(y, memory.dout, warp_row, v);
      }
      if (numbers.scaled && edge) {
        FSQ_UNROLL
        for (int n = 0; n < NT; ++n) FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int r = accumulator_row(warp_row + 16 * m, e / 2), j = tile.j0 + part + accumulator_column(n, e);
          if (!numbers.sees(j, j - memory.rows.diagonal[r], Look::window, false)) x[m][n][e] = -infinity();
        }
      }
      uint32_t kept[MT][2] = {};
      if (numbers.dropout) {
        FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int half = 0; half < 2; ++half)
          kept[m][half] = memory.kept.bits(kept_row + accumulator_row(warp_row + 16 * m, half), to_block + part);
      }
      const auto elements = [&](auto full) {
        FSQ_UNROLL
        for (int n = 0; n < NT; ++n) FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int c = accumulator_column(n, e);
          gradient<decltype(full)::value, false>(p, numbers, memory.rows, accumulator_row(warp_row + 16 * m, e / 2),
                                                 PLAIN ? tile.j0 + part + c : tile.key(far, part + c),
                                                 picked ? Look::beyond : Look::window, false, edge,
                                                 kept[m][e / 2] >> c & 1, x[m][n][e], y[m][n][e], slopes[m][e / 2]);
        }
      };
      by_logits<!PLAIN>(numbers, elements);
      multiply_columns(dq, y, k);
    }
  }
  ptx::cp_async_wait<0>();

  FSQ_UNROLL
  for (int m = 0; m < MT; ++m) {
    if (g.dq.data)
      store_rows<E, W>(dq[m], static_cast<E*>(g.dq.data) + s.b * g.dq.sb, int(p.E), float(p.scale), warp_row + 16 * m,
                       [&](int r) {
                         const Query q = query(r);
                         return q.real ? q.h * g.dq.sh + int64_t(s.q0 + q.i) * g.dq.sn : int64_t(-1);
                       });
    if (!PLAIN && g.slopes) {
      FSQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Query q = query(accumulator_row(warp_row + 16 * m, half));
        const float sum = row_sum(slopes[m][half]);
        if (q.real && ptx::lane() % 4 == 0) g.slopes[(s.b * p.Hq + q.h) * p.L + s.q0 + q.i] = sum;
      }
    }
  }
}

template <class E, int W, bool PLAIN>
std::string launch(const CudaAttentionGradParams& g) {
  typedef Queries<E, W, PLAIN> Q;
  const AttentionParams& p = g.fwd.a;
  const Layout layout{
      tile_count(p, p.L, p.Hq / p.Hkv, Q::kOwn), section(p), aligned(p.q), aligned(p.k), aligned(p.v), aligned(g.dout)};
  const int64_t tiles = layout.tiles * (p.cu_q ? 1 : p.B) * p.Hkv;
  if (tiles == 0) return "";
  SharedArena arena;
  Q::carve(arena, p.dropout);
  Launch launch("attention_backward_queries", describe(p), dim3(unsigned(tiles)), dim3(Q::kThreads));
  launch.shared = arena.bytes();
  launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
  return run(&attention_backward_queries_kernel<E, W, PLAIN>, launch, g, layout);
}

}  // namespace

int attention_backward_queries_bytes(const AttentionParams& p) {
  return for_heads(p, [&](auto e, auto w) {
    SharedArena arena;
    Queries<decltype(e), decltype(w)::value, false>::carve(arena, p.dropout);
    return arena.bytes();
  });
}

std::string attention_backward_queries(const CudaAttentionGradParams& g) {
  return for_heads(g.fwd.a, [&](auto e, auto w) {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    return plain_logits(g.fwd.a) ? launch<E, W, true>(g) : launch<E, W, false>(g);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
