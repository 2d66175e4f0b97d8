// How a value that one rank computes in a step reaches the ranks that multiply it in the next.
//
// A channel has two buffers (Slices). The n-th publication goes from this rank's slice of buffer (n + 1) % 2 to the
// same slice of that buffer everywhere. Two buffers are enough: whoever publishes n + 1 has seen publication n of all,
// and none publishes n before it has read all of n - 1.
#pragma once
#include "cuda/product.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr uint64_t kPatience = 5000000000;  // nanoseconds that a rank waits for the others

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// Whether the phase of this parity came to its end, to all lanes of a warp, before patience was lost.
FSQ_DEVICE bool arrived(uint32_t mbarrier, uint32_t parity) {
  uint64_t since = 0;
  bool late = false;
  while (!late && !ptx::mbarrier_try_wait(mbarrier, parity)) {
    const uint64_t now = ptx::globaltimer();
    if (!since) since = now;
    late = now - since > kPatience;
  }
  return !__any_sync(0xffffffffu, late);
}

// One CTA has all units: its own barrier is all there is.
template <class E>
struct BlockChannel {
  static constexpr bool kCompiled = true;
  Slices<E> slices;

  template <class Arena>
  FSQ_BOTH static BlockChannel carve(Arena& arena, int ranks, int rows, int width) {
    BlockChannel c;
    c.slices = Slices<E>::carve(arena, ranks, rows, width);
    return c;
  }
  FSQ_DEVICE static int rank(const CudaPlan&) { return 0; }
  // Where in the workspace this channel of this group lies; what follows all groups' parts of it comes back.
  FSQ_DEVICE char* bind(char* at, int64_t, int64_t) { return at; }
  // Between what every thread does to prepare the block's memory and the first step.
  FSQ_DEVICE void begin(int) { __syncthreads(); }
  FSQ_DEVICE void publish(int, int) { __syncthreads(); }
  // False, to all lanes of a warp, if the others did not answer: then there is nothing to be read.
  FSQ_DEVICE bool wait(int) { return true; }
  FSQ_DEVICE void end() {}
};

// A cluster: the slice goes by one bulk copy to each peer's shared memory. The sender arrives at the peer's mbarrier as
// well, announcing the bytes. Two things must be ordered, and each by one of the two:
//
// - The bytes, before the peer reads them: the copy's own completion at the mbarrier, which is where they land, counts
//   them, and the peer's wait acquires them. The copy reads what this CTA's threads wrote: fence_proxy_async, barrier.
// - This CTA's reads of the buffer that the peer overwrites next, before its copy lands: publication n + 1 of the peer
//   goes into the buffer of publication n - 1, which this CTA has read in the step before it publishes n. The reads,
//   the barrier in `publish`, the arrival of publication n, the peer's wait for it and the peer's next copy stand in
//   one chain. The completion of the copy alone would say nothing of those reads: it is issued by the same thread but
//   is not ordered after what the others have read.
//
// Nothing else goes from rank to rank: what a rank writes to global memory, no other rank reads. So the arrival needs
// no release of writes at the scope of the cluster, whose MEMBAR.ALL.GPU would stand in every step: a read is over when
// its value has been used, the products of those reads went through a barrier, and no fence could make it more so.
// Consumers of multicast copies free their slots by the same instruction. sm_90
template <class E>
struct ClusterChannel {
  static constexpr bool kCompiled = kHasClusters;  // on older GPUs nobody calls its kernels
  Slices<E> slices;
  SharedSpan<uint64_t> full;  // [2]

