// Attention's forward pass for Hopper: the online softmax of attention_forward.cu around wgmma and tensor copies, after
// FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).
//
// A tile has 128 queries of one head, or 192 where heads have 64 elements. A consumer issues the scores of the next
// keys before it adds the values of the last ones, so that its exponentials run beside both; and the consumers take
// turns in issuing, so that one's products run while the other is at its exponentials.
//
// Values past the length of a sequence that is shorter than the tensor are set to 0 before they are used, since 0 times
// NaN is NaN.
#include "cuda/attention_hopper.cuh"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kKeys = 128, kStages = 2;
// The consumers, and what 65536 registers leave for each thread: 384 threads begin with 168, 512 with 128.
template <int W>
struct Team {
  static constexpr int kConsumers = kQueryConsumers<W>, kRows = kConsumers * kGroupRows;
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
};
template <int W>
constexpr int kProducerRegisters = Team<W>::kConsumers == 2 ? 40 : 32;
template <int W>
constexpr int kConsumerRegisters = Team<W>::kConsumers == 2 ? 232 : 160;
// Named barriers: that of values that are cleared, and those of turns.
enum Named { kCleared = 1, kTurnOfFirst = 2 };

// W columns.
template <class E, int W>
struct Memory {
  SharedSpan<E> q, k, v;
  Ring<1> queries;
  Ring<kStages> keys, values;

  template <class Arena>
  FSQ_BOTH static Memory carve(Arena& arena) {
    Memory m;
    m.q = arena.template take<E>(Team<W>::kRows * W, kPatternBytes);
    m.k = arena.template take<E>(kStages * kKeys * W, kPatternBytes);
    m.v = arena.template take<E>(kStages * kKeys * W, kPatternBytes);
    m.queries = Ring<1>::carve(arena);
    m.keys = Ring<kStages>::carve(arena);
    m.values = Ring<kStages>::carve(arena);
    return m;
  }

  FSQ_DEVICE void initialise() const {
    queries.initialise(1, Team<W>::kConsumers * 4);
    keys.initialise(1, Team<W>::kConsumers * 4);
    values.initialise(1, Team<W>::kConsumers * 4);
    ptx::fence_mbarrier_init();
  }
};

struct Maps {
  TensorMap q, k, v;
};

// One tile of queries and the tiles of keys that it sees. Every query head is a pair of its own here (p.Hkv = p.Hq).
template <int W>
struct Tile {
  Work work;
  Sequence s;
  Range keys;
  int blocks;

  FSQ_DEVICE Tile(const AttentionParams& p, const Schedule& schedule, int index)
      : work(int(p.B), schedule.heads, index, schedule.tiles, schedule.section, Team<W>::kRows, p.causal != 0),
        s(p, work.n),
        keys(keys_of_queries(p, s, work.first, work.first + Team<W>::kRows - 1, 0, s.S, kKeys)),
        blocks(keys.last > keys.first ? (keys.last - keys.first + kKeys - 1) / kKeys : 0) {}
};

// One thread.
template <class E, int W>
FSQ_DEVICE void produce(const CudaAttentionParams& c, const Schedule& schedule, const Memory<E, W>& m,
                        const TensorMap* q, const TensorMap* k, const TensorMap* v) {
  ptx::prefetch_tensor_map(q);
  ptx::prefetch_tensor_map(k);
  ptx::prefetch_tensor_map(v);
  Stage<kStages> keys, values;
  Stage<1> queries;
  each_tile(schedule, [&](int index) {
    const Tile<W> t(c.a, schedule, index);
    if (t.blocks == 0) return;
    const int head = t.work.hkv / schedule.group;
    const auto load = [&](const auto& ring, auto& stage, const SharedSpan<E>& to, const TensorMap* map, int block) {
      ring.wait_empty(stage, c.fault);
      ptx::mbarrier_arrive_expect_tx(ring.full(stage.at()), kTileBytes<kKeys, W, E>);
      load_tile<kKeys, W>(to, stage.at() * kKeys * W, map, t.keys.first + block * kKeys, head, t.s.b,
                          ring.full(stage.at()));
      stage.step();
    };
    m.queries.wait_empty(queries, c.fault);
    ptx::mbarrier_arrive_expect_tx(m.queries.full(0), kTileBytes<Team<W>::kRows, W, E>);
    load_tile<Team<W>::kRows, W>(m.q, 0, q, t.work.first, t.work.hkv, t.s.b, m.queries.full(0));
    queries.step();
    load(m.keys, keys, m.k, k, 0);
    for (int block = 0; block < t.blocks; ++block) {
      if (block + 1 < t.blocks) load(m.keys, keys, m.k, k, block + 1);
      load(m.values, values, m.v, v, block);
    }
  });
}

