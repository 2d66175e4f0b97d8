// The barriers of barrier_costs.h, each a type with the same four functions, and the loop that times them.
//
// To show that a barrier synchronises, a word goes round: in round n one thread takes it from where the one before it
// left it, adds one and leaves it where the next will look. What the barrier does not order would be lost, and under
// the emulator is a race.
#include "cuda/barrier_costs.h"

#include "cuda/exchange.cuh"
#include "cuda/launch.h"
#include "cuda/warp_channel.cuh"
#include "cuda/warp_tile.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kRows = 16;
typedef __nv_bfloat16 Element;  // of what an exchange moves

// Whether the flag came to `value`, before patience was lost.
FSQ_DEVICE bool await(const uint32_t* flag, uint32_t value) {
  uint64_t since = 0;
  while (ptx::ld_acquire(flag) < value) {
    const uint64_t now = ptx::globaltimer();
    if (!since) since = now;
    if (now - since > kPatience) return false;
  }
  return true;
}

struct BlockBarrier {
  static constexpr bool kCompiled = true;
  SharedSpan<uint32_t> word;

  template <class Arena>
  FSQ_BOTH static BlockBarrier carve(Arena& arena, const BarrierParams&) {
    return {arena.template take<uint32_t>(1)};
  }
  FSQ_DEVICE void begin(const BarrierParams&) {
    if (threadIdx.x == 0) word.store(0, 0u);
    __syncthreads();
  }
  FSQ_DEVICE void hand(int n) const {
    if (int(threadIdx.x) == n % int(blockDim.x)) word.store(0, word[0] + 1);
  }
  // False, to whoever finds out, if the others did not come.
  FSQ_DEVICE bool pass(int) const {
    __syncthreads();
    return true;
  }
  // Of `rounds` rounds, to thread 0: how often the word was handed on.
  FSQ_DEVICE uint32_t end(int) const { return word[0]; }
};

struct ClusterBarrier {
  static constexpr bool kCompiled = kHasClusters;
  SharedSpan<uint32_t> word;

  template <class Arena>
  FSQ_BOTH static ClusterBarrier carve(Arena& arena, const BarrierParams&) {
    return {arena.template take<uint32_t>(1)};
  }
  FSQ_DEVICE void begin(const BarrierParams&) {
    if (threadIdx.x == 0) word.store(0, 0u);
    pass(0);
  }
  FSQ_DEVICE void hand(int n) const {
    const uint32_t size = ptx::cluster_size(), rank = ptx::cluster_rank();
    if (threadIdx.x == 0 && uint32_t(n) % size == rank)
      ptx::st_remote(ptx::mapa(word.address(0), (rank + 1) % size), word[0] + 1);
  }
  FSQ_DEVICE bool pass(int) const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    return true;
  }
  FSQ_DEVICE uint32_t end(int rounds) const {
    // Only who would take it next has the last word.
    return uint32_t(rounds) % ptx::cluster_size() == ptx::cluster_rank() ? word[0] : 0;
  }
};

// The channels of the scans themselves, so that what is timed is what they do.
template <template <class> class Channel>
struct Exchange {
  static constexpr bool kCompiled = Channel<Element>::kCompiled;
  Channel<Element> channel;
  int rank;

  template <class Arena>
  FSQ_BOTH static Exchange carve(Arena& arena, const BarrierParams& p) {
    Exchange e;
    e.channel = Channel<Element>::carve(arena, p.ctas, kRows, p.units);
    e.rank = 0;
    return e;
  }
  FSQ_DEVICE void begin(const BarrierParams& p) {
    CudaPlan plan{};
    plan.ranks = p.ctas;
    rank = Channel<Element>::rank(plan);
    channel.bind(static_cast<char*>(p.workspace), 0, 1);
    const Slices<Element>& slices = channel.slices;
    for (int i = int(threadIdx.x); i < slices.buffers * slices.ranks * slices.slice(); i += int(blockDim.x))
      slices.data.store(i, narrow<Element>(0));
    channel.begin(rank);
  }
  // The word stands at the head of a slice.
  FSQ_DEVICE uint32_t found(int n) const {
    const Slices<Element>& slices = channel.slices;
    return n ? slices.data.template load<uint32_t>(slices.at(n % 2, (n - 1) % slices.ranks)) : 0;
  }
  FSQ_DEVICE void hand(int n) const {
    const Slices<Element>& slices = channel.slices;
    if (threadIdx.x == 0 && n % slices.ranks == rank) slices.data.store(slices.at((n + 1) % 2, rank), found(n) + 1);
  }
  FSQ_DEVICE bool pass(int n) {
    channel.publish(rank, n);
    const bool arrived = channel.wait(n);
    return !__syncthreads_or(!arrived);
  }
  FSQ_DEVICE uint32_t end(int rounds) {
    channel.end();
    return found(rounds);
  }
};