  template <class Arena>
  FSQ_BOTH static ClusterChannel carve(Arena& arena, int ranks, int rows, int width) {
    ClusterChannel c;
    c.slices = Slices<E>::carve(arena, ranks, rows, width);
    c.full = arena.template take<uint64_t>(2);
    return c;
  }
  FSQ_DEVICE static int rank(const CudaPlan&) { return int(ptx::cluster_rank()); }
  FSQ_DEVICE char* bind(char* at, int64_t, int64_t) { return at; }
  FSQ_DEVICE void begin(int) {
    if (threadIdx.x == 0) {
      for (int which : {0, 1}) ptx::mbarrier_init(full.address(which), uint32_t(slices.ranks - 1));
      ptx::fence_mbarrier_init();
    }
    ptx::fence_proxy_async();  // the buffers have been cleared
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  FSQ_DEVICE void publish(int rank, int n) {
    ptx::fence_proxy_async();  // each thread for what it wrote
    __syncthreads();
    // A warp issues its lanes' copies one after the other: each warp takes some of the peers.
    const int which = (n + 1) % 2, warps = int(blockDim.x) / 32;
    const int peer = int(threadIdx.x) / 32 + int(threadIdx.x) % 32 * warps;
    if (peer < slices.ranks && peer != rank) {
      const uint32_t mine = slices.data.address(slices.at(which, rank));
      const uint32_t barrier = ptx::mapa(full.address(which), uint32_t(peer));
      const uint32_t bytes = uint32_t(slices.slice() * int(sizeof(E)));
      ptx::mbarrier_arrive_expect_tx_remote_reads(barrier, bytes);
      ptx::cp_async_bulk_to_remote(ptx::mapa(mine, uint32_t(peer)), mine, bytes, barrier);
    }
  }
  FSQ_DEVICE bool wait(int n) { return arrived(full.address((n + 1) % 2), uint32_t(n / 2 % 2)); }
  // No CTA may leave while its last copy, which a peer may not have received, is still read from its shared memory.
  // Only the peer's wait tells that the copy is over, and only this barrier tells of that wait.
  FSQ_DEVICE void end() {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};

// Any CTAs of the device, all of them resident: the slice goes through global memory, where a flag of each rank counts
// its publications. A rank waits for the flags, not for a barrier of the whole grid. The two buffers lie in global
// memory; in shared memory there is one, which is filled after all threads have read what it held.
template <class E>
struct GridChannel {
  static constexpr bool kCompiled = true;
  static constexpr int kVector = 16 / int(sizeof(E));
  Slices<E> slices;
  E* data;          // [2][ranks][slice]
  uint32_t* flags;  // [ranks], zero before the launch

  template <class Arena>
  FSQ_BOTH static GridChannel carve(Arena& arena, int ranks, int rows, int width) {
    GridChannel c;
    c.slices = Slices<E>::carve(arena, ranks, rows, width, 1);
    c.data = nullptr;
    c.flags = nullptr;
    return c;
  }
  FSQ_BOTH int all() const { return 2 * slices.ranks * slices.slice(); }
  FSQ_DEVICE int place(int n, int rank) const { return ((n + 1) % 2 * slices.ranks + rank) * slices.slice(); }
  // Of the workspace, for one group.
  FSQ_BOTH int64_t bytes() const {
    return (int64_t(all()) * int(sizeof(E)) + slices.ranks * int(sizeof(uint32_t)) + 255) / 256 * 256;
  }
  FSQ_DEVICE static int rank(const CudaPlan& plan) { return int(blockIdx.x) % plan.ranks; }
  FSQ_DEVICE char* bind(char* at, int64_t group, int64_t groups) {
    char* const mine = at + group * bytes();
    data = reinterpret_cast<E*>(mine);
    flags = reinterpret_cast<uint32_t*>(mine + int64_t(all()) * int(sizeof(E)));
    return at + groups * bytes();
  }
  FSQ_DEVICE void begin(int) { __syncthreads(); }
  FSQ_DEVICE void publish(int rank, int n) {
    __syncthreads();
    const GlobalSpan<E> out(data, all());
    const int from = slices.at(0, rank), to = place(n, rank);
    for (int i = int(threadIdx.x) * kVector; i < slices.slice(); i += int(blockDim.x) * kVector)
      out.template store<uint4>(to + i, slices.data.template load<uint4>(from + i));
    __syncthreads();
    if (threadIdx.x == 0) ptx::st_release(flags + rank, uint32_t(n + 1));
  }
  FSQ_DEVICE bool wait(int n) {
    bool late = false;
    uint64_t since = 0;
    for (int peer = int(threadIdx.x); peer < slices.ranks && !late; peer += int(blockDim.x))
      while (!late && ptx::ld_acquire(flags + peer) < uint32_t(n + 1)) {
        const uint64_t now = ptx::globaltimer();
        if (!since) since = now;
        late = now - since > kPatience;
      }
    if (__syncthreads_or(late)) return false;
    // As many loads under way as there are registers for: one after the other each would cost a trip to L2.
    constexpr int kTogether = 8;
    const GlobalSpan<E> in(data, all());
    const int first = place(n, 0), size = slices.ranks * slices.slice();
    const int step = int(blockDim.x) * kVector;
    for (int i = int(threadIdx.x) * kVector; i < size; i += kTogether * step) {
      uint4 value[kTogether];
      FSQ_UNROLL
      for (int c = 0; c < kTogether; ++c)
        if (i + c * step < size) value[c] = in.template load<uint4>(first + i + c * step);
      FSQ_UNROLL
      for (int c = 0; c < kTogether; ++c)
        if (i + c * step < size) slices.data.template store<uint4>(i + c * step, value[c]);
    }
    __syncthreads();
    return true;
  }
  FSQ_DEVICE void end() {}
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
