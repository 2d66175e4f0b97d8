// Barriers and shared memory of one block.
#include "case.h"

using namespace fusedseq;

namespace {

// out[i] = in[n - 1 - i] through shared memory. Bugs: 1 no barrier, 2 store out of bounds, 3 misaligned vector load,
// 4 half of the block at another barrier, 5 a thread has left, 6 vector load past the end, 7 a trap.
template <int Bug>
__global__ void reverse(const float* in, float* out) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> values = arena.take<float>(n);
  if (Bug == 5 && i == 0) return;
  if (Bug == 7 && i == 3) __trap();
  values.store(Bug == 2 ? i + 1 : i, in[i]);
  if (Bug == 4 && i >= n / 2)
    ptx::barrier_sync(1, n);
  else if (Bug != 1)
    __syncthreads();
  if (Bug == 3)
    out[i] = values.load<float2>(n - 1 - i).x;
  else if (Bug == 6)
    out[i] = values.load<float4>(i / 4 * 4 + (i == n - 1 ? 4 : 0)).x;
  else
    out[i] = values[n - 1 - i];
}

// Every thread's value, rotated by one place `steps` times. Bug 1: no barrier between reading and overwriting.
template <int Bug>
__global__ void rotate(float* data, int steps) {
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), i = int(threadIdx.x);
  const SharedSpan<float> values = arena.take<float>(n);
  values.store(i, data[i]);
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const float next = values[(i + 1) % n];
    if (Bug != 1) __syncthreads();
    values.store(i, next);
    __syncthreads();
  }
  data[i] = values[i];
}

// Half of the warps fill a buffer, the others sum it, round by round, over two named barriers. Bugs: 1 the consumers
// never say that the buffer is free, 2 the counts differ, 3 a warp arrives twice, 4 no wait for a full buffer.
template <int Bug>
__global__ void produce(const float* in, float* out, int rounds) {
  constexpr int full = 1, empty = 2;
  SharedArena arena = dynamic_shared();
  const int n = int(blockDim.x), half = n / 2, i = int(threadIdx.x) % half;
  const SharedSpan<float> buffer = arena.take<float>(half);
  if (int(threadIdx.x) < half) {
    for (int round = 0; round < rounds; ++round) {
      if (round) ptx::barrier_sync(empty, n);
      buffer.store(i, in[round * half + i]);
      ptx::barrier_arrive(full, n);
      if (Bug == 3 && round == 0) ptx::barrier_arrive(full, n);
    }
  } else {
    float sum = 0;
    for (int round = 0; round < rounds; ++round) {
      if (Bug != 4) ptx::barrier_sync(full, Bug == 2 ? half : n);
      for (int j = 0; j < half; ++j) sum += buffer[(i + j) % half];
      if (Bug != 1 && round + 1 < rounds) ptx::barrier_arrive(empty, n);
    }
    out[i] = sum;
  }
}

// Spins on shared memory that nobody writes.
__global__ void spin(float* out) {
  SharedArena arena = dynamic_shared();
  const SharedSpan<int> flag = arena.take<int>(1);
  if (threadIdx.x == 0) flag.store(0, 0);
  __syncthreads();
  while (flag[0] == 0) {
  }
  out[threadIdx.x] = 1;
}

__global__ void count(const float* in, float* out) {
  const int positive = __syncthreads_count(in[threadIdx.x] > 0);
  const int any = __syncthreads_or(in[threadIdx.x] > 2), all = __syncthreads_and(in[threadIdx.x] > -100);
  out[threadIdx.x] = float(positive + 1000 * any + 2000 * all);
}

// Stores of 16 bytes into global memory, and whether the SM's clock went on meanwhile. Bugs: 1 an element too early, 2
// past the end.
template <int Bug>
__global__ void whole(const float* in, float* out, int n, uint32_t* later) {
  const uint64_t before = ptx::clock();
  const GlobalSpan<float> span(out, n);
  const int at = 4 * int(threadIdx.x);
  uint4 value;
  memcpy(static_cast<void*>(&value), in + at, sizeof value);
  span.store_16(at + (Bug == 1 && at ? -1 : Bug == 2 ? 4 : 0), value);
  __syncthreads();
  later[threadIdx.x] = ptx::clock() > before;
}

}  // namespace

FSQ_CASE whole_case(int bug, const float* in, float* out, int n, uint32_t* later) {
  void (*const kernels[])(const float*, float*, int, uint32_t*) = {whole<0>, whole<1>, whole<2>};
  return keep(run(kernels[bug], Launch("whole", "n=" + std::to_string(n), 1, unsigned(n / 4)), in, out, n, later));
}

FSQ_CASE reverse_case(int bug, const float* in, float* out, int n) {
  void (*const kernels[])(const float*, float*) = {reverse<0>, reverse<1>, reverse<2>, reverse<3>,
                                                   reverse<4>, reverse<5>, reverse<6>, reverse<7>};
  Launch launch("reverse", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 4;
  return keep(run(kernels[bug], launch, in, out));
}

FSQ_CASE rotate_case(int bug, float* data, int n, int steps) {
  Launch launch("rotate", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 4;
  return keep(run(bug ? rotate<1> : rotate<0>, launch, data, steps));
}

FSQ_CASE produce_case(int bug, const float* in, float* out, int n, int rounds) {
  void (*const kernels[])(const float*, float*, int) = {produce<0>, produce<1>, produce<2>, produce<3>, produce<4>};
  Launch launch("produce", "n=" + std::to_string(n), 1, unsigned(n));
  launch.shared = n * 2;
  return keep(run(kernels[bug], launch, in, out, rounds));
}

FSQ_CASE spin_case(float* out) {
  Launch launch("spin", "", 1, 32);
  launch.shared = 16;
  return keep(run(spin, launch, out));
}

FSQ_CASE count_case(const float* in, float* out, int n) {
  return keep(run(count, Launch("count", "n=" + std::to_string(n), 1, unsigned(n)), in, out));
}

// What the launcher must refuse: 1 too many threads, 2 too much shared memory, 3 too large a cluster, 4 a grid that is
// no multiple of the cluster, 5 a cooperative grid that does not fit.
FSQ_CASE launch_case(int bug, const float* in, float* out) {
  Launch launch("count", "", bug == 4 ? 3 : bug == 5 ? 4096 : 1, bug == 1 ? 1056 : 32);
  if (bug == 2) launch.shared = 300000;
  if (bug == 3) launch.cluster = 32;
  if (bug == 4) launch.cluster = 2;
  launch.cooperative = bug == 5;
  return keep(run(count, launch, in, out));
}

// values: capability, SMs, shared memory per block and SM, largest cluster, then blocks per SM and resident clusters of
// a launch of `threads` threads with `shared` bytes in clusters of `cluster`.
FSQ_CASE device_case(int* values, int threads, int shared, int cluster) {
  Device device = {};
  std::string error = query(device);
  const int found[] = {device.capability, device.sm_count, device.shared_per_block, device.shared_per_sm,
                       device.max_cluster};
  for (int i = 0; i < 5; ++i) values[i] = found[i];
  Launch launch("count", "", unsigned(cluster), unsigned(threads));
  launch.shared = shared;
  launch.cluster = cluster;
  if (error.empty()) error = blocks_per_sm(values[5], count, launch);
  if (error.empty()) error = active_clusters(values[6], count, launch);
  return keep(error);
}
