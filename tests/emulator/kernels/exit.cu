// Blocks that leave their cluster: what must be known to be over before.
#include "case.h"

using namespace fusedseq;

namespace {

// Rank 0 sends its values to every peer in one bulk copy each, which the peers write out. It knows that they have come
// and are read no more 0 from a cluster barrier after the peers' waits, 1 from their arrivals at an mbarrier of its
// own. Bugs: 2 it does not wait to know, 3 the barrier comes before the peers' waits, 4 the arrivals at the barrier
// publish nothing, 5 one peer does not wait for its copy, 6 as 1 without the arrival of one peer.
template <int Variant>
__global__ void send(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x), bytes = n * int(sizeof(float));
  const SharedSpan<float> outbox = arena.take<float>(n), inbox = arena.take<float>(n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(1), received = arena.take<uint64_t>(1);
  const int rank = int(ptx::cluster_rank()), size = int(ptx::cluster_size());
  const bool last = rank == size - 1, acknowledged = Variant == 1 || Variant == 6;
  if (i == 0) {
    ptx::mbarrier_init(full.address(0), 1);
    ptx::mbarrier_init(received.address(0), unsigned(Variant == 6 ? size - 2 : size - 1));
    ptx::fence_mbarrier_init();
  }
  outbox.store(i, in[i]);
  ptx::fence_proxy_async();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (rank == 0 && i > 0 && i < size) {
    const uint32_t theirs = ptx::mapa(full.address(0), uint32_t(i));
    ptx::mbarrier_arrive_expect_tx_remote_reads(theirs, uint32_t(bytes));
    ptx::cp_async_bulk_to_remote(ptx::mapa(inbox.address(0), uint32_t(i)), outbox.address(0), uint32_t(bytes), theirs);
  }
  if (Variant == 3) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (rank > 0 && !(Variant == 5 && last)) {
    while (!ptx::mbarrier_try_wait(full.address(0), 0)) {
    }
    out[rank * n + i] = inbox[n - 1 - i];
  }
  if (acknowledged) {
    if (rank > 0 && i == 0 && !(Variant == 6 && last))
      ptx::mbarrier_arrive_remote_reads(ptx::mapa(received.address(0), 0));
    while (rank == 0 && !ptx::mbarrier_try_wait(received.address(0), 0)) {
    }
  } else if (Variant == 4) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else if (Variant != 2 && Variant != 3) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

// Rank 1 announces n values, rank 0 sends them by st_async. Rank 1 leaves once it has 0 waited for them, 1 waited in
// one thread. Bugs: 2 it does not wait, 3 nothing is sent either, 4 cluster barriers take the place of the wait.
template <int Variant>
__global__ void announce(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> inbox = arena.take<float>(n);
  const SharedSpan<uint64_t> full = arena.take<uint64_t>(1);
  if (i == 0) ptx::mbarrier_init(full.address(0), 1);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (ptx::cluster_rank() == 0) {
    if (Variant != 3) ptx::st_async(ptx::mapa(inbox.address(i), 1), in[i], ptx::mapa(full.address(0), 1));
  } else {
    if (i == 0) ptx::mbarrier_arrive_expect_tx(full.address(0), uint32_t(n) * 4);
    while ((Variant == 0 || (Variant == 1 && i == 0)) && !ptx::mbarrier_try_wait(full.address(0), 0)) {
    }
    if (Variant == 0) out[i] = inbox[n - 1 - i];
    if (Variant == 1 && i == 0)
      for (int k = 0; k < n; ++k) out[k] = inbox[n - 1 - k];
  }
  for (int round = 0; Variant == 4 && round < 8; ++round) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

Launch in_cluster(const char* name, int n, int cluster, int shared) {
  Launch launch(name, "n=" + std::to_string(n) + " cluster=" + std::to_string(cluster), unsigned(cluster), unsigned(n));
  launch.cluster = cluster;
  launch.shared = shared;
  return launch;
}

}  // namespace

FSQ_CASE send_case(int variant, const float* in, float* out, int n, int cluster) {
  void (*const kernels[])(const float*, float*) = {send<0>, send<1>, send<2>, send<3>, send<4>, send<5>, send<6>};
  return keep(run(kernels[variant], in_cluster("send", n, cluster, n * 8 + 32), in, out));
}

FSQ_CASE announce_case(int variant, const float* in, float* out, int n) {
  void (*const kernels[])(const float*, float*) = {announce<0>, announce<1>, announce<2>, announce<3>, announce<4>};
  return keep(run(kernels[variant], in_cluster("announce", n, 2, n * 4 + 16), in, out));
}
