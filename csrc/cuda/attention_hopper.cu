// Attention's forward pass for Hopper: the online softmax of attention_forward.cu around wgmma and tensor copies, after
// FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).
//
// A CTA stays on its SM and takes tiles of 128 queries of one head, the longest first. One warpgroup, the producer, has
// a thread that keeps rings of tiles of keys and of values filled; two others, the consumers, own 64 queries each. A
// consumer issues the scores of the next keys before it adds the values of the last ones, so that its exponentials run
// beside both; and the consumers take turns in issuing, so that one's products run while the other is at its
// exponentials.
//
// Rings: "full" counts the bytes of a copy, "empty" the eight consumer warps. Values past the length of a sequence that
// is shorter than the tensor are set to 0 before they are used, since 0 times NaN is NaN.
#include "cuda/attention.h"

#include "cuda/attention_operand.cuh"
#include "cuda/attention_scores.cuh"
#include "cuda/surface.h"
#include "cuda/tensor_map.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2, kConsumerThreads = kConsumers * kGroup, kThreads = kConsumerThreads + kGroup;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows;
constexpr int kKeys = 128, kStages = 2;
constexpr int kPanel = 64, kPanelBytes = 128, kPatternBytes = 8 * kPanelBytes;  // columns of one swizzled row
// What 65536 registers leave: 128 (40 + 2 232) of them are those that 384 threads begin with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
enum Named { kTurnOfFirst = 1, kTurnOfSecond = 2, kCleared = 3 };

template <int N>
FSQ_DEVICE float (&flat(float (&tiles)[N][4]))[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(tiles);
}

FSQ_DEVICE void wait_for(uint32_t mbarrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(mbarrier, parity)) {
  }
}

// A stage of a ring, and the parity of its round: the nth wait for "full" and the nth after the first for "empty".
struct Stage {
  int at = 0;
  uint32_t round = 0;

  FSQ_DEVICE void step() {
    if (++at == kStages) at = 0, round ^= 1;
  }
};

// W columns. Tiles are panels of 64 columns one after another, whose rows of 128 bytes are swizzled.
template <class E, int W>
struct Memory {
  SharedSpan<E> q, k, v;
  SharedSpan<uint64_t> full_q, empty_q, full_k, empty_k, full_v, empty_v;

  template <class Arena>
  FSQ_BOTH static Memory carve(Arena& arena) {
    Memory m;
    m.q = arena.template take<E>(kRows * W, kPatternBytes);
    m.k = arena.template take<E>(kStages * kKeys * W, kPatternBytes);
    m.v = arena.template take<E>(kStages * kKeys * W, kPatternBytes);
    m.full_q = arena.template take<uint64_t>(1);
    m.empty_q = arena.template take<uint64_t>(1);
    m.full_k = arena.template take<uint64_t>(kStages);
    m.empty_k = arena.template take<uint64_t>(kStages);
    m.full_v = arena.template take<uint64_t>(kStages);
    m.empty_v = arena.template take<uint64_t>(kStages);
    return m;
  }

  FSQ_DEVICE void initialise() const {
    constexpr uint32_t warps = kConsumerThreads / 32;
    ptx::mbarrier_init(full_q.address(0), 1);
    ptx::mbarrier_init(empty_q.address(0), warps);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full_k.address(i), 1);
      ptx::mbarrier_init(empty_k.address(i), warps);
      ptx::mbarrier_init(full_v.address(i), 1);
      ptx::mbarrier_init(empty_v.address(i), warps);
    }
    ptx::fence_mbarrier_init();
  }
};

struct Maps {
  TensorMap q, k, v;
};

// Every query head is a pair of its own here (p.Hkv = p.Hq); `group` of them share the keys.
struct Schedule {
  int tiles, section, total, group;
};

// One tile of queries and the tiles of keys that it sees.
struct Tile {
  Work work;
  Sequence s;
  Range keys;
  int blocks;

  FSQ_DEVICE Tile(const AttentionParams& p, const Schedule& schedule, int index)
      : work(p, index, nullptr, schedule.tiles, schedule.section, 1, kRows, p.causal != 0),
        s(p, work.n),
        keys(key_range(p, s, work.first, work.first + kRows - 1, 0, s.S, kKeys)),
        blocks(keys.last > keys.first ? (keys.last - keys.first + kKeys - 1) / kKeys : 0) {}
};

