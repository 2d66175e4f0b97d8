// What the Hopper kernels of attention share: the roles of a CTA's warpgroups, tiles that tensor copies bring, the
// rings they lie in, and the order in which CTAs take their work.
//
// A CTA stays on its SM and takes tiles, the longest first. One warpgroup, the producer, has a warp that keeps rings of
// tiles filled; two or three others, the consumers, own 64 rows of the accumulators each. Of a stage of a ring, the
// mbarrier "full" counts the bytes of its copies, "empty" the consumers' warps that are through with it.
//
// Tiles are panels of 64 columns one after another, whose rows of 128 bytes are swizzled as wgmma reads them.
#pragma once
#include "cuda/attention.h"
#include "cuda/attention_operand.cuh"
#include "cuda/attention_scores.cuh"
#include "cuda/tensor_map.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kGroupRows = 64;
constexpr int kPanel = 64, kPanelBytes = 128, kPatternBytes = 8 * kPanelBytes;  // columns of one swizzled row
constexpr uint32_t kLongestWait = 4000000000;                                   // nanoseconds, below 2^32
// Consumers of the kernels whose rows are queries, by the size of a head: where three find the registers they need,
// they hide more of each other's exponentials.
template <int W>
constexpr int kQueryConsumers = W == 64 ? 3 : 2;

template <int N>
FSQ_DEVICE float (&flat(float (&tiles)[N][4]))[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(tiles);
}

// Waits for a phase of an mbarrier. If it does not end, a copy or a warpgroup has gone wrong: the caller is told
// through `fault`, and the launch ends in an error. 32 bits of the clock, for registers are scarce where this is
// called.
FSQ_DEVICE void wait_for(uint32_t mbarrier, uint32_t parity, uint32_t* fault) {
  if (ptx::mbarrier_try_wait(mbarrier, parity)) return;
  const uint32_t since = uint32_t(ptx::globaltimer());
  while (!ptx::mbarrier_try_wait(mbarrier, parity))
    if (uint32_t(ptx::globaltimer()) - since > kLongestWait) {
      if (fault) {
        *fault = 1;
        __threadfence_system();
      }
      ptx::abandon();
    }
}

// A stage of a ring, and the parity of its round: the nth wait for "full" and the nth after the first for "empty". In
// one register.
template <int STAGES>
struct Stage {
  int turn = 0;  // of two rounds

  FSQ_DEVICE int at() const { return turn < STAGES ? turn : turn - STAGES; }
  FSQ_DEVICE int before() const { return at() ? at() - 1 : STAGES - 1; }
  FSQ_DEVICE uint32_t round() const { return turn < STAGES ? 0 : 1; }
  FSQ_DEVICE void step() { turn = turn + 1 < 2 * STAGES ? turn + 1 : 0; }
};

// The mbarriers of a ring.
template <int STAGES>
struct Ring {
  SharedSpan<uint64_t> full_, empty_;

  template <class Arena>
  FSQ_BOTH static Ring carve(Arena& arena) {
    Ring r;
    r.full_ = arena.template take<uint64_t>(STAGES);
    r.empty_ = arena.template take<uint64_t>(STAGES);
    return r;
  }
  // How many of the producer's threads arrive for a stage, the one that announces the bytes among them, and how many
  // warps give it back.
  FSQ_DEVICE void initialise(int arrivals, int readers) const {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(full_.address(i), uint32_t(arrivals));
      ptx::mbarrier_init(empty_.address(i), uint32_t(readers));
    }
  }
  FSQ_DEVICE uint32_t full(int at) const { return full_.address(at); }

  FSQ_DEVICE void wait_full(const Stage<STAGES>& s, uint32_t* fault) const {
    wait_for(full_.address(s.at()), s.round(), fault);
  }
  FSQ_DEVICE void wait_empty(const Stage<STAGES>& s, uint32_t* fault) const {
    wait_for(empty_.address(s.at()), s.round() ^ 1, fault);
  }
  // Lane 0 of a warp tells the producer that no lane reads a stage any more.
  FSQ_DEVICE void release(int at) const {
    __syncwarp();
    if (ptx::lane() == 0) ptx::mbarrier_arrive(empty_.address(at));
  }
};

