// Attention's backward pass, keys: a CTA owns the gradients of a tile of keys and values and goes over the rows that
// see them, which are the queries of all heads of their group.
//
// Keys are the rows of the accumulators, 16 MT to a warp, so that P^T and dS^T are left operands of the next products
// as they come out of the first two, and nothing but tensors passes through shared memory. Rows come in tiles of
// `kStream`, the next one while one is worked on.
#include "cuda/attention_backward_keys.cuh"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

// W: padded size of a head, up to 128: wider ones have registers for one of the two sums only. PLAIN: plain_logits().
// Two tiles of keys to a warp halve what it reads of rows, where registers allow it.
template <class E, int W, bool PLAIN>
struct Keys {
  static constexpr int kWarps = 4, kTiles = W <= 64 ? 2 : 1, kThreads = 32 * kWarps, kOwn = 16 * kTiles * kWarps;
  static constexpr int kStream = W <= 64 ? 64 : 32;
  static constexpr bool kHold = W <= 64 && PLAIN;  // whether registers hold a warp's keys and values
  static constexpr int kPart = W <= 64 ? 16 : 32;  // rows of a tile that registers have room for at a time

  Operand<E, W> k, v;
  // Two stages of kStream rows each.
  Operand<E, W> q, dout;
  RowTable<!PLAIN> rows;
  KeptTable kept;

  template <class Arena>
  FSQ_BOTH static Keys carve(Arena& arena, bool dropout) {
    Keys m;
    m.k = Operand<E, W>::carve(arena, kOwn);
    m.v = Operand<E, W>::carve(arena, kOwn);
    m.q = Operand<E, W>::carve(arena, 2 * kStream);
    m.dout = Operand<E, W>::carve(arena, 2 * kStream);
    m.rows = RowTable<!PLAIN>::carve(arena, 2 * kStream);
    m.kept = KeptTable::carve(arena, dropout ? 2 * kStream : 0, kOwn);
    return m;
  }
};

