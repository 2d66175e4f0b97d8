// Launches and device properties, the only door from host code to the CUDA runtime. Errors come back as text, empty
// where all is well: "lstm_block_forward (T=6 B=16 H=64): invalid argument". Nothing synchronises.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

namespace fusedseq {

struct Device {
  int index;
  int capability;  // 80, 90
  int sm_count;
  int shared_per_block;  // bytes of dynamic shared memory that a block may ask for
  int shared_per_sm;
  int max_cluster;  // CTAs of the largest cluster, non-portable sizes included; 1 before sm_90
};

struct Launch {
  const char* name;  // of the kernel, for errors
  std::string shape;
  dim3 grid, block;
  int shared = 0;   // bytes of dynamic shared memory
  int cluster = 1;  // CTAs, along x
  bool cooperative = false;
  cudaStream_t stream = nullptr;

  Launch(const char* name, std::string shape, dim3 grid, dim3 block)
      : name(name), shape(std::move(shape)), grid(grid), block(block) {}
  std::string error(const std::string& what) const { return std::string(name) + " (" + shape + "): " + what; }
};

}  // namespace fusedseq

#ifdef FSQ_EMULATE
#include "emulated_launch.h"
#else

namespace fusedseq {

// The properties of the current device, which is asked once: each attribute costs about as much as a launch.
inline std::string query(Device& device) {
  static std::mutex guard;
  static std::map<int, Device> known;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, device.index);
  };
  int major = 0, minor = 0;
  cudaError_t e = cudaGetDevice(&device.index);
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = known.find(device.index);
  if (!e && found != known.end()) {
    device = found->second;
    return "";
  }
  if (!e) e = get(major, cudaDevAttrComputeCapabilityMajor);
  if (!e) e = get(minor, cudaDevAttrComputeCapabilityMinor);
  if (!e) e = get(device.sm_count, cudaDevAttrMultiProcessorCount);
  if (!e) e = get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (!e) e = get(device.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.capability = 10 * major + minor;
  device.max_cluster = device.capability >= 90 ? 16 : 1;
  if (!e) known[device.index] = device;
  return e ? std::string("cannot query the CUDA device: ") + cudaGetErrorString(e) : std::string();
}

namespace detail {

// Sets an attribute of a kernel once for each device: what needs it would pay a microsecond at every launch.
inline cudaError_t set_once(const void* kernel, cudaFuncAttribute attribute, int (*value)(int device)) {
  static std::mutex guard;
  static std::set<std::tuple<const void*, int, int>> known;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(guard);
  if (e || known.count({kernel, device, int(attribute)})) return e;
  e = cudaFuncSetAttribute(kernel, attribute, value(device));
  if (!e) known.insert({kernel, device, int(attribute)});
  return e;
}

// Attributes that a kernel needs before its first launch with that much shared memory or so large a cluster. The limit
// is the device's own and not that of a launch, which another thread's launch of the same kernel might lower.
inline cudaError_t prepare(const void* kernel, const Launch& launch) {
  cudaError_t e = cudaSuccess;
  if (launch.shared > 48 * 1024)
    e = set_once(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, [](int device) {
      int most = 0;
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      return most;
    });
  if (!e && launch.cluster > 8)
    e = set_once(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, [](int) { return 1; });
  return e;
}

// The text of an error, empty for none. What the runtime keeps of it is cleared, or the next launch would report it.
inline std::string told(cudaError_t e, const Launch& launch) {
  if (!e) return std::string();
  cudaGetLastError();
  return launch.error(cudaGetErrorString(e));
}

inline cudaLaunchConfig_t configure(const Launch& launch, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = size_t(launch.shared);
  config.stream = launch.stream;
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(launch.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (launch.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  return config;
}

}  // namespace detail

// Blocks of the kernel that one SM holds at a time.
template <class... P>
std::string blocks_per_sm(int& blocks, void (*kernel)(P...), const Launch& launch) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t e = detail::prepare(function, launch);
  const int threads = int(launch.block.x * launch.block.y * launch.block.z);
  if (!e) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, size_t(launch.shared));
  return detail::told(e, launch);
}

// Clusters of the launch's size that the device holds at a time; 0 where it holds none.
template <class... P>
std::string active_clusters(int& clusters, void (*kernel)(P...), const Launch& launch) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t e = detail::prepare(function, launch);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configure(launch, attributes);
  if (!e) e = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  return detail::told(e, launch);
}

template <class... P, class... A>
std::string run(void (*kernel)(P...), const Launch& launch, A... arguments) {
  cudaError_t e = detail::prepare(reinterpret_cast<const void*>(kernel), launch);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = detail::configure(launch, attributes);
  if (!e) e = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  return detail::told(e, launch);
}

}  // namespace fusedseq
#endif  // FSQ_EMULATE
