// Attention's backward pass for Hopper, queries: a tile is dq of 128 queries of one head, 192 if it has 64 elements;
// the keys and values that they see go past.
//
// Queries are the rows of the accumulators, and Q lies in registers from the beginning, as dO does where there are two
// consumers. Of each 64 keys dS leaves the first two products, S = Q K^T and dP = dO V^T, as the left operand of the
// third, dQ += dS K, in which K is read along its rows.
//
// The order of the products: S and dP of the next keys are issued before dQ of the last ones is waited for;
// exponentials run beside dP.
#include "cuda/attention_hopper_gradients.cuh"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

template <int W>
constexpr int kRows = kQueryConsumers<W> * kGroupRows;
template <class E, int W>
using Memory = GradientMemory<E, W, kQueryConsumers<W>>;

// One thread of the producer plans tiles. Every query head is a pair of its own in `p` (p.Hkv = p.Hq).
template <class E, int W>
FSQ_DEVICE void plan(const CudaAttentionGradParams& g, const Schedule& schedule, const Memory<E, W>& m,
                     const GradientMaps& maps) {
  const AttentionParams& p = g.fwd.a;
  Stage<kOwnStages> own;
  each_tile(schedule, [&](int index) {
    const Work work(int(p.B), schedule.heads, index, schedule.tiles, schedule.section, kRows<W>, p.causal != 0);
    const Sequence s(p, work.n);
    const auto range = [&](int first, int rows) {
      return keys_of_queries(p, s, first, first + rows - 1, 0, s.S, kStream);
    };
    m.owned.wait_empty(own, g.fwd.fault);
    for (int n = 0; n < kQueryConsumers<W>; ++n)
      m.arrange_inner(own, n, range(work.first + n * kGroupRows, kGroupRows));
    m.arrange(own, kStreamHead, work.hkv / schedule.group);
    m.arrange(own, kStreamHeads, 1);
    m.bring_own(own, work, s, range(work.first, kRows<W>), maps);
  });
  m.end_plans(own, g.fwd.fault);
}

// One warpgroup, number `which` of the consumers.
template <class E, int W>
struct Consumer {
  typedef Memory<E, W> M;
  static constexpr bool kHeld = W == 128;  // whether registers hold dO as they do Q

  const CudaAttentionGradParams& g;
  const Schedule& schedule;
  const M& m;
  const int which;
  Stage<kOwnStages> own;
  Stage<kStreamStages> stage;
  uint32_t q[W / 16][4], dout[kHeld ? W / 16 : 1][4];
  float x[kStreamTiles][4], y[kStreamTiles][4], dq[W / 8][4];
  uint32_t slopes[kStream / 16][4];
  float lse[2], delta[2];

  FSQ_DEVICE Consumer(const CudaAttentionGradParams& g, const Schedule& schedule, const M& m, int which)
      : g(g), schedule(schedule), m(m), which(which) {}

  FSQ_DEVICE int group_row() const { return which * kGroupRows + int(threadIdx.x) % kGroup / 32 * 16; }

  // Elements of `t` become `hidden` where structure hides them.
  FSQ_DEVICE void hide(float (&t)[kStreamTiles][4], float hidden) const {
    if (m.whole(own, stage, which)) return;
    const AttentionParams& p = g.fwd.a;
    const int j = m.passing[stage.at()] + accumulator_column(0, 0);
    const int diagonal = m.planned(own, kDiagonal) + m.planned(own, kFirst);
    Band<1> band;
    FSQ_UNROLL
    for (int r = 0; r < 2; ++r) band.lead[r] = j - diagonal - accumulator_row(group_row(), r) + reach_left(p);
    band.window = uint32_t(reach_left(p)) + uint32_t(reach_right(p));
    band.columns = m.planned(own, kKeyCount) - j;
    band.apply(t, hidden);
  }

