// launch.h's functions on the emulator.
#pragma once

#include <tuple>

#include "emulator.h"

namespace fusedseq {

namespace detail {

inline emulator::LaunchRequest request(const Launch& launch) {
  return {launch.name,
          launch.shape,
          {launch.grid.x, launch.grid.y, launch.grid.z},
          {launch.block.x, launch.block.y, launch.block.z},
          launch.shared,
          launch.cluster,
          launch.cooperative};
}

}  // namespace detail

inline std::string query(Device& device) {
  emulator::DeviceView view;
  const std::string error = emulator::query(view);
  device = {0, view.capability, view.sm_count, view.shared_per_block, view.shared_per_sm, view.max_cluster};
  return error.empty() ? error : "cannot query the emulated CUDA device: " + error;
}

template <class... P>
std::string blocks_per_sm(int& blocks, void (*)(P...), const Launch& launch) {
  int clusters = 0;
  const std::string error = emulator::occupancy(blocks, clusters, detail::request(launch));
  return error.empty() ? error : launch.error(error);
}

template <class... P>
std::string active_clusters(int& clusters, void (*)(P...), const Launch& launch) {
  if (launch.cluster < 2) return launch.error("the size of the cluster is not given");
  int blocks = 0;
  const std::string error = emulator::occupancy(blocks, clusters, detail::request(launch));
  return error.empty() ? error : launch.error(error);
}

template <class... P, class... A>
std::string run(void (*kernel)(P...), const Launch& launch, A... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call = {kernel, std::tuple<P...>(P(arguments)...)};
  const auto body = [](void* data) {
    Call& call = *static_cast<Call*>(data);
    std::apply(call.kernel, call.arguments);
  };
  const std::string error = emulator::launch(detail::request(launch), body, &call);
  return error.empty() ? error : launch.error(error);
}

}  // namespace fusedseq
