// What the emulator's test kernels share: a case is an extern "C" function that launches one kernel, right (variant 0)
// or with one bug, and returns the launch's error text, empty if there was none.
#pragma once

#include <string>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/span.cuh"

#define FSQ_CASE extern "C" __attribute__((visibility("default"))) const char*

// Valid until the next case.
inline const char* keep(const std::string& error) {
  static std::string kept;
  kept = error;
  return kept.c_str();
}