  // The keys of the current stage. `first`: nothing is in flight yet.
  FSQ_DEVICE void step(bool first) {
    m.ring.wait_full(stage, g.fwd.fault);
    // K only: what V makes is hidden.
    const int keys = m.planned(own, kKeyCount), behind = keys - m.passing[stage.at()];
    if (behind < kStream && keys < g.fwd.a.S)
      clear_rows<kStream, W, kQueryConsumers<W>>(m.stream[0], stage.at() * M::kTile, behind, kStreamCleared);
    if constexpr (kHeld) ptx::wgmma_fence(x, y, q, dout);
    if constexpr (!kHeld) ptx::wgmma_fence(x, y, q);
    multiply_across<kStream, W, E>(flat(x), q, terms_across(m.stream[0].address(stage.at() * M::kTile)));
    ptx::wgmma_commit();
    const uint64_t values = terms_across(m.stream[1].address(stage.at() * M::kTile));
    if constexpr (kHeld) {
      multiply_across<kStream, W, E>(flat(y), dout, values);
    } else {
      const int first = own.at() * M::kOwn + which * kGroupRows * kPanel;
      multiply_across<M::kOwnRows, kStream, W, E>(flat(y), terms_across(m.own[1].address(first)), values);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(x, dq);
    if (!first) m.ring.release(stage.before());
    hide(x, -infinity());
    FSQ_UNROLL
    for (int n = 0; n < kStreamTiles; ++n) FSQ_UNROLL
    for (int i = 0; i < 4; ++i) x[n][i] = ptx::exp2_approx(fma(x[n][i], schedule.scale, -lse[i / 2]));
    ptx::wgmma_wait<0>(y);
    hide(y, 0.0f);
    FSQ_UNROLL
    for (int n = 0; n < kStreamTiles; ++n) FSQ_UNROLL
    for (int i = 0; i < 4; ++i) y[n][i] = x[n][i] * (y[n][i] - delta[i / 2]);
    pack_columns<E>(slopes, y);
    ptx::wgmma_fence(dq, slopes);
    multiply_down<kStream / 16, E>(flat(dq), slopes, terms_down<kStream>(m.stream[0].address(stage.at() * M::kTile)));
    ptx::wgmma_commit();
    stage.step();
    if constexpr (!kHeld) ptx::wgmma_keep(g.fwd.stuck, q);
    if constexpr (kHeld) ptx::wgmma_keep(g.fwd.stuck, q, dout);  // stuck, nothing arrives and nobody comes here
  }

  // The next tile; false if there is none.
  FSQ_DEVICE bool run() {
    const AttentionParams& p = g.fwd.a;
    clear(dq);
    m.owned.wait_full(own, g.fwd.fault);
    const int blocks = m.planned(own, kBlocks);
    if (blocks == kNoMore) return false;
    if (blocks) {
      const int64_t rows = (int64_t(m.planned(own, kBatch)) * p.Hq + m.planned(own, kHead)) * p.L;
      FSQ_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int i = m.planned(own, kFirst) + accumulator_row(group_row(), r);
        lse[r] = i < p.L ? g.lse2[rows + i] : infinity();
        delta[r] = i < p.L ? g.delta[rows + i] : 0.0f;
      }
      load_left<M::kOwnRows, W>(q, m.own[0], own.at() * M::kOwn, group_row());
      if constexpr (kHeld) load_left<M::kOwnRows, W>(dout, m.own[1], own.at() * M::kOwn, group_row());
      for (int n = 0; n < blocks; ++n) step(n == 0);
      ptx::wgmma_wait<0>(dq);
      m.ring.release(stage.before());
    }
    const int first = m.planned(own, kFirst);
    E* const base = static_cast<E*>(g.dq.data) + m.planned(own, kBatch) * g.dq.sb + m.planned(own, kHead) * g.dq.sh;
    m.owned.release(own.at());
    own.step();
    store_rows<E, W>(dq, base, W, float(p.scale), group_row(),
                     [&](int r) { return first + r < p.L ? (first + r) * g.dq.sn : int64_t(-1); });
    return true;
  }
};

template <class E, int W>
__global__ void __launch_bounds__((kQueryConsumers<W> + 1) * kGroup, 1)
    attention_hopper_queries_kernel(const __grid_constant__ CudaAttentionGradParams g,
                                    const __grid_constant__ GradientMaps maps,
                                    const __grid_constant__ Schedule schedule) {
#if defined(FSQ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  SharedArena arena = dynamic_shared();
  const Memory<E, W> m = Memory<E, W>::carve(arena);
  if (threadIdx.x == 0) m.initialise(1, 1);
  __syncthreads();
  const int group = int(threadIdx.x) / kGroup;
  if (group == 0) {
    ptx::setmaxnreg_dec<kBringerRegisters<kQueryConsumers<W>>>();
    if (threadIdx.x == 0 && !g.fwd.stuck) plan<E, W>(g, schedule, m, maps);
    if (threadIdx.x / 32 == 1) m.bring_stream(maps, g.fwd.fault);
  } else {
    ptx::setmaxnreg_inc<kOwnerRegisters<kQueryConsumers<W>>>();
    Consumer<E, W> consumer(g, schedule, m, group - 1);
    while (consumer.run()) {
    }
  }
#else
  __trap();
#endif
}

}  // namespace

std::string attention_hopper_queries(const CudaAttentionGradParams& g, int sm_count) {
  const AttentionParams& p = g.fwd.a;
  CudaAttentionGradParams one = g;
  one.fwd.a.Hkv = p.Hq;
  const int64_t group = p.Hq / p.Hkv;
  return for_hopper(p, [&](auto e, auto w) {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    const Schedule schedule = schedule_of(p, tiles_of(p.L, kRows<W>), p.Hq, section(p) * group, group, sm_count);
    return launch_gradients<E, W, kQueryConsumers<W>>(&attention_hopper_queries_kernel<E, W>,
                                                      "attention_hopper_queries", one, {&p.q, &g.dout, p.L, p.Hq},
                                                      {&p.k, &p.v, p.S, p.Hkv}, schedule, sm_count);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
