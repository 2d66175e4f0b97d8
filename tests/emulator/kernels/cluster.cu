// Clusters: distributed shared memory, cluster barriers, mbarriers, asynchronous stores and bulk copies.
#include "case.h"

using namespace fusedseq;

namespace {

// Every block hands its values to the next of the cluster, `steps` times, by remote stores and cluster barriers.
// Bugs: 1 a first store before the peers are known to run, 2 no barrier before reading, 3 the writers' arrival
// publishes nothing, 4 the block leaves while its peer may still write, 5 a rank that does not exist, 6 a store past
// the end, 7 waits without having arrived.
template <int Bug>
__global__ void ring(float* data, int steps) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> values = arena.take<float>(2 * n);
  const uint32_t next = (ptx::cluster_rank() + 1) % ptx::cluster_size() + (Bug == 5 ? 100u : 0u);
  float* const mine = data + int(blockIdx.x) * n;
  float value = mine[i];
  if (Bug != 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  for (int step = 0; step < steps; ++step) {
    const int slot = step % 2 * n + i;
    const uint32_t there = ptx::mapa(values.address(slot), next) + (Bug == 6 ? 65536u : 0u);
    ptx::st_remote(there, value);
    if (Bug == 4 && step == steps - 1) break;
    if (Bug == 7 && step == 1) ptx::cluster_wait();
    if (Bug == 3)
      ptx::cluster_arrive_relaxed();
    else if (Bug != 2)
      ptx::cluster_arrive();
    if (Bug != 2) ptx::cluster_wait();
    value = values[slot];
  }
  mine[i] = value;
}

// The same with st_async or bulk copies that the receiver's mbarrier counts, and remote arrivals that say when a buffer
// may be filled again. Bugs: 1 reads without waiting, 2 nobody expects the bytes, 3 one arrival too many, 4 the sender
// does not wait for a free buffer, 5 (bulk) no proxy fence, 6 (bulk) the source is overwritten under way, 7 mbarriers
// used before the cluster knows of them, 8 the wait for a free buffer is of block scope, 9 the mbarrier of the sender's
// own block.
template <int Bug, bool Bulk>
__global__ void relay(float* data, int steps) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x), bytes = n * int(sizeof(float));
  const SharedSpan<float> inbox = arena.take<float>(2 * n), outbox = arena.take<float>(2 * n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(2), free_slot = arena.take<uint64_t>(2);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
  const uint32_t next = (rank + 1) % size, previous = (rank + size - 1) % size;
  if (i == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(full.address(slot), Bug == 3 ? 2 : 1);
      ptx::mbarrier_init(free_slot.address(slot), unsigned(n));
    }
    ptx::fence_mbarrier_init();
  }
  if (Bug != 7) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  float* const mine = data + int(blockIdx.x) * n;
  float value = mine[i];
  for (int step = 0; step < steps; ++step) {
    const int slot = step % 2;
    const uint32_t parity = uint32_t(step / 2 % 2);
    if (i == 0 && Bug != 2) ptx::mbarrier_arrive_expect_tx(full.address(slot), uint32_t(bytes));
    if (Bug == 3 && i < 2) ptx::mbarrier_arrive(full.address(slot));
    if (step >= 2 && Bug != 4)
      while (!ptx::mbarrier_try_wait(free_slot.address(slot), parity ^ 1)) {
      }
    const uint32_t there = ptx::mapa(inbox.address(slot * n), next);
    const uint32_t theirs = Bug == 9 ? full.address(slot) : ptx::mapa(full.address(slot), next);
    if (Bulk) {
      const int base = Bug == 6 ? 0 : slot * n;
      outbox.store(base + i, value);
      if (Bug != 5) ptx::fence_proxy_async();
      __syncthreads();
      if (i == 0) ptx::cp_async_bulk_to_remote(there, outbox.address(base), uint32_t(bytes), theirs);
    } else {
      ptx::st_async(there + uint32_t(i) * 4, value, theirs);
    }
    if (Bug != 1)
      while (!ptx::mbarrier_try_wait(full.address(slot), Bug == 8 ? parity ^ 1 : parity)) {
      }
    value = inbox[slot * n + i];
    ptx::mbarrier_arrive_remote_reads(ptx::mapa(free_slot.address(slot), previous));
  }
  mine[i] = value;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Two blocks hand pairs of values back and forth by st_async alone: a store tells that what its thread has read before
