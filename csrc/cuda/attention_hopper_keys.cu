// Attention's backward pass for Hopper, keys: a tile is the gradients of 128 keys and values of one key head; the
// queries that see them go past, head by head of their group.
//
// Keys are the rows of the accumulators: P^T and dS^T leave the first two products, S^T = K Q^T and dP^T = V dO^T, as
// left operands of the other two, dV += P^T dO and dK += dS^T Q, in registers. In those two Q and dO are read along
// their rows. Heads of 64 elements leave room for K and V in registers too, which spares shared memory a third of its
// traffic.
//
// Exponentials run beside dP, gradients of logits beside dV. With heads of 64 elements the first two products of the
// next queries are issued while dV and dK of the last ones run. Heads of 128 leave no registers for that: nothing is in
// flight from one tile of queries to the next, and the other consumer's products fill the gap.
#include "cuda/attention_hopper_gradients.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kConsumers = 2, kRows = kConsumers * kGroupRows;

// The queries of a head that see keys from j0 on; tiles that need no mask.
FSQ_DEVICE Range queries_to_meet(const AttentionParams& p, const Sequence& s, int j0, int keys) {
  if (j0 >= s.S) return {0, 0, 0, 0};
  const Range all = queries_of_keys(p, s, j0, least(j0 + keys, s.S) - 1);
  return {all.first / kStream * kStream, up_to(all.inner_first, kStream), j0 + keys > s.S ? 0 : all.inner_last,
          all.last};
}

namespace {

// One thread of the producer plans tiles. Every query head is a pair of its own in `p` (p.Hkv = p.Hq).
template <class E, int W>
FSQ_DEVICE void plan(const CudaAttentionGradParams& g, const Schedule& schedule,
                     const GradientMemory<E, W, kConsumers>& m, const GradientMaps& maps) {
  const AttentionParams& p = g.fwd.a;
  Stage<kOwnStages> own;
  each_tile(schedule, [&](int index) {
    const int group = schedule.group;
    const Work work(int(p.B), schedule.heads, index, schedule.tiles, schedule.section, kRows, false);
    const Sequence s(p, work.n);
    m.owned.wait_empty(own, g.fwd.fault);
    for (int n = 0; n < kConsumers; ++n)
      m.arrange_inner(own, n, queries_to_meet(p, s, work.first + n * kGroupRows, kGroupRows));
    m.arrange(own, kStreamHead, work.hkv * group);
    m.arrange(own, kStreamHeads, group);
    m.bring_own(own, work, s, queries_to_meet(p, s, work.first, kRows), maps);
  });
  m.end_plans(own, g.fwd.fault);
}

// A warp brings lse and delta, two rows of each tile to a lane.
template <class E, int W>
FSQ_DEVICE void bring_tables(const CudaAttentionGradParams& g, const GradientMemory<E, W, kConsumers>& m) {
  const int at = 2 * int(ptx::lane()), L = int(g.fwd.a.L), heads = int(g.fwd.a.Hq);
  Stage<kStreamStages> stage;
  m.follow(g.fwd.fault, [&](int head, int batch, int row) {
    const int i = row + at;
    const int base = (batch * heads + head) * L;  // 32 bits suffice, which is refused else
    const auto pair = [&](const float* from, float otherwise) {
      return make_float2(i < L ? from[base + i] : otherwise, i + 1 < L ? from[base + i + 1] : otherwise);
    };
    const float2 lse = pair(g.lse2, infinity()), delta = pair(g.delta, 0.0f);
    m.ring.wait_empty(stage, g.fwd.fault);
    m.lse.template store<float2>(stage.at() * kStream + at, lse);
    m.delta.template store<float2>(stage.at() * kStream + at, delta);
    ptx::mbarrier_arrive(m.ring.full(stage.at()));
    stage.step();
  });
}

// One warpgroup, number `which` of the consumers.
template <class E, int W>
struct Consumer {
  typedef GradientMemory<E, W, kConsumers> M;
  // Whether registers hold K and V, and whether the products of the next queries are issued before the gradients of the
  // last ones are waited for.
  static constexpr bool kHeld = W == 64, kAhead = W == 64;

