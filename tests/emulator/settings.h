// What the environment says about the emulated device and its scheduler (docs/emulator.md); read at every launch.
#pragma once

#include <stdint.h>

#include <string>

namespace fusedseq {
namespace emulator {

struct Settings {
  // FUSEDSEQ_EMULATOR_DEVICE, "sms=4,shared=65536"; the defaults are an H200's but for the number of SMs.
  int capability = 90;
  int sms = 8;
  int shared = 227 * 1024;         // per block
  int shared_per_sm = 228 * 1024;  // of which every block takes 1 KB for itself
  int cluster = 16;                // largest, in CTAs
  // FUSEDSEQ_EMULATOR_SEED
  uint64_t seed = 0;
};

// The settings, or the text of what is wrong with them.
std::string read_settings(Settings& settings);

}  // namespace emulator
}  // namespace fusedseq