template <class E, int W, bool PLAIN>
__global__ void __launch_bounds__(Keys<E, W, PLAIN>::kThreads)
    attention_backward_keys_kernel(const __grid_constant__ CudaAttentionGradParams g, const KeysLayout layout) {
  typedef Keys<E, W, PLAIN> K;
  constexpr int MT = K::kTiles, NT = K::kPart / 8;
  const AttentionParams& p = g.fwd.a;
  SharedArena arena = dynamic_shared();
  const K memory = K::carve(arena, p.dropout);
  const int thread = int(threadIdx.x), warp_row = thread / 32 * 16 * MT;
  const Work work(p, int64_t(blockIdx.x), p.cu_k, layout.tiles, layout.section, 1, K::kOwn, false);
  const Sequence s(p, work.n);
  const int j0 = work.first, stored = p.cu_k ? s.S : int(p.S);
  if (j0 >= stored) return;
  bool global;
  const Range rows = rows_to_meet(g.fwd, s, j0, K::kOwn, K::kStream, global);

  const auto own = [&](const Operand<E, W>& to, const Heads& t, int64_t width, bool aligned) {
    to.load(static_cast<const E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn, int(width), aligned,
            thread, K::kThreads, [&](int r) { return j0 + r < s.S ? (j0 + r) * t.sn : int64_t(-1); });
  };
  own(memory.k, p.k, p.E, layout.k);
  own(memory.v, p.v, p.Ev, layout.v);

  const Random random = random_of(g.fwd);
  const auto load = [&](int stage, int row0) {
    const int at = stage * K::kStream;
    const auto query = [&](int r) { return Query(p, s, work.hkv, row0 + r); };
    const auto stream = [&](const Operand<E, W>& to, const Heads& t, int64_t width, bool aligned) {
      load_queries<K::kThreads>(to, p, s, work.hkv, row0, t, width, aligned, layout.even, thread);
    };
    stream(memory.q.part(at, K::kStream), p.q, p.E, layout.q);
    stream(memory.dout.part(at, K::kStream), g.dout, p.Ev, layout.dout);
    memory.rows.part(at, K::kStream).fill(g, s, thread, K::kThreads, query);
    ptx::cp_async_commit();
    if (!PLAIN && p.dropout)
      memory.kept.part(at, K::kStream).fill(random, s, K::kStream, s.k0 + j0, K::kOwn, thread, K::kThreads, query);
  };

  // Which of this thread's keys are seen from everywhere.
  uint32_t flags = 0;
  if (!PLAIN && global)
    for (int r = 0; r < 2 * MT; ++r) {
      const int j = j0 + accumulator_row(warp_row, 0) + 8 * r;
      if (j < s.S) flags |= uint32_t(p.global_keys[s.b * p.global_sb + s.k0 + j] != 0) << r;
    }
  const GradientNumbers numbers = GradientNumbers::of<!PLAIN>(p, s);
  const int to_block = (s.k0 + j0) % kRandomKeys;
  float dk[MT][W / 8][4] = {}, dv[MT][W / 8][4] = {};

  int stage = 0;
  ptx::cp_async_commit();
  if (rows.first < rows.last) load(0, rows.first);
  LeftRows<MT, W> held_k, held_v;
  if (K::kHold && rows.first < rows.last) {
    ptx::cp_async_wait<1>();  // rows may still be under way
    __syncthreads();
    held_k.load(memory.k, warp_row);
    held_v.load(memory.v, warp_row);
  }
  for (int row0 = rows.first; row0 < rows.last; row0 += K::kStream, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other one any more
    if (row0 + K::kStream < rows.last) load(stage ^ 1, row0 + K::kStream);
    if constexpr (!PLAIN)
      if (p.dense.data && !allows(p, memory.rows.part(stage * K::kStream, K::kStream), K::kOwn, s.S, thread,
                                  K::kThreads, [&](int n) { return j0 + n; }))
        continue;

    const bool edge = !rows.whole(row0, K::kStream);
    FSQ_UNROLL_BY(1)
    for (int part = 0; part < K::kStream && row0 + part < rows.last; part += K::kPart) {
      const int at = stage * K::kStream + part;
      const Operand<E, W> q = memory.q.part(at, K::kPart), dout = memory.dout.part(at, K::kPart);
      float x[MT][NT][4] = {}, y[MT][NT][4] = {};
      if constexpr (K::kHold) {
        multiply_rows(x, held_k, q);
        multiply_rows(y, held_v, dout);
      } else {
        multiply_rows(x, memory.k, warp_row, q);
        multiply_rows(y, memory.v, warp_row, dout);
      }
      if (numbers.scaled && edge) {
        FSQ_UNROLL
        for (int n = 0; n < NT; ++n) FSQ_UNROLL
        for (int m = 0; m < MT; ++m) FSQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int j = j0 + accumulator_row(warp_row + 16 * m, e / 2), r = at + accumulator_column(n, e);
          if (!numbers.sees(j, j - memory.rows.diagonal[r], Look::window, false)) x[m][n][e] = -infinity();
        }
      }
      const auto elements = [&](auto full) {
        FSQ_UNROLL
        for (int n = 0; n < NT; ++n) {
          uint32_t kept[2] = {};
          if (numbers.dropout) {
            FSQ_UNROLL
            for (int e = 0; e < 2; ++e) kept[e] = memory.kept.bits(at + accumulator_column(n, e), to_block + warp_row);
          }
          FSQ_UNROLL
          for (int m = 0; m < MT; ++m) FSQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int own_row = accumulator_row(16 * m, e / 2);
            float unused = 0;
            gradient<decltype(full)::value, false>(p, numbers, memory.rows, at + accumulator_column(n, e),
                                                   j0 + warp_row + own_row, global ? Look::both : Look::window,
                                                   flags >> (2 * m + e / 2) & 1, edge, kept[e % 2] >> own_row & 1,
                                                   x[m][n][e], y[m][n][e], unused);
          }
        }
      };
      by_logits<!PLAIN>(numbers, elements);
      multiply_columns(dv, x, dout);
      multiply_columns(dk, y, q);
    }
  }
  ptx::cp_async_wait<0>();

  // Keys behind the length of a row have a gradient too, which is 0.
  const auto store = [&](const float (&sums)[MT][W / 8][4], const Heads& t, int64_t width, float scale) {
    E* const base = static_cast<E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn;
    FSQ_UNROLL
    for (int m = 0; m < MT; ++m)
      store_rows<E, W>(sums[m], base, int(width), scale, warp_row + 16 * m,
                       [&](int r) { return j0 + r < stored ? (j0 + r) * t.sn : int64_t(-1); });
  };
  store(dk, g.dk, p.E, float(p.scale));
  store(dv, g.dv, p.Ev, 1.0f);
}

template <class E, int W, bool PLAIN>
std::string launch(const CudaAttentionGradParams& g) {
  return launch_keys<Keys<E, W, PLAIN>, W>(&attention_backward_keys_kernel<E, W, PLAIN>, g);
}

}  // namespace

int attention_backward_keys_bytes(const AttentionParams& p) {
  return for_heads(p, [&](auto e, auto w) {
    constexpr int W = decltype(w)::value;
    if constexpr (W > 128) {
      return attention_backward_keys_pairs_bytes(p);
    } else {
      SharedArena arena;
      Keys<decltype(e), W, false>::carve(arena, p.dropout);
      return arena.bytes();
    }
  });
}

std::string attention_backward_keys(const CudaAttentionGradParams& g) {
  return for_heads(g.fwd.a, [&](auto e, auto w) -> std::string {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    if constexpr (W > 128)
      return attention_backward_keys_pairs(g);
    else
      return plain_logits(g.fwd.a) ? launch<E, W, true>(g) : launch<E, W, false>(g);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