// Copies ROWS rows from `row` on of a head, W columns, to elements first .. of `to`; `full` counts the bytes, which
// must have been announced. One thread.
template <int ROWS, int W, class E>
FSQ_DEVICE void load_tile(const SharedSpan<E>& to, int first, const TensorMap* map, int row, int head, int batch,
                          uint32_t full) {
  FSQ_UNROLL
  for (int panel = 0; panel < W / kPanel; ++panel) {
    const int corner[] = {panel * kPanel, row, head, batch};
    ptx::tensor_load(to.address(first + panel * ROWS * kPanel), map, corner, full);
  }
}
template <int ROWS, int W, class E>
constexpr uint32_t kTileBytes = ROWS * W * sizeof(E);

// Descriptors of a tile of ROWS rows that begins at `shared`: as an operand whose terms are the columns, and as one
// whose terms are the rows.
FSQ_DEVICE uint64_t terms_across(uint32_t shared) {
  return ptx::matrix_descriptor(shared, 16, kPatternBytes, Swizzle::bytes128);
}
template <int ROWS>
FSQ_DEVICE uint64_t terms_down(uint32_t shared) {
  return ptx::matrix_descriptor(shared, ROWS * kPanelBytes, kPatternBytes, Swizzle::bytes128);
}
// How far into a tile of ROWS rows the columns 16 c .. 16 c + 15 begin, in bytes.
template <int ROWS>
FSQ_BOTH constexpr uint32_t columns_at(int c) {
  return uint32_t(c / 4 * ROWS * kPanelBytes + c % 4 * 32);
}

// d (+)= A B^T over W columns: A from shared memory, 64 rows of a tile of AROWS; B a tile of BROWS rows.
template <int AROWS, int BROWS, int W, class E, int R>
FSQ_DEVICE void multiply_across(float (&d)[R], uint64_t a, uint64_t b) {
  FSQ_UNROLL
  for (int c = 0; c < W / 16; ++c)
    ptx::wgmma<E>(d, ptx::advance(a, columns_at<AROWS>(c)), ptx::advance(b, columns_at<BROWS>(c)), c > 0);
}
// The same with A in registers.
template <int BROWS, int W, class E, int R>
FSQ_DEVICE void multiply_across(float (&d)[R], const uint32_t (&a)[W / 16][4], uint64_t b) {
  FSQ_UNROLL
  for (int c = 0; c < W / 16; ++c) ptx::wgmma<E>(d, a[c], ptx::advance(b, columns_at<BROWS>(c)), c > 0);
}
// sums += A B over the rows of B, a tile of 16 K rows; A in registers.
template <int K, class E, int R>
FSQ_DEVICE void multiply_down(float (&sums)[R], const uint32_t (&a)[K][4], uint64_t b) {
  FSQ_UNROLL
  for (int c = 0; c < K; ++c)
    ptx::wgmma<E, ptx::Major::mn>(sums, a[c], ptx::advance(b, uint32_t(c * 16 * kPanelBytes)), true);
}

// Accumulators of 16 K columns, rounded, as the left operand of a product over them.
template <class E, int K>
FSQ_DEVICE void pack_columns(uint32_t (&a)[K][4], const float (&x)[2 * K][4]) {
  FSQ_UNROLL
  for (int c = 0; c < K; ++c) as_left<E>(a[c], x[2 * c], x[2 * c + 1]);
}

template <int N>
FSQ_DEVICE void clear(float (&x)[N][4]) {
  FSQ_UNROLL
  for (int n = 0; n < N; ++n) FSQ_UNROLL
  for (int i = 0; i < 4; ++i) x[n][i] = 0;
}

