// tensor_map.h's encoder on the emulator.
#pragma once

#include "emulator.h"

namespace fusedseq {

inline std::string encode(TensorMap& map, const BoxedTensor& tensor) {
  const std::string error = check(tensor);
  if (!error.empty()) return error;
  emulator::TensorBox box = {};
  box.data = reinterpret_cast<uint64_t>(tensor.data);
  box.rank = uint8_t(tensor.rank);
  box.swizzle_bytes = uint8_t(swizzle_bytes(tensor.swizzle));
  for (int i = 0; i < tensor.rank; ++i) {
    box.last[i] = uint32_t(tensor.size[i] - 1);
    box.stride[i] = i ? tensor.stride[i] : 2;
    box.box[i] = uint16_t(tensor.box[i]);
  }
  emulator::record(map.opaque, box);
  return "";
}

}  // namespace fusedseq