// One warpgroup, number `which` of the consumers.
template <class E, int W>
struct Consumer {
  const AttentionParams& p;
  uint32_t* const fault;
  const Memory<E, W>& m;
  const int which;
  const uint64_t queries, all_keys, all_values;  // descriptors
  Stage<kStages> keys, values;
  Stage<1> tile;
  float x[kKeys / 8][4], sums[W / 8][4];
  uint32_t weights[kKeys / 16][4];
  RowSum rows[2];

  FSQ_DEVICE Consumer(const CudaAttentionParams& c, const Memory<E, W>& m, int which)
      : p(c.a),
        fault(c.fault),
        m(m),
        which(which),
        queries(terms_across(m.q.address(which * kGroupRows * kPanel))),
        all_keys(terms_across(m.k.address(0))),
        all_values(terms_down<kKeys>(m.v.address(0))) {}

  // The next group of wgmma: x = Q K^T for the keys of the current stage.
  FSQ_DEVICE void score() {
    multiply_across<Team<W>::kRows, kKeys, W, E>(flat(x), queries,
                                                 ptx::advance(all_keys, uint32_t(keys.at()) * kTileBytes<kKeys, W, E>));
    ptx::wgmma_commit();
  }
  // The next group of wgmma: sums += weights V for the values of the current stage.
  FSQ_DEVICE void add_values() {
    multiply_down<kKeys / 16, E>(flat(sums), weights,
                                 ptx::advance(all_values, uint32_t(values.at()) * kTileBytes<kKeys, W, E>));
    ptx::wgmma_commit();
  }

  // x becomes weights, of keys from j0 on; what earlier sums are to be multiplied with goes into `shrink`.
  FSQ_DEVICE void soften(const Query (&q)[2], const Range& mine, int j0, float scale, float (&shrink)[2]) {
    if (!mine.whole(j0, kKeys)) {
      FSQ_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) FSQ_UNROLL
      for (int i = 0; i < 4; ++i)
        if (!q[i / 2].sees(j0 + accumulator_column(n, i), false)) x[n][i] = -infinity();
    }
    FSQ_UNROLL
    for (int r = 0; r < 2; ++r) shrink[r] = rows[r].absorb(x, r, scale);
  }

  FSQ_DEVICE void run(const Tile<W>& t) {
    const int first_row = t.work.first + which * kGroupRows;
    const int row = first_row + int(threadIdx.x) % kGroup / 32 * 16;
    const Query q[2] = {Query(p, t.s, t.work.hkv, accumulator_row(row, 0)),
                        Query(p, t.s, t.work.hkv, accumulator_row(row, 1))};
    const Range mine = keys_of_queries(p, t.s, first_row, first_row + kGroupRows - 1, 0, t.s.S, kKeys);
    const float scale = float(p.scale * kLog2e);
    clear(sums);
    rows[0] = rows[1] = {-infinity(), 0.0f};
    if (t.blocks) {
      float shrink[2];
      int j0 = t.keys.first;
      m.queries.wait_full(tile, fault);
      tile.step();
      m.keys.wait_full(keys, fault);
      ptx::wgmma_fence(x);
      score();
      ptx::wgmma_wait<0>(x);
      m.keys.release(keys.at());
      keys.step();
      soften(q, mine, j0, scale, shrink);
      pack_columns<E>(weights, x);
      for (int block = 1; block < t.blocks; ++block) {
        j0 += kKeys;
        m.keys.wait_full(keys, fault);
        m.values.wait_full(values, fault);
        ptx::barrier_sync(kTurnOfFirst + which, 2 * kGroup);
        ptx::wgmma_fence(x, sums, weights);
        score();
        add_values();
        ptx::barrier_arrive(kTurnOfFirst + (which + 1 < Team<W>::kConsumers ? which + 1 : 0), 2 * kGroup);
        ptx::wgmma_wait<1>(x);
        m.keys.release(keys.at());
        keys.step();
        soften(q, mine, j0, scale, shrink);
        // x as well, lest it is packed before, into registers beside those in flight, which there are not.
        ptx::wgmma_wait<0>(sums, x);
        m.values.release(values.at());
        values.step();
        FSQ_UNROLL
        for (int n = 0; n < W / 8; ++n) FSQ_UNROLL
        for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
        pack_columns<E>(weights, x);
      }
      m.queries.release(0);
      m.values.wait_full(values, fault);
      if (t.s.S < p.S && t.s.S - j0 < kKeys)
        clear_rows<kKeys, W, Team<W>::kConsumers>(m.v, values.at() * kKeys * W, t.s.S - j0, kCleared);
      ptx::wgmma_fence(sums, weights);
      add_values();
      ptx::wgmma_wait<0>(sums);
      m.values.release(values.at());
      values.step();
    }
    FSQ_UNROLL
    for (int r = 0; r < 2; ++r) {
      const RowEnd end(p, q[r].h, rows[r].top, row_sum(rows[r].total));
      if (!q[r].real) continue;
      const int first = accumulator_column(0, 0);
      if (first == 0) static_cast<float*>(p.lse)[(t.s.b * p.Hq + q[r].h) * p.L + q[r].i] = end.lse;
      E* const out = static_cast<E*>(p.out.data) + t.s.b * p.out.sb + q[r].h * p.out.sh + int64_t(q[r].i) * p.out.sn;
      FSQ_UNROLL
      for (int n = 0; n < W / 8; ++n)
        *reinterpret_cast<uint32_t*>(out + 8 * n + first) =
            pack<E>(sums[n][2 * r] * end.factor, sums[n][2 * r + 1] * end.factor);
    }
  }
};