// may be overwritten, and __syncwarp that of the other lane as well. Bugs: 1 no __syncwarp, 2 a read after the store.
template <int Bug>
__global__ void echo(float* data, int steps) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x), bytes = n * int(sizeof(float));
  const SharedSpan<float> inbox = arena.take<float>(2 * n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(2);
  const uint32_t peer = ptx::cluster_rank() ^ 1;
  if (i == 0) {
    for (int slot = 0; slot < 2; ++slot) ptx::mbarrier_init(full.address(slot), 1);
    for (int step = 0; step < 2 && step < steps; ++step)
      ptx::mbarrier_arrive_expect_tx(full.address(step), uint32_t(bytes));
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  float* const mine = data + int(blockIdx.x) * n;
  float value = mine[i], late = 0;
  for (int step = 0; step < steps; ++step) {
    const int slot = step % 2;
    const float other = __shfl_xor_sync(0xffffffffu, value, 1);
    if (Bug != 1) __syncwarp();
    if (i % 2 == 0)
      ptx::st_async(ptx::mapa(inbox.address(slot * n + i), peer), make_float2(other, value),
                    ptx::mapa(full.address(slot), peer));
    if (Bug == 2 && step > 0) late += inbox[(slot ^ 1) * n + i];
    while (!ptx::mbarrier_try_wait(full.address(slot), uint32_t(step / 2 % 2))) {
    }
    if (i == 0 && step + 2 < steps) ptx::mbarrier_arrive_expect_tx(full.address(slot), uint32_t(bytes));
    value = inbox[slot * n + i];
  }
  mine[i] = value + 0 * late;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Block 0 writes into block 1 and arrives at its mbarrier. Bugs: 1 an arrival that publishes no writes, 2 a wait of
// block scope.
template <int Bug>
__global__ void hand_over(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> inbox = arena.take<float>(n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(1);
  if (i == 0) ptx::mbarrier_init(full.address(0), unsigned(n));
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (ptx::cluster_rank() == 0) {
    const uint32_t there = ptx::mapa(inbox.address(i), 1), theirs = ptx::mapa(full.address(0), 1);
    if (Bug == 3)
      ptx::st_async(there, in[i], theirs);
    else
      ptx::st_remote(there, in[i]);
    if (Bug == 3)
      ptx::mbarrier_arrive_expect_tx_remote_reads(theirs, 4);
    else if (Bug == 1)
      ptx::mbarrier_arrive_remote_reads(theirs);
    else
      ptx::mbarrier_arrive_remote(theirs);
  } else {
    if (Bug == 2 || Bug == 3)
      while (!ptx::mbarrier_try_wait(full.address(0), 0)) {
      }
    else
      while (!ptx::mbarrier_try_wait_cluster(full.address(0), 0)) {
      }
    out[i] = inbox[n - 1 - i];
  }
}

// Pairs of threads across two blocks exchange values of 2, 8 and 16 bytes by remote loads.
__global__ void remote_sizes(float4* wide, float2* middle, __nv_bfloat16* narrow) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x), at = int(blockIdx.x) * n + i;
  const SharedSpan<float4> wides = arena.take<float4>(n);
  const SharedSpan<float2> middles = arena.take<float2>(n);
  const SharedSpan<__nv_bfloat16> narrows = arena.take<__nv_bfloat16>(n);
  wides.store(i, wide[at]);
  middles.store(i, middle[at]);
  narrows.store(i, narrow[at]);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const uint32_t peer = ptx::cluster_rank() ^ 1;
  wide[at] = ptx::ld_remote<float4>(ptx::mapa(wides.address(i), peer));
  middle[at] = ptx::ld_remote<float2>(ptx::mapa(middles.address(i), peer));
  narrow[at] = ptx::ld_remote<__nv_bfloat16>(ptx::mapa(narrows.address(i), peer));
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// out = 2 in, fetched by one bulk copy a warp. Bugs: 1 a byte count that is no multiple of 16, 2 no proxy fence after
// the buffer has been cleared.
template <int Bug>
__global__ void bulk_fetch(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> values = arena.take<float>(n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(1);
  if (i == 0) ptx::mbarrier_init(full.address(0), 1);
  values.store(i, 0.0f);
  if (Bug != 2) ptx::fence_proxy_async();
  __syncthreads();
  if (i == 0) ptx::mbarrier_arrive_expect_tx(full.address(0), uint32_t(n) * 4);
  if (i % 32 == 0) ptx::cp_async_bulk_to_shared(values.address(i), in + i, Bug == 1 ? 120 : 128, full.address(0));
  while (!ptx::mbarrier_try_wait(full.address(0), 0)) {
  }
  out[i] = 2 * values[i];
  __syncthreads();
  if (i == 0) ptx::mbarrier_inval(full.address(0));
}

Launch in_cluster(const char* name, int n, int cluster, int grid, int shared) {
  Launch launch(name, "n=" + std::to_string(n) + " cluster=" + std::to_string(cluster), unsigned(grid), unsigned(n));
  launch.cluster = cluster;
  launch.shared = shared;
  return launch;
}

}  // namespace

FSQ_CASE ring_case(int bug, float* data, int n, int cluster, int grid, int steps) {
  void (*const kernels[])(float*, int) = {ring<0>, ring<1>, ring<2>, ring<3>, ring<4>, ring<5>, ring<6>, ring<7>};
  return keep(run(kernels[bug], in_cluster("ring", n, cluster, grid, n * 8), data, steps));
}

FSQ_CASE relay_case(int bug, int bulk, float* data, int n, int cluster, int grid, int steps) {
  void (*const stores[])(float*, int) = {relay<0, false>, relay<1, false>, relay<2, false>, relay<3, false>,
                                         relay<4, false>, nullptr,         nullptr,         relay<7, false>,
                                         relay<8, false>, relay<9, false>};
  void (*const bulks[])(float*, int) = {relay<0, true>, relay<1, true>, relay<2, true>, relay<3, true>, relay<4, true>,
                                        relay<5, true>, relay<6, true>, relay<7, true>, relay<8, true>, relay<9, true>};
  const Launch launch = in_cluster("relay", n, cluster, grid, n * 16 + 32);
  return keep(run(bulk ? bulks[bug] : stores[bug], launch, data, steps));
}

FSQ_CASE echo_case(int bug, float* data, int n, int steps) {
  void (*const kernels[])(float*, int) = {echo<0>, echo<1>, echo<2>};
  return keep(run(kernels[bug], in_cluster("echo", n, 2, 2, n * 8 + 16), data, steps));
}

FSQ_CASE hand_over_case(int bug, const float* in, float* out, int n) {
  void (*const kernels[])(const float*, float*) = {hand_over<0>, hand_over<1>, hand_over<2>, hand_over<3>};
  return keep(run(kernels[bug], in_cluster("hand_over", n, 2, 2, n * 4 + 16), in, out));
}

FSQ_CASE remote_sizes_case(float4* wide, float2* middle, __nv_bfloat16* narrow, int n) {
  return keep(run(remote_sizes, in_cluster("remote_sizes", n, 2, 2, n * 26), wide, middle, narrow));
}

FSQ_CASE bulk_fetch_case(int bug, const float* in, float* out, int n) {
  Launch launch = in_cluster("bulk_fetch", n, 1, 1, n * 4 + 16);
  void (*const kernels[])(const float*, float*) = {bulk_fetch<0>, bulk_fetch<1>, bulk_fetch<2>};
  return keep(run(kernels[bug], launch, in, out));
}