// The channel of warps that go their own way, with the pieces of an LSTM.
template <int Rows>
struct WarpExchange {
  static constexpr bool kCompiled = kHasClusters;
  typedef StatePiece<Cell::lstm, Element> Piece;
  typedef WarpTile<Cell::lstm> Tile;
  WarpChannel<uint2> channel;
  int ranks, rank, rounds, blocks;
  uint32_t word;  // of what this lane sends

  template <class Arena>
  FSQ_BOTH static WarpExchange carve(Arena& arena, const BarrierParams& p) {
    WarpExchange e;
    e.ranks = p.ctas;
    e.rounds = p.rounds;
    e.blocks = p.ctas * Tile::kUnits / kBlock<Element>;
    e.channel = WarpChannel<uint2>::carve(arena, e.blocks * Rows / 2, e.blocks * Rows / 2);
    e.rank = 0;
    e.word = 0;
    return e;
  }
  FSQ_DEVICE void begin(const BarrierParams&) {
    rank = int(ptx::cluster_rank());
    channel.begin(rounds);
  }
  // The word stands at the head of a rank's first piece.
  FSQ_DEVICE uint32_t found(int n) const {
    const int block = (n + ranks - 1) % ranks * Tile::kUnits / kBlock<Element>;
    return n ? channel.data[channel.at(n - 1) + block * kHalf].x : 0;
  }
  FSQ_DEVICE void hand(int n) { word = threadIdx.x / 32 == 0 && n % ranks == rank ? found(n) + 1 : 0; }
  FSQ_DEVICE bool pass(int n) const {
    const Piece piece(blocks, Rows, rank);
    __syncwarp();
    FSQ_UNROLL
    for (int c = 0; c < Piece::kMost; ++c) {
      const int to = piece.first + c * piece.step;
      channel.send_if(to < ranks, n, channel.place(piece.piece, (to + rank) % ranks), uint4{word, word, word, word});
    }
    const bool came = channel.wait(n);
    if (threadIdx.x == 0) channel.rearm(n, rounds);
    return came;
  }
  FSQ_DEVICE uint32_t end(int) const {
    channel.end();
    return found(rounds);
  }
};

// Two CTAs, a thread of each: a round is one way.
struct FlagBarrier {
  static constexpr bool kCompiled = true;
  uint32_t* words;  // [3] of the workspace: the flag of each CTA, and the word

  template <class Arena>
  FSQ_BOTH static FlagBarrier carve(Arena&, const BarrierParams& p) {
    return {static_cast<uint32_t*>(p.workspace)};
  }
  FSQ_DEVICE void begin(const BarrierParams&) {}
  FSQ_DEVICE void hand(int n) const {
    const GlobalSpan<uint32_t> word(words + 2, 1);
    if (threadIdx.x == 0 && int(blockIdx.x) == n % 2) word.store(0, word.load(0) + 1);
  }
  FSQ_DEVICE bool pass(int n) const {
    if (threadIdx.x) return true;
    if (int(blockIdx.x) != n % 2) return await(words + n % 2, uint32_t(n + 1));
    ptx::st_release(words + n % 2, uint32_t(n + 1));
    return true;
  }
  FSQ_DEVICE uint32_t end(int rounds) const {
    // The last to wait knows that the other is done, the other threads of its block know nothing.
    return rounds > 0 && threadIdx.x == 0 && int(blockIdx.x) == rounds % 2 ? GlobalSpan<uint32_t>(words + 2, 1).load(0)
                                                                           : 0;
  }
};

struct GridBarrier {
  static constexpr bool kCompiled = true;
  uint32_t* words;  // [2] of the workspace: arrivals, and the word

  template <class Arena>
  FSQ_BOTH static GridBarrier carve(Arena&, const BarrierParams& p) {
    return {static_cast<uint32_t*>(p.workspace)};
  }
  FSQ_DEVICE void begin(const BarrierParams&) {}
  FSQ_DEVICE void hand(int n) const {
    const GlobalSpan<uint32_t> word(words + 1, 1);
    if (threadIdx.x == 0 && blockIdx.x == unsigned(n) % gridDim.x) word.store(0, word.load(0) + 1);
  }
  FSQ_DEVICE bool pass(int n) const {
    __syncthreads();
    bool late = false;
    if (threadIdx.x == 0) {
      ptx::red_release_add(words, 1);
      late = !await(words, uint32_t(n + 1) * gridDim.x);
    }
    return !__syncthreads_or(late);
  }
  FSQ_DEVICE uint32_t end(int) const { return GlobalSpan<uint32_t>(words + 1, 1).load(0); }
};

