// What the two Hopper kernels of attention's backward pass share. Each owns 128 or 192 rows of two tensors, keys and
// values or queries and dout, 64 to a consumer, while tiles of 64 rows of the other two go past. x = own[0] stream[0]^T
// are products of queries and keys, y = own[1] stream[1]^T those of dout and values (attention_gradients.cuh has the
// rest).
//
// Registers are what these kernels lack. What the producer can find out for the consumers it leaves in shared memory:
// of a tile that is owned its plan, of one that goes past its first row.
#pragma once
#include "cuda/attention_backward.h"
#include "cuda/attention_gradients.cuh"
#include "cuda/attention_hopper.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kStream = 64;                // rows of a tile that goes past
constexpr int kStreamTiles = kStream / 8;  // of 8 columns of accumulators
constexpr int kOwnStages = 2, kStreamStages = 3;
// What 65536 registers leave to C consumers, of whom the 128 (C + 1) threads begin with 168 or 128 each.
template <int C>
constexpr int kBringerRegisters = C == 2 ? 24 : 32;
template <int C>
constexpr int kOwnerRegisters = C == 2 ? 240 : 160;
constexpr int kStreamCleared = 1;  // a named barrier

// The plan of a tile that is owned, one number each.
enum Field {
  kFirst,        // of its rows
  kHead,         // of keys or of queries, which it belongs to
  kBatch,        // row
  kKeyCount,     // of that row
  kDiagonal,     // the key that the row's first query is aligned with
  kBlocks,       // tiles of each head that go past, or kNoMore, which ends those who read plans
  kFrom,         // first row of those
  kStreamHead,   // first head that goes past,
  kStreamHeads,  // and how many do
  kInner,        // [C][2] rows of those within which a consumer's 64 rows see, and are seen by, all
  kPlan = kInner + 2 * 3
};
constexpr int kNoMore = -1;

struct GradientMaps {
  TensorMap own[2], stream[2];
};

template <class E, int W, int C>
struct GradientMemory {
  static constexpr int kOwnRows = C * kGroupRows, kOwn = kOwnRows * W, kTile = kStream * W;  // elements
  SharedSpan<E> own[2], stream[2];                                                           // [stages][rows]
  SharedSpan<float> lse, delta;  // [kStreamStages][kStream], of queries that go past
  SharedSpan<int> plan;          // [kOwnStages][kPlan]
  SharedSpan<int> passing;       // [kStreamStages]
  Ring<kOwnStages> owned;
  Ring<kStreamStages> ring;

  template <class Arena>
  FSQ_BOTH static GradientMemory carve(Arena& arena) {
    GradientMemory m;
    for (int i = 0; i < 2; ++i) m.own[i] = arena.template take<E>(kOwnStages * kOwn, kPatternBytes);
    for (int i = 0; i < 2; ++i) m.stream[i] = arena.template take<E>(kStreamStages * kTile, kPatternBytes);
    m.lse = arena.template take<float>(kStreamStages * kStream);
    m.delta = arena.template take<float>(kStreamStages * kStream);
    m.plan = arena.template take<int>(kOwnStages * kPlan);
    m.passing = arena.template take<int>(kStreamStages);
    m.owned = Ring<kOwnStages>::carve(arena);
    m.ring = Ring<kStreamStages>::carve(arena);
    return m;
  }

  // `arrivals`: of the producer's threads for a tile that goes past. `followers`: of its warps, those that read plans.
  FSQ_DEVICE void initialise(int arrivals, int followers) const {
    owned.initialise(1, 4 * C + followers);
    ring.initialise(arrivals, 4 * C);
    ptx::fence_mbarrier_init();
  }

  FSQ_DEVICE int planned(const Stage<kOwnStages>& stage, int field) const { return plan[stage.at() * kPlan + field]; }
  FSQ_DEVICE void arrange(const Stage<kOwnStages>& stage, int field, int value) const {
    plan.store(stage.at() * kPlan + field, value);
  }
  FSQ_DEVICE void arrange_inner(const Stage<kOwnStages>& stage, int consumer, const Range& range) const {
    arrange(stage, kInner + 2 * consumer, range.inner_first);
    arrange(stage, kInner + 2 * consumer + 1, range.inner_last);
  }
  // Whether all elements of a consumer's rows and the tile that goes past are seen.
  FSQ_DEVICE bool whole(const Stage<kOwnStages>& own, const Stage<kStreamStages>& stage, int consumer) const {
    const int first = passing[stage.at()], inner = kInner + 2 * consumer;
    return first >= planned(own, inner) && first + kStream <= planned(own, inner + 1);
  }

