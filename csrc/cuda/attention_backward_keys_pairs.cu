// Attention's backward pass, keys of heads wider than 128: as attention_backward_keys.cu, but two warps share a tile of
// keys, one with the sum dv, the other with dk, for registers hold one of them. The first makes the scores and weights,
// the second the gradients of weights, for which it takes the weights over, in float32, through shared memory.
#include "cuda/attention_backward_keys.cuh"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

// W: padded size of a head. PLAIN: plain_logits(). A tile of rows is worked on in one go.
template <class E, int W, bool PLAIN>
struct KeyPairs {
  static constexpr int kPairs = 4, kWarps = 2 * kPairs, kThreads = 32 * kWarps;
  static constexpr int kOwn = 16 * kPairs, kStream = 32, kRowTiles = kStream / 8;

  Operand<E, W> own;     // keys, then values
  Operand<E, W> stream;  // two stages of kStream rows of q, then of dout
  RowTable<!PLAIN> rows;
  SharedSpan<float> weights;  // of each pair its accumulators, times the softcap's derivative
  KeptTable kept;

  template <class Arena>
  FSQ_BOTH static KeyPairs carve(Arena& arena, bool dropout) {
    KeyPairs m;
    m.own = Operand<E, W>::carve(arena, 2 * kOwn);
    m.stream = Operand<E, W>::carve(arena, 4 * kStream);
    m.rows = RowTable<!PLAIN>::carve(arena, 2 * kStream);
    m.weights = arena.template take<float>(kPairs * kRowTiles * 32 * 4);
    m.kept = KeptTable::carve(arena, dropout ? 2 * kStream : 0, kOwn);
    return m;
  }
};

