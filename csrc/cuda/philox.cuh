// Dropout's random bits on a GPU: Philox 4x32-10 (Salmon et al. 2011), the bits of csrc/cpu/philox.h and
// kernels/philox.py.
//
// Key j of query (b, h, i) has word (j / 16) % 4 of the counter (16 (j / 64) + j % 16, i, h, b) and is dropped if that
// word is below the threshold.
#pragma once
#include "cells/value.h"
#include "cuda/span.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kRandomKeys = 64;  // keys that sixteen counters serve

struct RandomWords {
  uint32_t w[4];
};

FSQ_DEVICE RandomWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  constexpr uint32_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57, kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  FSQ_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t x = __umulhi(c0, kM0), y = __umulhi(c2, kM1), low = c0 * kM0;
    c0 = y ^ c1 ^ k0;
    c1 = c2 * kM1;
    c2 = x ^ c3 ^ k1;
    c3 = low;
    k0 += kW0;
    k1 += kW1;
  }
  return {{c0, c1, c2, c3}};
}

// What dropout needs to know of a call. `seed` is read from device memory, so that nobody waits for it on the host.
struct Random {
  uint64_t seed;
  uint32_t threshold;

  // Whether one key is kept; b, h, i, j count from the beginning of the tensors.
  FSQ_DEVICE bool keeps(uint32_t b, uint32_t h, uint32_t i, uint32_t j) const {
    const RandomWords r = philox(seed, j / 64 * 16 + j % 16, i, h, b);
    const uint32_t which = j / 16 % 4;
    const uint32_t word = which == 0 ? r.w[0] : which == 1 ? r.w[1] : which == 2 ? r.w[2] : r.w[3];
    return word >= threshold;
  }

  // The keys of one row of an mma accumulator that this thread owns among keys 64 block .. 64 block + 63: bit 2 c + e
  // is that of key 8 c + 2 (lane % 4) + e. Four counters give all sixteen.
  FSQ_DEVICE uint32_t fragment(uint32_t b, uint32_t h, uint32_t i, uint32_t block) const {
    const uint32_t first = block * 16 + ptx::lane() % 4 * 2;
    uint32_t bits = 0;
    FSQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      const RandomWords r = philox(seed, first + n / 2 * 8 + n % 2, i, h, b);
      FSQ_UNROLL
      for (int w = 0; w < 4; ++w) bits |= uint32_t(r.w[w] >= threshold) << (4 * w + n);
    }
    return bits;
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