// Rows from `from` on of a tile of ROWS rows, which begins at element `first` and which all C consumers have waited
// for, become 0: what lies behind a sequence's length would not vanish when multiplied with 0 if it is not finite. All
// threads of the consumers, who use `barrier` for nothing else.
template <int ROWS, int W, int C, class E>
FSQ_DEVICE void clear_rows(const SharedSpan<E>& tile, int first, int from, int barrier) {
  constexpr int kWide = 16 / int(sizeof(E)), kPanels = W / kPanel;
  const int thread = int(threadIdx.x) - kGroup, chunks = (ROWS - from) * kPanel / kWide;
  for (int i = thread; i < kPanels * chunks; i += C * kGroup) {
    const int panel = i / chunks, chunk = i % chunks;
    tile.template store<uint4>(first + (panel * ROWS + from) * kPanel + chunk * kWide, make_uint4(0, 0, 0, 0));
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(barrier, C * kGroup);
}

// `total` tiles, `tiles` of each of `heads` heads a batch row, of which `section` run side by side. `group` query heads
// share keys and values. `scale` makes products logits in units of ln 2. CTAs take tiles in turns, and `turns` of them
// are over when `span` tiles are.
struct Schedule {
  int tiles, heads, section, total, group;
  float scale;
  int span, turns;
};

// f(index) for the tiles of this CTA. CTAs take turns in one direction and then in the other, so that each gets long
// tiles and short ones; where lengths begin anew, at each span, so do the turns, in the direction in which the last
// span did not begin. All that goes from one tile to the next is a number: the producer of the backward pass has no
// registers for more.
template <class F>
FSQ_DEVICE void each_tile(const Schedule& schedule, F f) {
  for (int turn = 0;; ++turn) {
    const int spans = turn / schedule.turns, first = spans * schedule.span, within = turn - spans * schedule.turns;
    if (first >= schedule.total) return;
    const bool back = (within + spans) % 2;
    const int at = within * int(gridDim.x) + (back ? int(gridDim.x) - 1 - int(blockIdx.x) : int(blockIdx.x));
    if (at < schedule.span && first + at < schedule.total) f(first + at);
  }
}

// Host side.

// The tiles of B x `heads` heads, `tiles` each, of which `section` are to run side by side.
//
// Where tiles grow, as under a causal mask, a span is a section: turns that go on from one section to the next would
// always give the same CTAs the longest ones if a section is an even number of turns. A section of less than two turns
// cannot make up for that, and becomes four.
inline Schedule schedule_of(const AttentionParams& p, int64_t tiles, int64_t heads, int64_t section, int64_t group,
                            int sm_count) {
  const int64_t total = tiles * p.B * heads, width = total < sm_count ? total : sm_count;
  int64_t span = total;
  if ((p.left < 0) != (p.right < 0)) {
    if (tiles * section * 8 < width * 15) section = tiles_of(4 * width, tiles);
    if (section > p.B * heads) section = p.B * heads;
    span = tiles * section;
  }
  return {int(tiles),   int(heads),
          int(section), int(total),
          int(group),   float(p.scale * kLog2e),
          int(span),    int(width ? tiles_of(span, width) : 1)};
}

// The map of a tensor of `heads` heads with n rows each, for boxes of `rows` rows of a panel.
inline std::string encode(TensorMap& map, const AttentionParams& p, const Heads& t, int64_t n, int64_t heads, int width,
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

inline Launch hopper_launch(const char* name, const CudaAttentionParams& c, const Schedule& schedule, int sm_count,
                            int threads, int shared) {
  const int blocks = schedule.total < sm_count ? schedule.total : sm_count;
  Launch launch(name, describe(c.a), dim3(unsigned(blocks)), dim3(unsigned(threads)));
  launch.shared = shared;
  launch.stream = static_cast<cudaStream_t>(c.stream);
  return launch;
}

// f(e, w): e of the element type, decltype(w)::value the size of a head, 64 or 128.
template <class F>
auto for_hopper(const AttentionParams& p, F f) {
  const auto widths = [&](auto e) {
    return p.E == 64 ? f(e, std::integral_constant<int, 64>()) : f(e, std::integral_constant<int, 128>());
  };
  return p.dtype == DType::bf16 ? widths(__nv_bfloat16()) : widths(__half());
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