template <class E, int W, bool PLAIN>
__global__ void __launch_bounds__(KeyPairs<E, W, PLAIN>::kThreads)
    attention_backward_keys_pairs_kernel(const __grid_constant__ CudaAttentionGradParams g, const KeysLayout layout) {
  typedef KeyPairs<E, W, PLAIN> K;
  constexpr int NT = K::kRowTiles;
  const AttentionParams& p = g.fwd.a;
  SharedArena arena = dynamic_shared();
  const K memory = K::carve(arena, p.dropout);
  const int thread = int(threadIdx.x), warp = thread / 32, pair = warp % K::kPairs, pair_row = pair * 16;
  const bool weighs = warp < K::kPairs;  // has dv, the other dk
  const Work work(p, int64_t(blockIdx.x), p.cu_k, layout.tiles, layout.section, 1, K::kOwn, false);
  const Sequence s(p, work.n);
  const int j0 = work.first, stored = p.cu_k ? s.S : int(p.S);
  if (j0 >= stored) return;
  bool global;
  const Range rows = rows_to_meet(g.fwd, s, j0, K::kOwn, K::kStream, global);

  const auto own = [&](int at, const Heads& t, int64_t width, bool aligned) {
    memory.own.part(at, K::kOwn)
        .load(static_cast<const E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn, int(width), aligned,
              thread, K::kThreads, [&](int r) { return j0 + r < s.S ? (j0 + r) * t.sn : int64_t(-1); });
  };
  own(0, p.k, p.E, layout.k);
  own(K::kOwn, p.v, p.Ev, layout.v);

  const Random random = random_of(g.fwd);
  const auto load = [&](int stage, int row0) {
    const int at = stage * K::kStream;
    const auto query = [&](int r) { return Query(p, s, work.hkv, row0 + r); };
    const auto stream = [&](int first, const Heads& t, int64_t width, bool aligned) {
      load_queries<K::kThreads>(memory.stream.part(first, K::kStream), p, s, work.hkv, row0, t, width, aligned,
                                layout.even, thread);
    };
    stream(at, p.q, p.E, layout.q);
    stream(2 * K::kStream + at, g.dout, p.Ev, layout.dout);
    memory.rows.part(at, K::kStream).fill(g, s, thread, K::kThreads, query);
    ptx::cp_async_commit();
    if (!PLAIN && p.dropout)
      memory.kept.part(at, K::kStream).fill(random, s, K::kStream, s.k0 + j0, K::kOwn, thread, K::kThreads, query);
  };

  // Which of this thread's keys are seen from everywhere.
  uint32_t flags = 0;
  if (!PLAIN && global)
    for (int r = 0; r < 2; ++r) {
      const int j = j0 + accumulator_row(pair_row, 0) + 8 * r;
      if (j < s.S) flags |= uint32_t(p.global_keys[s.b * p.global_sb + s.k0 + j] != 0) << r;
    }
  const GradientNumbers numbers = GradientNumbers::of<!PLAIN>(p, s);
  const int to_block = (s.k0 + j0) % kRandomKeys, own_row = weighs ? pair_row : K::kOwn + pair_row;
  const auto exchanged = [&](int n) { return ((pair * NT + n) * 32 + thread % 32) * 4; };
  float sums[1][W / 8][4] = {};

  int stage = 0;
  if (rows.first < rows.last) load(0, rows.first);
  for (int row0 = rows.first; row0 < rows.last; row0 += K::kStream, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other one or the weights any more
    if (row0 + K::kStream < rows.last) load(stage ^ 1, row0 + K::kStream);
    if constexpr (!PLAIN)
      if (p.dense.data && !allows(p, memory.rows.part(stage * K::kStream, K::kStream), K::kOwn, s.S, thread,
                                  K::kThreads, [&](int n) { return j0 + n; }))
        continue;

    const bool edge = !rows.whole(row0, K::kStream);
    const int at = stage * K::kStream, other = 2 * K::kStream + at;
    float x[1][NT][4] = {};
    multiply_rows(x, memory.own, own_row, memory.stream.part(weighs ? at : other, K::kStream));
    uint32_t kept[NT][2] = {};
    if (numbers.dropout) {
      FSQ_UNROLL
      for (int n = 0; n < NT; ++n) FSQ_UNROLL
      for (int e = 0; e < 2; ++e) kept[n][e] = memory.kept.bits(at + accumulator_column(n, e), to_block + pair_row);
    }
    const auto drop = [&](int n, int e, float y) {
      return dropped(numbers, kept[n][e % 2] >> accumulator_row(0, e / 2) & 1, y);
    };
    if (weighs) {
      const auto elements = [&](auto full) {
        FSQ_UNROLL
        for (int n = 0; n < NT; ++n) {
          float weight[4];
          FSQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int j = j0 + accumulator_row(pair_row, e / 2), r = at + accumulator_column(n, e);
            if (numbers.scaled && edge && !numbers.sees(j, j - memory.rows.diagonal[r], Look::window, false))
              x[0][n][e] = -infinity();
            float tangent;
            const float w =
                weigh<decltype(full)::value>(p, numbers, memory.rows, r, j, global ? Look::both : Look::window,
                                             flags >> (e / 2) & 1, edge, x[0][n][e], tangent);
            weight[e] = w * tangent;
            x[0][n][e] = drop(n, e, w);
          }
          memory.weights.template store<float4>(exchanged(n), make_float4(weight[0], weight[1], weight[2], weight[3]));
        }
      };
      by_logits<!PLAIN>(numbers, elements);
      ptx::barrier_arrive(1 + pair, 64);
    } else {
      ptx::barrier_sync(1 + pair, 64);  // the weights are there
      FSQ_UNROLL
      for (int n = 0; n < NT; ++n) {
        const float4 w = memory.weights.template load<float4>(exchanged(n));
        const float weight[4] = {w.x, w.y, w.z, w.w};
        FSQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int r = at + accumulator_column(n, e);
          x[0][n][e] = weight[e] * (drop(n, e, x[0][n][e]) - memory.rows.delta[r]);
        }
      }
    }
    multiply_columns(sums, x, memory.stream.part(weighs ? other : at, K::kStream));
  }
  ptx::cp_async_wait<0>();

  // Keys behind the length of a row have a gradient too, which is 0.
  const Heads& t = weighs ? g.dv : g.dk;
  E* const base = static_cast<E*>(t.data) + s.b * t.sb + work.hkv * t.sh + int64_t(s.k0) * t.sn;
  store_rows<E, W>(sums[0], base, int(weighs ? p.Ev : p.E), weighs ? 1.0f : float(p.scale), pair_row,
                   [&](int r) { return j0 + r < stored ? (j0 + r) * t.sn : int64_t(-1); });
}

template <class E, int W, bool PLAIN>
std::string launch(const CudaAttentionGradParams& g) {
  return launch_keys<KeyPairs<E, W, PLAIN>, W>(&attention_backward_keys_pairs_kernel<E, W, PLAIN>, g);
}

}  // namespace

int attention_backward_keys_pairs_bytes(const AttentionParams& p) {
  return for_heads(p, [&](auto e, auto w) {
    constexpr int W = decltype(w)::value;
    SharedArena arena;
    if constexpr (W > 128) KeyPairs<decltype(e), W, false>::carve(arena, p.dropout);
    return arena.bytes();
  });
}

std::string attention_backward_keys_pairs(const CudaAttentionGradParams& g) {
  return for_heads(g.fwd.a, [&](auto e, auto w) -> std::string {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    if constexpr (W > 128)
      return plain_logits(g.fwd.a) ? launch<E, W, true>(g) : launch<E, W, false>(g);
    else
      return "heads of up to 128 are another kernel's";
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