// f(tile) for the tiles of this CTA. CTAs take turns in one direction and then in the other, so that all get long and
// short ones.
template <class F>
FSQ_DEVICE void each_tile(const AttentionParams& p, const Schedule& schedule, F f) {
  const int width = int(gridDim.x), mine = int(blockIdx.x);
  bool back = false;
  for (int from = 0; from < schedule.total; from += width, back = !back) {
    const int index = from + (back ? width - 1 - mine : mine);
    if (index < schedule.total) f(Tile(p, schedule, index));
  }
}

// One thread.
template <class E, int W>
FSQ_DEVICE void produce(const AttentionParams& p, const Schedule& schedule, const Memory<E, W>& m, const TensorMap* q,
                        const TensorMap* k, const TensorMap* v) {
  ptx::prefetch_tensor_map(q);
  ptx::prefetch_tensor_map(k);
  ptx::prefetch_tensor_map(v);
  const auto load = [](const SharedSpan<E>& to, int first, int rows, const TensorMap* map, int row, int head, int batch,
                       uint32_t full) {
    ptx::mbarrier_arrive_expect_tx(full, uint32_t(rows * W * int(sizeof(E))));
    FSQ_UNROLL
    for (int panel = 0; panel < W / kPanel; ++panel) {
      const int corner[] = {panel * kPanel, row, head, batch};
      ptx::tensor_load(to.address(first + panel * rows * kPanel), map, corner, full);
    }
  };
  Stage keys, values;
  uint32_t queries = 0;
  each_tile(p, schedule, [&](const Tile& t) {
    if (t.blocks == 0) return;
    const int head = t.work.hkv / schedule.group;
    const auto load_keys = [&](int block) {
      wait_for(m.empty_k.address(keys.at), keys.round ^ 1);
      load(m.k, keys.at * kKeys * W, kKeys, k, t.keys.first + block * kKeys, head, t.s.b, m.full_k.address(keys.at));
      keys.step();
    };
    wait_for(m.empty_q.address(0), queries ^ 1);
    load(m.q, 0, kRows, q, t.work.first, t.work.hkv, t.s.b, m.full_q.address(0));
    queries ^= 1;
    load_keys(0);
    for (int block = 0; block < t.blocks; ++block) {
      if (block + 1 < t.blocks) load_keys(block + 1);
      wait_for(m.empty_v.address(values.at), values.round ^ 1);
      load(m.v, values.at * kKeys * W, kKeys, v, t.keys.first + block * kKeys, head, t.s.b,
           m.full_v.address(values.at));
      values.step();
    }
  });
}

// One warpgroup, number `which` of the consumers.
template <class E, int W>
struct Consumer {
  const AttentionParams& p;
  const Memory<E, W>& m;
  const int which;
  const uint64_t queries;  // descriptors
  const uint64_t all_keys, all_values;
  Stage keys, values;
  uint32_t full_queries = 0;
  float x[kKeys / 8][4], sums[W / 8][4];
  uint32_t weights[kKeys / 16][4];
  RowSum rows[2];

  FSQ_DEVICE Consumer(const AttentionParams& p, const Memory<E, W>& m, int which)
      : p(p),
        m(m),
        which(which),
        queries(ptx::matrix_descriptor(m.q.address(which * kGroupRows * kPanel), 16, kPatternBytes, Swizzle::bytes128)),
        all_keys(ptx::matrix_descriptor(m.k.address(0), 16, kPatternBytes, Swizzle::bytes128)),
        all_values(ptx::matrix_descriptor(m.v.address(0), kKeys * kPanelBytes, kPatternBytes, Swizzle::bytes128)) {}

  // Lane 0 of each warp tells the producer that the warp's wgmma, waited for, no longer read a stage.
  FSQ_DEVICE void release(uint32_t empty) const {
    if (ptx::lane() == 0) ptx::mbarrier_arrive(empty);
  }