  const CudaAttentionGradParams& g;
  const Schedule& schedule;
  const M& m;
  const int which;
  Stage<kOwnStages> own;
  Stage<kStreamStages> stage;
  uint32_t k[kHeld ? W / 16 : 1][4], v[kHeld ? W / 16 : 1][4];
  float x[kStreamTiles][4], y[kStreamTiles][4], dk[W / 8][4], dv[W / 8][4];
  uint32_t weights[kStream / 16][4], slopes[kStream / 16][4];  // P^T and dS^T

  FSQ_DEVICE Consumer(const CudaAttentionGradParams& g, const Schedule& schedule, const M& m, int which)
      : g(g), schedule(schedule), m(m), which(which) {}

  FSQ_DEVICE static int warp_row() { return int(threadIdx.x) % kGroup / 32 * 16; }

  // The next two groups of wgmma: x = K Q^T and y = V dO^T.
  FSQ_DEVICE void score() {
    const uint64_t q = terms_across(m.stream[0].address(stage.at() * M::kTile));
    const uint64_t dout = terms_across(m.stream[1].address(stage.at() * M::kTile));
    if constexpr (kHeld) {
      ptx::wgmma_fence(x, y, k, v);
      multiply_across<kStream, W, E>(flat(x), k, q);
      ptx::wgmma_commit();
      multiply_across<kStream, W, E>(flat(y), v, dout);
    } else {
      const int first = own.at() * M::kOwn + which * kGroupRows * kPanel;
      ptx::wgmma_fence(x, y);
      multiply_across<M::kOwnRows, kStream, W, E>(flat(x), terms_across(m.own[0].address(first)), q);
      ptx::wgmma_commit();
      multiply_across<M::kOwnRows, kStream, W, E>(flat(y), terms_across(m.own[1].address(first)), dout);
    }
    ptx::wgmma_commit();
  }
  // The next group of wgmma: sums += left B for the rows of this stage of a ring.
  FSQ_DEVICE void add(float (&sums)[W / 8][4], uint32_t (&left)[kStream / 16][4], const SharedSpan<E>& ring) {
    ptx::wgmma_fence(sums, left);
    multiply_down<kStream / 16, E>(flat(sums), left, terms_down<kStream>(ring.address(stage.at() * M::kTile)));
    ptx::wgmma_commit();
  }
  // The values of a table for the columns 8 n and 8 n + 1 of this thread.
  FSQ_DEVICE float2 of_columns(const SharedSpan<float>& table, int n) const {
    return table.template load<float2>(stage.at() * kStream + accumulator_column(n, 0));
  }
  // Elements of `t` become `hidden` where structure hides them.
  FSQ_DEVICE void hide(float (&t)[kStreamTiles][4], float hidden) const {
    if (m.whole(own, stage, which)) return;
    const AttentionParams& p = g.fwd.a;
    const int diagonal = m.planned(own, kDiagonal) + m.passing[stage.at()] + accumulator_column(0, 0);
    Band<-1> band;
    FSQ_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int j = m.planned(own, kFirst) + which * kGroupRows + accumulator_row(warp_row(), r);
      band.lead[r] = j < m.planned(own, kKeyCount) ? j - diagonal + reach_left(p) : -1;  // -1: nobody sees it
    }
    band.window = uint32_t(reach_left(p)) + uint32_t(reach_right(p));
    band.columns = kStream;
    band.apply(t, hidden);
  }

  // The queries of the current stage. `first`: nothing is in flight yet.
  FSQ_DEVICE void step(bool first) {
    m.ring.wait_full(stage, g.fwd.fault);
    score();
    if constexpr (kAhead) {
      ptx::wgmma_wait<1>(x, dk, dv);
      if (!first) m.ring.release(stage.before());
    } else {
      ptx::wgmma_wait<1>(x);
    }
    hide(x, -infinity());
    FSQ_UNROLL
    for (int n = 0; n < kStreamTiles; ++n) {
      const float2 lse = of_columns(m.lse, n);
      FSQ_UNROLL
      for (int i = 0; i < 4; ++i) x[n][i] = ptx::exp2_approx(fma(x[n][i], schedule.scale, i % 2 ? -lse.y : -lse.x));
    }
    // x as well: packed before, it would take registers beside those in flight, which there are not.
    ptx::wgmma_wait<0>(y, x);
    hide(y, 0.0f);
    pack_columns<E>(weights, x);
    add(dv, weights, m.stream[1]);
    FSQ_UNROLL
    for (int n = 0; n < kStreamTiles; ++n) {
      const float2 delta = of_columns(m.delta, n);
      FSQ_UNROLL
      for (int i = 0; i < 4; ++i) y[n][i] = x[n][i] * (y[n][i] - (i % 2 ? delta.y : delta.x));
    }
    pack_columns<E>(slopes, y);
    add(dk, slopes, m.stream[0]);
    if constexpr (!kAhead) {
      ptx::wgmma_wait<0>(dk, dv);
      m.ring.release(stage.at());
    }
    stage.step();
    if constexpr (kHeld) ptx::wgmma_keep(g.fwd.stuck, k, v);  // stuck, nothing arrives and nobody comes here
  }

