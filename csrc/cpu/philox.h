// Dropout: Philox 4x32-10 (Salmon et al. 2011), one evaluation of sixteen counters for each block of 64 keys (or
// columns).
#pragma once
#include "cpu/vec.h"

namespace fusedseq {
namespace FSQ_ISA {

#if defined(__AVX512F__)
struct Product {
  __m512i high, low;
};
// Both halves of 16 products of 32 bits.
FSQ_INLINE Product wide_product(__m512i a, __m512i b) {
  const __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  return {_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB),
          _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA)};
}
FSQ_INLINE __m512i exclusive_or(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
#endif

// Bit j tells whether key 64 * block + j of query (b, h, i) is kept.
static uint64_t kept_keys(uint64_t seed, uint32_t threshold, int64_t b, int64_t h, int64_t i, int64_t block) {
  constexpr uint32_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57, kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;
  constexpr int kCounters = 16;
#if defined(__AVX512F__)
  const __m512i m0 = _mm512_set1_epi64(kM0), m1 = _mm512_set1_epi64(kM1);
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(int(block * kCounters)),
                                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i c1 = _mm512_set1_epi32(int(i)), c2 = _mm512_set1_epi32(int(h)), c3 = _mm512_set1_epi32(int(b));
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += kW0, k1 += kW1) {
    const Product x = wide_product(c0, m0), y = wide_product(c2, m1);
    c0 = exclusive_or(y.high, c1, _mm512_set1_epi32(int(k0)));
    c1 = y.low;
    c2 = exclusive_or(x.high, c3, _mm512_set1_epi32(int(k1)));
    c3 = x.low;
  }
  const __m512i limit = _mm512_set1_epi32(int(threshold));
  return uint64_t(_mm512_cmpge_epu32_mask(c0, limit)) | uint64_t(_mm512_cmpge_epu32_mask(c1, limit)) << 16 |
         uint64_t(_mm512_cmpge_epu32_mask(c2, limit)) << 32 | uint64_t(_mm512_cmpge_epu32_mask(c3, limit)) << 48;
#else
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
#endif
}

// v where the bit of its lane is set, else 0.
template <class S>
FSQ_INLINE Vec<S> kept(Vec<S> v, uint64_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return (Vec<S>)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)v);
  else
    return (Vec<S>)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)v);
#else
  typedef typename VecOf<S>::bits B;
  B lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = typename VecOf<S>::bit(1) << i;
  return ((B{} + typename VecOf<S>::bit(bits)) & lane) != 0 ? v : Vec<S>{};
#endif
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