namespace {

template <class B, bool Handed>
__global__ void __launch_bounds__(1024) barrier_loop(BarrierParams p) {
  if constexpr (B::kCompiled) {
    SharedArena arena = dynamic_shared();
    B barrier = B::carve(arena, p);
    barrier.begin(p);
    const uint64_t since = ptx::globaltimer(), from = ptx::clock();
    bool late = false;
    for (int n = 0; n < p.rounds && !late; ++n) {
      if (Handed) barrier.hand(n);
      late = !barrier.pass(n);
    }
    const uint64_t to = ptx::clock(), until = ptx::globaltimer();
    if (late) __trap();
    const uint32_t word = barrier.end(p.rounds);
    if (threadIdx.x == 0) {
      p.clocks[blockIdx.x] = to - from;
      p.ns[blockIdx.x] = until - since;
      p.word[blockIdx.x] = word;
    }
  } else {
    __trap();
  }
}

// f(b) with b of the barrier's type.
template <class F>
auto for_barrier(Barrier kind, F f) {
  switch (kind) {
    case Barrier::cluster:
      return f(ClusterBarrier());
    case Barrier::cluster_exchange:
      return f(Exchange<ClusterChannel>());
    case Barrier::flag:
      return f(FlagBarrier());
    case Barrier::grid_exchange:
      return f(Exchange<GridChannel>());
    case Barrier::grid:
      return f(GridBarrier());
    case Barrier::warp_exchange_4:
      return f(WarpExchange<4>());
    case Barrier::warp_exchange_8:
      return f(WarpExchange<8>());
    default:
      return f(BlockBarrier());
  }
}

}  // namespace
}  // namespace FSQ_ISA

int64_t barrier_workspace(const BarrierParams& p) {
  using namespace FSQ_ISA;
  if (p.kind != Barrier::grid_exchange) return 256;
  SharedArena arena;
  return GridChannel<Element>::carve(arena, p.ctas, kRows, p.units).bytes();
}

std::string barrier_rounds(const BarrierParams& p) {
  using namespace FSQ_ISA;
  static const char* const names[] = {
      "barrier_block",         "barrier_cluster", "barrier_cluster_exchange", "barrier_flag",
      "barrier_grid_exchange", "barrier_grid",    "barrier_warp_exchange_4",  "barrier_warp_exchange_8"};
  const bool by_warp = p.kind == Barrier::warp_exchange_4 || p.kind == Barrier::warp_exchange_8;
  const bool clustered = by_warp || p.kind == Barrier::cluster || p.kind == Barrier::cluster_exchange;
  const std::string shape = "CTAs=" + std::to_string(p.ctas) + " threads=" + std::to_string(p.threads) +
                            " rounds=" + std::to_string(p.rounds) + " units=" + std::to_string(p.units);
  Launch launch(names[int(p.kind)], shape, dim3(unsigned(p.ctas)), dim3(unsigned(p.threads)));
  Device device;
  const std::string error = query(device);
  if (!error.empty()) return error;
  if (p.kind == Barrier::block && p.ctas != 1) return launch.error("expected 1 CTA");
  if (p.kind == Barrier::flag && p.ctas != 2) return launch.error("expected 2 CTAs");
  if (by_warp && p.threads != WarpTile<Cell::lstm>::kThreads) return launch.error("expected 256 threads");
  if (clustered && p.ctas > device.max_cluster)
    return launch.error("the largest cluster of the device has " + std::to_string(device.max_cluster) + " CTAs");
  launch.cluster = clustered ? p.ctas : 1;
  launch.cooperative = p.ctas > 1 && !clustered;
  launch.stream = static_cast<cudaStream_t>(p.stream);
  return for_barrier(p.kind, [&](auto b) {
    typedef decltype(b) B;
    SharedArena arena;
    B::carve(arena, p);
    launch.shared = arena.bytes();
    // All of an SM's shared memory, so that the two do not share an SM.
    if (p.kind == Barrier::flag) launch.shared = device.shared_per_block;
    return p.handed ? run(&barrier_loop<B, true>, launch, p) : run(&barrier_loop<B, false>, launch, p);
  });
}

}  // namespace fusedseq