template <class E, int W>
__global__ void __launch_bounds__(Team<W>::kThreads, 1)
    attention_hopper(const __grid_constant__ CudaAttentionParams c, const __grid_constant__ Maps maps,
                     const Schedule schedule) {
#if defined(FSQ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  SharedArena arena = dynamic_shared();
  const Memory<E, W> m = Memory<E, W>::carve(arena);
  if (threadIdx.x == 0) m.initialise();
  __syncthreads();
  const int group = int(threadIdx.x) / kGroup;
  if (group == 0) {
    ptx::setmaxnreg_dec<kProducerRegisters<W>>();
    if (threadIdx.x == 0 && !c.stuck) produce<E, W>(c, schedule, m, &maps.q, &maps.k, &maps.v);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters<W>>();
    Consumer<E, W> consumer(c, m, group - 1);
    // The first turn is the first consumer's; at the end it takes up the one that the last leaves.
    if (consumer.which == Team<W>::kConsumers - 1) ptx::barrier_arrive(kTurnOfFirst, 2 * kGroup);
    each_tile(schedule, [&](int index) { consumer.run(Tile<W>(c.a, schedule, index)); });
    if (consumer.which == 0) ptx::barrier_sync(kTurnOfFirst, 2 * kGroup);
  }
#else
  __trap();
#endif
}

template <class E, int W>
std::string launch(const CudaAttentionParams& c, int sm_count) {
  CudaAttentionParams one = c;
  AttentionParams& p = one.a;
  const int64_t group = p.Hq / p.Hkv, near = section(p) * group;
  p.Hkv = p.Hq;
  const Schedule schedule = schedule_of(p, tiles_of(p.L, Team<W>::kRows), p.Hq, near, group, sm_count);
  if (schedule.total == 0) return "";
  SharedArena arena;
  Memory<E, W>::carve(arena);
  Launch launch = hopper_launch("attention_hopper", c, schedule, sm_count, Team<W>::kThreads, arena.bytes());
  Maps maps;
  std::string error = encode(maps.q, p, p.q, p.L, p.Hq, W, Team<W>::kRows);
  if (error.empty()) error = encode(maps.k, p, p.k, p.S, c.a.Hkv, W, kKeys);
  if (error.empty()) error = encode(maps.v, p, p.v, p.S, c.a.Hkv, W, kKeys);
  if (!error.empty()) return launch.error(error);
  return run(&attention_hopper<E, W>, launch, one, maps, schedule);
}

}  // namespace
}  // namespace FSQ_ISA

using namespace FSQ_ISA;

std::string cuda_attention_hopper_refuses(const CudaAttentionParams& c) {
  const AttentionParams& p = c.a;
  if (p.E != p.Ev || (p.E != 64 && p.E != 128))
    return "it is for heads of 64 or 128 elements, not " + std::to_string(p.E) + " and " + std::to_string(p.Ev);
  if (p.cu_q) return "it takes no packed sequences";
  if (!plain_logits(p))
    return "it takes no bias, table of booleans, ALiBi, softcap, dropout or global keys, and a positive scale only";
  if (p.L * p.B * p.Hq > int64_t(1) << 30) return "it counts queries of all heads in 32 bits";
  if (p.L * p.Hq > (int64_t(1) << 26) * p.Hkv || p.S > int64_t(1) << 26)
    return "it has no patience for tiles that more than 2^26 rows meet";
  if (c.parts > 1) return "it does not cut keys into parts, as few queries want it";
  if (p.S < 1) return "there are no keys";
  if (!boxes(p.q, p.L, p.Hq, p.B) || !boxes(p.k, p.S, p.Hkv, p.B) || !boxes(p.v, p.S, p.Hkv, p.B) || !aligned(p.out))
    return "its tensors have rows at multiples of 16 bytes and are not expanded";
  Device device;
  const std::string error = query(device);
  if (!error.empty()) return error;
  return device.capability == 90 ? "" : "it is for compute capability 90, not " + std::to_string(device.capability);
}

std::string cuda_attention_hopper(const CudaAttentionParams& c) {
  const std::string reason = cuda_attention_hopper_refuses(c);
  if (!reason.empty()) return "the Hopper kernel does not take this call: " + reason;
  Device device;
  const std::string error = query(device);
  if (!error.empty()) return error;
  return for_hopper(c.a, [&](auto e, auto w) { return launch<decltype(e), decltype(w)::value>(c, device.sm_count); });
}

}  // namespace fusedseq