  // The next tile; false if there is none.
  FSQ_DEVICE bool run() {
    clear(dk);
    clear(dv);
    m.owned.wait_full(own, g.fwd.fault);
    const int blocks = m.planned(own, kBlocks);
    if (blocks == kNoMore) return false;
    if (blocks) {
      if constexpr (kHeld) {
        load_left<M::kOwnRows, W>(k, m.own[0], own.at() * M::kOwn, which * kGroupRows + warp_row());
        load_left<M::kOwnRows, W>(v, m.own[1], own.at() * M::kOwn, which * kGroupRows + warp_row());
      }
      for (int left_over = blocks * schedule.group; left_over > 0; --left_over)
        step(left_over == blocks * schedule.group);
      if constexpr (kAhead) {
        ptx::wgmma_wait<0>(dk, dv);
        m.ring.release(stage.before());
      }
    }
    const int j0 = m.planned(own, kFirst) + which * kGroupRows, head = m.planned(own, kHead);
    const int batch = m.planned(own, kBatch);
    m.owned.release(own.at());
    own.step();
    // Keys behind the length of a row have a gradient too, which is 0.
    const auto store = [&](const float (&sums)[W / 8][4], const Heads& to, float factor) {
      E* const base = static_cast<E*>(to.data) + batch * to.sb + head * to.sh;
      store_rows<E, W>(sums, base, W, factor, warp_row(),
                       [&](int r) { return j0 + r < g.fwd.a.S ? (j0 + r) * to.sn : int64_t(-1); });
    };
    store(dk, g.dk, float(g.fwd.a.scale));
    store(dv, g.dv, 1.0f);
    return true;
  }
};

template <class E, int W>
__global__ void __launch_bounds__((kConsumers + 1) * kGroup, 1)
    attention_hopper_keys_kernel(const __grid_constant__ CudaAttentionGradParams g,
                                 const __grid_constant__ GradientMaps maps, const __grid_constant__ Schedule schedule) {
#if defined(FSQ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  SharedArena arena = dynamic_shared();
  const GradientMemory<E, W, kConsumers> m = GradientMemory<E, W, kConsumers>::carve(arena);
  if (threadIdx.x == 0) m.initialise(1 + 32, 2);  // tensors and tables
  __syncthreads();
  const int group = int(threadIdx.x) / kGroup;
  if (group == 0) {
    ptx::setmaxnreg_dec<kBringerRegisters<kConsumers>>();
    const int warp = int(threadIdx.x) / 32;
    if (threadIdx.x == 0 && !g.fwd.stuck) plan<E, W>(g, schedule, m, maps);
    if (warp == 1) m.bring_stream(maps, g.fwd.fault);
    if (warp == 2) bring_tables<E, W>(g, m);
  } else {
    ptx::setmaxnreg_inc<kOwnerRegisters<kConsumers>>();
    Consumer<E, W> consumer(g, schedule, m, group - 1);
    while (consumer.run()) {
    }
  }
#else
  __trap();
#endif
}

}  // namespace

std::string attention_hopper_keys(const CudaAttentionGradParams& g, int sm_count) {
  const AttentionParams& p = g.fwd.a;
  CudaAttentionGradParams one = g;
  one.fwd.a.Hkv = p.Hq;
  const Schedule schedule = schedule_of(p, tiles_of(p.S, kRows), p.Hkv, section(p), p.Hq / p.Hkv, sm_count);
  return for_hopper(p, [&](auto e, auto w) {
    typedef decltype(e) E;
    constexpr int W = decltype(w)::value;
    return launch_gradients<E, W, kConsumers>(&attention_hopper_keys_kernel<E, W>, "attention_hopper_keys", one,
                                              {&p.k, &p.v, p.S, p.Hkv}, {&p.q, &g.dout, p.L, p.Hq}, schedule, sm_count);
  });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