  // One thread: the next tile that is owned, and its plan but for the inner ranges and the heads that go past, which
  // are there already. `range`: of rows that go past.
  FSQ_DEVICE void bring_own(Stage<kOwnStages>& stage, const Work& work, const Sequence& s, const Range& range,
                            const GradientMaps& maps) const {
    const int blocks = range.last > range.first ? (range.last - range.first + kStream - 1) / kStream : 0;
    const uint32_t full = owned.full(stage.at());
    arrange(stage, kFirst, work.first);
    arrange(stage, kHead, work.hkv);
    arrange(stage, kBatch, s.b);
    arrange(stage, kKeyCount, s.S);
    arrange(stage, kDiagonal, s.diagonal);
    arrange(stage, kBlocks, blocks);
    arrange(stage, kFrom, range.first);
    if (blocks) {
      ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes<kOwnRows, W, E>);
      FSQ_UNROLL
      for (int i = 0; i < 2; ++i)
        load_tile<kOwnRows, W>(own[i], stage.at() * kOwn, &maps.own[i], work.first, work.hkv, s.b, full);
    } else {
      ptx::mbarrier_arrive(full);
    }
    stage.step();
  }
  FSQ_DEVICE void end_plans(const Stage<kOwnStages>& stage, uint32_t* fault) const {
    owned.wait_empty(stage, fault);
    arrange(stage, kBlocks, kNoMore);
    ptx::mbarrier_arrive(owned.full(stage.at()));
  }

  // A warp of the producer: f(head, batch, row) for each tile that goes past.
  template <class F>
  FSQ_DEVICE void follow(uint32_t* fault, F f) const {
    for (Stage<kOwnStages> stage;; stage.step()) {
      owned.wait_full(stage, fault);
      const int blocks = planned(stage, kBlocks), from = planned(stage, kFrom), batch = planned(stage, kBatch);
      const int first = planned(stage, kStreamHead), last = first + planned(stage, kStreamHeads);
      owned.release(stage.at());
      if (blocks == kNoMore) return;
      for (int head = first; head < last; ++head)
        for (int block = 0; block < blocks; ++block) f(head, batch, from + block * kStream);
    }
  }
  // The warp that brings the two tensors.
  FSQ_DEVICE void bring_stream(const GradientMaps& maps, uint32_t* fault) const {
    Stage<kStreamStages> stage;
    follow(fault, [&](int head, int batch, int row) {
      if (ptx::lane() == 0) {
        ring.wait_empty(stage, fault);
        const uint32_t full = ring.full(stage.at());
        passing.store(stage.at(), row);
        ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes<kStream, W, E>);
        FSQ_UNROLL
        for (int i = 0; i < 2; ++i)
          load_tile<kStream, W>(stream[i], stage.at() * kTile, &maps.stream[i], row, head, batch, full);
      }
      stage.step();
    });
  }
};

// The 64 rows of a warpgroup as left operands in registers, from a tile of ROWS rows that begins at element `first`;
// `row`: the first of the warp's 16.
template <int ROWS, int W, class E>
FSQ_DEVICE void load_left(uint32_t (&a)[W / 16][4], const SharedSpan<E>& tile, int first, int row) {
  const int lane = int(ptx::lane()), r = row + lane % 16;
  FSQ_UNROLL
  for (int c = 0; c < W / 16; ++c) {
    const int chunk = (c % 4 * 2 + lane / 16) ^ (r % 8);
    ptx::ldmatrix<4>(a[c], tile.address(first + (c / 4 * ROWS + r) * kPanel + chunk * kChunk));
  }
}

// How far a window reaches to either side; positions are below 2^29, so that no sum of these overflows.
FSQ_DEVICE int reach_left(const AttentionParams& p) {
  return p.left >= 0 && p.left < kNowhere ? int(p.left) : kNowhere;
}
FSQ_DEVICE int reach_right(const AttentionParams& p) {
  return p.right >= 0 && p.right < kNowhere ? int(p.right) : kNowhere;
}

// Which elements of 64 columns of accumulators structure hides. An element of column c (counted from this thread's
// first one) sees its key if lead + SIGN c, the key's distance from the first one of the window, is within the window.
template <int SIGN>
struct Band {
  int lead[2];  // of the thread's two rows
  uint32_t window;
  int columns;  // those behind are no keys

  template <int N>
  FSQ_DEVICE void apply(float (&x)[N][4], float hidden) const {
    FSQ_UNROLL
    for (int n = 0; n < N; ++n) FSQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int c = 8 * n + i % 2;
      if (uint32_t(lead[i / 2] + SIGN * c) > window || c >= columns) x[n][i] = hidden;
    }
  }
};

// The two tensors that a product of queries and keys and one of dout and values take rows from; n rows a head.
struct Sides {
  const Heads *x, *y;
  int64_t n, heads;
};
template <class E, int W, int C, class Kernel>
std::string launch_gradients(Kernel kernel, const char* name, const CudaAttentionGradParams& g, const Sides& own,
                             const Sides& stream, const Schedule& schedule, int sm_count) {
  if (schedule.total == 0) return "";
  const AttentionParams& p = g.fwd.a;
  SharedArena arena;
  GradientMemory<E, W, C>::carve(arena);
  Launch launch = hopper_launch(name, g.fwd, schedule, sm_count, (C + 1) * kGroup, arena.bytes());
  GradientMaps maps;
  std::string error = encode(maps.own[0], p, *own.x, own.n, own.heads, W, C * kGroupRows);
  if (error.empty()) error = encode(maps.own[1], p, *own.y, own.n, own.heads, W, C * kGroupRows);
  if (error.empty()) error = encode(maps.stream[0], p, *stream.x, stream.n, stream.heads, W, kStream);
  if (error.empty()) error = encode(maps.stream[1], p, *stream.y, stream.n, stream.heads, W, kStream);
  return error.empty() ? run(kernel, launch, g, maps, schedule) : launch.error(error);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