  // The next group of wgmma: x = Q K^T for the keys of the current stage.
  FSQ_DEVICE void score() {
    const uint64_t k = ptx::advance(all_keys, uint32_t(keys.at * kKeys * W * int(sizeof(E))));
    FSQ_UNROLL
    for (int c = 0; c < W / 16; ++c) {
      const uint32_t within = uint32_t(c % 4 * 32), panel = uint32_t(c / 4);
      ptx::wgmma<E>(flat(x), ptx::advance(queries, panel * kRows * kPanelBytes + within),
                    ptx::advance(k, panel * kKeys * kPanelBytes + within), c > 0);
    }
    ptx::wgmma_commit();
  }
  // The next group of wgmma: sums += weights V for the values of the current stage.
  FSQ_DEVICE void add_values() {
    const uint64_t v = ptx::advance(all_values, uint32_t(values.at * kKeys * W * int(sizeof(E))));
    FSQ_UNROLL
    for (int c = 0; c < kKeys / 16; ++c)
      ptx::wgmma<E, ptx::Major::mn>(flat(sums), weights[c], ptx::advance(v, uint32_t(c * 16 * kPanelBytes)), true);
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
  FSQ_DEVICE void pack_weights() {
    FSQ_UNROLL
    for (int c = 0; c < kKeys / 16; ++c) as_left<E>(weights[c], x[2 * c], x[2 * c + 1]);
  }

  // Values of keys from `first` on in the current stage, which both consumers have waited for, become 0.
  FSQ_DEVICE void clear_values(int first) const {
    constexpr int kWide = 16 / int(sizeof(E)), kPanels = W / kPanel;
    const int thread = int(threadIdx.x) - kGroup, chunks = (kKeys - first) * kPanel / kWide;
    for (int i = thread; i < kPanels * chunks; i += kConsumerThreads) {
      const int panel = i / chunks, chunk = i % chunks;
      m.v.template store<uint4>((values.at * W + panel * kPanel) * kKeys + first * kPanel + chunk * kWide,
                                make_uint4(0, 0, 0, 0));
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kCleared, kConsumerThreads);
  }

  FSQ_DEVICE void run(const Tile& t) {
    const int first_row = t.work.first + which * kGroupRows;
    const int row = first_row + int(threadIdx.x) % kGroup / 32 * 16;
    const Query q[2] = {Query(p, t.s, t.work.hkv, accumulator_row(row, 0)),
                        Query(p, t.s, t.work.hkv, accumulator_row(row, 1))};
    const Range mine = key_range(p, t.s, first_row, first_row + kGroupRows - 1, 0, t.s.S, kKeys);
    const float scale = float(p.scale * kLog2e);
    FSQ_UNROLL
    for (int n = 0; n < W / 8; ++n) FSQ_UNROLL
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    rows[0] = rows[1] = {-infinity(), 0.0f};
    if (t.blocks) {
      float shrink[2];
      int j0 = t.keys.first;
      wait_for(m.full_q.address(0), full_queries);
      full_queries ^= 1;
      wait_for(m.full_k.address(keys.at), keys.round);
      ptx::wgmma_fence(x);
      score();
      ptx::wgmma_wait<0>(x);
      release(m.empty_k.address(keys.at));
      keys.step();
      soften(q, mine, j0, scale, shrink);
      pack_weights();
      for (int block = 1; block < t.blocks; ++block) {
        j0 += kKeys;
        wait_for(m.full_k.address(keys.at), keys.round);
        wait_for(m.full_v.address(values.at), values.round);
        ptx::barrier_sync(kTurnOfFirst + which, kConsumerThreads);
        ptx::wgmma_fence(x, sums, weights);
        score();
        add_values();
        ptx::barrier_arrive(kTurnOfFirst + (1 - which), kConsumerThreads);
        ptx::wgmma_wait<1>(x);
        release(m.empty_k.address(keys.at));
        keys.step();
        soften(q, mine, j0, scale, shrink);
        // x as well, lest it is packed before, into registers beside those in flight, which there are not.
        ptx::wgmma_wait<0>(sums, x);
        release(m.empty_v.address(values.at));
        values.step();
        FSQ_UNROLL
        for (int n = 0; n < W / 8; ++n) FSQ_UNROLL
        for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
        pack_weights();
      }
      release(m.empty_q.address(0));
      wait_for(m.full_v.address(values.at), values.round);
      if (t.s.S < p.S && t.s.S - j0 < kKeys) clear_values(t.s.S - j0);
      ptx::wgmma_fence(sums, weights);
      add_values();
      ptx::wgmma_wait<0>(sums);
      release(m.empty_v.address(values.at));
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
__global__ void __launch_bounds__(kThreads, 1)
    attention_hopper(const __grid_constant__ CudaAttentionParams c, const __grid_constant__ Maps maps,
                     const Schedule schedule) {
#if defined(FSQ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const AttentionParams& p = c.a;
  SharedArena arena = dynamic_shared();
  const Memory<E, W> m = Memory<E, W>::carve(arena);
  if (threadIdx.x == 0) m.initialise();
  __syncthreads();
  const int group = int(threadIdx.x) / kGroup;
  if (group == 0) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) produce<E, W>(p, schedule, m, &maps.q, &maps.k, &maps.v);
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Consumer<E, W> consumer(p, m, group - 1);
    // The first turn is the first consumer's; at the end it takes up the one that the second leaves.
    if (consumer.which == 1) ptx::barrier_arrive(kTurnOfFirst, kConsumerThreads);
    each_tile(p, schedule, [&](const Tile& t) { consumer.run(t); });
    if (consumer.which == 0) ptx::barrier_sync(kTurnOfFirst, kConsumerThreads);
  }
#else
  __trap();
#endif
}

std::string encode(TensorMap& map, const AttentionParams& p, const Heads& t, int64_t n, int64_t heads, int width,
                   int rows) {
  BoxedTensor tensor = {t.data, p.dtype == DType::bf16, 4, {}, {}, {}, Swizzle::bytes128};
  const int64_t size[] = {width, n, heads, p.B}, stride[] = {1, t.sn, t.sh, t.sb};
  const int box[] = {kPanel, rows, 1, 1};
  for (int i = 0; i < 4; ++i) {
    tensor.size[i] = uint64_t(size[i]);
    tensor.stride[i] = uint64_t((size[i] == 1 ? kPanel : stride[i]) * 2);  // of one element there is no stride
    tensor.box[i] = uint32_t(box[i]);
  }
  return encode(map, tensor);
}

template <class E, int W>
std::string launch(const CudaAttentionParams& c, int sm_count) {
  CudaAttentionParams one = c;
  AttentionParams& p = one.a;
  const int64_t group = p.Hq / p.Hkv;
  Maps maps;
  std::string error = encode(maps.q, p, p.q, p.L, p.Hq, W, kRows);
  if (error.empty()) error = encode(maps.k, p, p.k, p.S, p.Hkv, W, kKeys);
  if (error.empty()) error = encode(maps.v, p, p.v, p.S, p.Hkv, W, kKeys);
  const int64_t near = section(p) * group;
  p.Hkv = p.Hq;
  const int64_t tiles = tile_count(p, p.L, 1, kRows), total = tiles * p.B * p.Hq;
  const Schedule schedule{int(tiles), int(near), int(total), int(group)};
  if (total == 0) return "";
  Launch launch("attention_hopper", describe(c.a), dim3(unsigned(total < sm_count ? total : sm_count)), dim3(kThreads));
  if (!error.empty()) return launch.error(error);
  SharedArena arena;
  Memory<E, W>::carve(arena);
  launch.shared = arena.bytes();
  launch.stream = static_cast<cudaStream_t>(c.stream);
  return run(&attention_hopper<E, W>, launch, one, maps, schedule);
}

bool boxes(const Heads& t, int64_t n, int64_t heads, int64_t batch) {
  const int64_t size[] = {n, heads, batch}, stride[] = {t.sn, t.sh, t.sb};
  for (int i = 0; i < 3; ++i)
    if (size[i] > 1 && stride[i] <= 0) return false;
  return aligned(t);
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
  const auto widths = [&](auto e) {
    typedef decltype(e) E;
    return c.a.E == 64 ? launch<E, 64>(c, device.sm_count) : launch<E, 128>(c, device.sm_count);
  };
  return c.a.dtype == DType::bf16 ? widths(__nv_bfloat16()) : widths(__half());
}

}  // namespace fusedseq
