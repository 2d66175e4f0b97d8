// Launches: what the device can take, and the run of one that it takes.
#include <algorithm>
#include <mutex>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

int resident_clusters(const LaunchRequest& request, const Settings& settings, int& blocks_per_sm) {
  const int threads = int(request.block.x * request.block.y * request.block.z);
  blocks_per_sm = std::min({settings.shared_per_sm / (request.shared + 1024), 2048 / threads, 32});
  // A cluster lives within a GPC; whether the SMs of one suffice, the emulated device does not say.
  return blocks_per_sm * settings.sms / request.cluster;
}

std::string check(const LaunchRequest& request, const Settings& settings) {
  const Index3& grid = request.grid;
  const Index3& block = request.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kThreadsPerBlock) return format("%llu threads in a block", (unsigned long long)threads);
  if (grid.y > 65535 || grid.z > 65535 || blocks < 1) return "a grid of " + describe(grid);
  if (blocks > (1u << 20))
    return format("the emulator takes grids up to 2^20 blocks, not %llu", (unsigned long long)blocks);
  if (request.shared < 0 || request.shared > settings.shared)
    return format("%d bytes of shared memory where a block has %d", request.shared, settings.shared);
  const int largest = settings.capability >= 90 ? settings.cluster : 1;
  if (request.cluster < 1 || request.cluster > largest)
    return format("a cluster of %d blocks where %d is the limit", request.cluster, largest);
  if (grid.x % unsigned(request.cluster))
    return format("a grid %u blocks wide is no multiple of the cluster's %d", grid.x, request.cluster);
  int per_sm = 0;
  const int resident = resident_clusters(request, settings, per_sm);
  if (resident < 1) return "no such cluster fits on the device";
  if (request.cooperative && blocks > uint64_t(resident) * uint64_t(request.cluster))
    return format("a cooperative launch of %llu blocks where %d fit on the device at once", (unsigned long long)blocks,
                  resident * request.cluster);
  return "";
}

std::mutex one_launch;

}  // namespace

std::string query(DeviceView& device) {
  Settings settings;
  const std::string error = read_settings(settings);
  device = {settings.capability, settings.sms, settings.shared, settings.shared_per_sm,
            settings.capability >= 90 ? settings.cluster : 1};
  return error;
}

std::string occupancy(int& blocks_per_sm, int& clusters, const LaunchRequest& request) {
  Settings settings;
  std::string error = read_settings(settings);
  if (!error.empty()) return error;
  blocks_per_sm = clusters = 0;
  LaunchRequest one = request;
  one.cooperative = false;
  if (request.shared > settings.shared || request.cluster > settings.cluster) return check(one, settings);
  clusters = resident_clusters(request, settings, blocks_per_sm);
  return "";
}

std::string launch(const LaunchRequest& request, void (*body)(void*), void* arguments) {
  std::lock_guard<std::mutex> guard(one_launch);
  Settings settings;
  std::string error = read_settings(settings);
  if (error.empty()) error = check(request, settings);
  if (!error.empty()) return error;
  machine.settings = settings;
  machine.random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  machine.grid = request.grid;
  machine.block_size = request.block;
  machine.threads_per_block = int(request.block.x * request.block.y * request.block.z);
  machine.shared_bytes = request.shared;
  machine.cluster_size = request.cluster;
  machine.body = body;
  machine.arguments = arguments;
  int per_sm = 0;
  size_t capacity = size_t(resident_clusters(request, settings, per_sm));
  // Independent blocks: a few at a time show what their interleaving can do.
  const int cluster_threads = machine.threads_per_block * machine.cluster_size;
  if (!request.cooperative) capacity = std::min(capacity, size_t(std::max(2, 1024 / cluster_threads)));
  run_grid(capacity);
  error = machine.error;
  if (!error.empty()) error += format("\n  (FUSEDSEQ_EMULATOR_SEED=%llu)", (unsigned long long)settings.seed);
  reset();
  return error;
}

}  // namespace emulator
}  // namespace fusedseq
