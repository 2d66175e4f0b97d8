// What products multiply: values of the compute type, or pairs of bfloat16.
//
// A product runs along K in words of the size of the compute type. A word holds one value; or two bfloat16 next to each
// other along K, which one instruction multiplies and adds in float32 (VDPBF16PS): twice the work per instruction, half
// the bytes. The left operand is an array of values, the right one is packed in words; an odd K ends in half a word of
// 0.
#pragma once
#include "cpu/convert.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
struct Whole {
  typedef S Sum;
  typedef S Value;
  static constexpr int per_word = 1;
};
#if defined(__AVX512BF16__)
#define FSQ_BF16_PAIRS 1
struct Bf16Pairs {
  typedef float Sum;
  typedef uint16_t Value;
  static constexpr int per_word = 2;
};
#endif

// Words that n values along K take.
template <class P>
FSQ_INLINE int64_t words(int64_t n) {
  return (n + P::per_word - 1) / P::per_word;
}

// One word of the left operand in every lane.
template <class P>
FSQ_INLINE Vec<typename P::Sum> splat_word(const typename P::Value* a) {
  typename P::Sum word;
  memcpy(&word, a, sizeof word);
  return splat(word);
}
template <class P>
FSQ_INLINE Vec<typename P::Sum> multiply_add(Vec<typename P::Sum> a, Vec<typename P::Sum> b, Vec<typename P::Sum> sum) {
  if constexpr (P::per_word == 1) return fma(a, b, sum);
#if FSQ_BF16_PAIRS
  else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
}

// A vector of values as a left operand stores them.
template <class P>
FSQ_INLINE void store_values(typename P::Value* p, Vec<typename P::Sum> v, int64_t n) {
  if constexpr (P::per_word == 1)
    store_n(p, v, n);
  else
    store_as<float>(p, DType::bf16, 0, v, n);
}
template <class P>
FSQ_INLINE Vec<typename P::Sum> load_values(const typename P::Value* p, int64_t n) {
  if constexpr (P::per_word == 1)
    return load_n(p, n);
  else
    return load_as<float>(p, DType::bf16, 0, n);
}

// A row of a user's tensor as left operand. What fills the last word is 0.
template <class P>
static void load_operand(typename P::Value* dst, const void* src, DType d, int64_t i, int64_t n) {
  constexpr int L = kLanes<typename P::Sum>;
  for (int64_t k = 0; k < n; k += L) store_values<P>(dst + k, load_as<typename P::Sum>(src, d, i + k, n - k), n - k);
  if (n % P::per_word) dst[n] = 0;
}

// The first n words from p on, of which `valid` values exist: a row of a weight, cut along K.
template <class P>
FSQ_INLINE Vec<typename P::Sum> load_words(const void* p, DType d, int64_t i, int64_t n, int64_t valid) {
  if constexpr (P::per_word == 1) return load_as<typename P::Sum>(p, d, i, n);
#if FSQ_BF16_PAIRS
  else
    return (VecF)_mm512_maskz_loadu_epi16(valid >= 32 ? ~__mmask32(0) : (__mmask32(1) << valid) - 1,
                                          static_cast<const uint16_t*>(p) + i);
#endif
}

// Words of which row k of a right operand gives one half, for the other see below; k counts values along K. The second
// row of a word must follow the first.
template <class P>
FSQ_INLINE void put_row(typename P::Sum* word, int64_t k, Vec<typename P::Sum> v) {
  if constexpr (P::per_word == 1) store(word, v);
#if FSQ_BF16_PAIRS
  else {
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
    const __m512i both = k % 2 ? _mm512_or_si512(_mm512_slli_epi32(half, 16), (__m512i)load(word)) : half;
    store(word, (VecF)both);
  }
#endif
}

// Words of two vectors, the second in the upper halves.
#if FSQ_BF16_PAIRS
FSQ_INLINE VecF paired(VecF first, VecF second) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VecF)_mm512_permutexvar_epi16(order, halves);
}
// n words of two rows of a user's bfloat16, which begin at `first` and `second`; a negative one is all 0.
static inline void load_paired(uint16_t* dst, const void* src, int64_t first, int64_t second, int64_t n) {
  const uint16_t* const from = static_cast<const uint16_t*>(src);
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 lanes = n - k < 16 ? __mmask16((1u << (n - k)) - 1) : __mmask16(-1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + first + k));
    __m512i high = _mm512_setzero_si512();
    if (second >= 0) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + second + k));
    _mm512_mask_storeu_epi32(dst + 2 * k, lanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

}  // namespace FSQ_ISA
}  // namespace fusedseq
