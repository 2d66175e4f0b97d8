// Dropout: Philox 4x32-10 (Salmon et al. 2011), one evaluation of sixteen counters for each block of 64 keys.
#pragma once
#include "cpu/vec.h"

namespace fusedseq {
namespace FSQ_ISA {

// Bit j tells whether key 64 * block + j of query (b, h, i) is kept.
static uint64_t kept_keys(uint64_t seed, uint32_t threshold, int64_t b, int64_t h, int64_t i, int64_t block) {
  constexpr uint32_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57, kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;
  constexpr int kCounters = 16;
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int n = 0; n < kCounters; ++n) {
    c0[n] = uint32_t(block * kCounters + n);
    c1[n] = uint32_t(i);
    c2[n] = uint32_t(h);
    c3[n] = uint32_t(b);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kW0, k1 += kW1)
    for (int n = 0; n < kCounters; ++n) {
      const uint64_t x = uint64_t(c0[n]) * kM0, y = uint64_t(c2[n]) * kM1;
      c0[n] = uint32_t(y >> 32) ^ c1[n] ^ k0;
      c1[n] = uint32_t(y);
      c2[n] = uint32_t(x >> 32) ^ c3[n] ^ k1;
      c3[n] = uint32_t(x);
    }
  const uint32_t* const words[4] = {c0, c1, c2, c3};
  uint64_t kept = 0;
  for (int w = 0; w < 4; ++w) {
    uint64_t bits = 0;
    for (int n = 0; n < kCounters; ++n) bits |= uint64_t(words[w][n] >= threshold) << n;
    kept |= bits << (w * kCounters);
  }
  return kept;
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
