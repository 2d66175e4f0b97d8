// Operands of the attention kernels' products: tiles of shared memory that asynchronous copies fill, and fragments of
// mma.sync m16n8k16 from them.
//
// A tile is [rows][width + 8] halves: the 16 bytes more put eight rows that ldmatrix reads at a time into different
// banks. What lies past a tensor's width, and rows that are not there, are zeros, which no product notices.
#pragma once
#include "cuda/value.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kChunk = 8;  // halves of an asynchronous copy

// Two halves, packed as fragments have them.
template <class E>
FSQ_DEVICE uint32_t pack(float low, float high);
template <>
FSQ_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
template <>
FSQ_DEVICE uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// E: __nv_bfloat16 or __half. W: columns, a multiple of 16.
template <class E, int W>
struct Operand {
  static constexpr int kPitch = W + kChunk;
  SharedSpan<E> data;
  int rows;

  template <class Arena>
  FSQ_BOTH static Operand carve(Arena& arena, int rows) {
    Operand t;
    t.rows = rows;
    t.data = arena.template take<E>(rows * kPitch);
    return t;
  }

  // Rows first .. first + count.
  FSQ_DEVICE Operand part(int first, int count) const {
    Operand t;
    t.rows = count;
    t.data = data.sub(first * kPitch, count * kPitch);
    return t;
  }

  // Fills all rows, by `threads` threads of which this is number `thread`; row r comes from base + at(r), which is
  // below 0 where there is none. With `aligned` rows begin at multiples of 16 bytes and the copies are asynchronous:
  // the caller commits and waits. Reads nothing past a row's `width`.
  template <class At>
  FSQ_DEVICE void load(const E* base, int width, bool aligned, int thread, int threads, At at) const {
    constexpr int kChunks = W / kChunk;
    const auto valid_at = [&](int64_t from, int c) {
      return from < 0 || width < c ? 0 : width - c < kChunk ? width - c : kChunk;
    };
    if (aligned) {
      FSQ_UNROLL_BY(1)  // addresses of several chunks at a time would take the registers of sums
      for (int n = thread; n < rows * kChunks; n += threads) {
        const int r = n / kChunks, c = n % kChunks * kChunk;
        const int64_t from = at(r);
        const int valid = valid_at(from, c);
        ptx::cp_async<16>(data.address(r * kPitch + c), valid ? base + from + c : base, valid * int(sizeof(E)));
      }
      return;
    }
    FSQ_UNROLL_BY(1)
    for (int n = thread; n < rows * kChunks; n += threads) {
      const int r = n / kChunks, c = n % kChunks * kChunk;
      const int64_t from = at(r);
      const int valid = valid_at(from, c);
      uint32_t words[kChunk / 2] = {};
      FSQ_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        uint16_t bits = 0;
        if (i < valid) memcpy(&bits, base + from + c + i, sizeof bits);
        words[i / 2] |= uint32_t(bits) << (i % 2 * 16);
      }
      data.template store<uint4>(r * kPitch + c, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }

  // The same where the rows that a thread copies, every (THREADS / (W / 8))-th, lie `step` elements apart: at(r) is
  // asked once, for its first. Rows from `count` on are not there. Of rows that begin at 16 bytes only; a tile that is
  // full costs a copy and an addition for 16 bytes.
  template <int THREADS, class At>
  FSQ_DEVICE void load_even(const E* base, int width, int64_t step, int count, int thread, At at) const {
    constexpr int kChunks = W / kChunk, kStep = THREADS / kChunks;
    static_assert(THREADS % kChunks == 0, "a thread copies one chunk of its rows");
    const int r = thread / kChunks, c = thread % kChunks * kChunk;
    const E* from = base + c;
    if (r < count) from += at(r);
    if (width >= W && count >= rows) {
      FSQ_UNROLL_BY(8)
      for (int n = 0; n < rows / kStep; ++n, from += step)
        ptx::cp_async<16>(data.address((r + n * kStep) * kPitch + c), from);
      return;
    }
    const int valid = width < c ? 0 : width - c < kChunk ? width - c : kChunk;
    FSQ_UNROLL_BY(1)
    for (int n = 0; n < rows / kStep; ++n, from += step) {
      const int there = r + n * kStep < count ? valid : 0;
      ptx::cp_async<16>(data.address((r + n * kStep) * kPitch + c), there ? from : base, there * int(sizeof(E)));
    }
  }

  // A[16, 16] of rows r.. and columns c... Every lane of the warp takes part in all of these.
  FSQ_DEVICE void left(uint32_t (&a)[4], int r, int c) const {
    const int lane = int(ptx::lane());
    ptx::ldmatrix<4>(a, data.address((r + lane % 16) * kPitch + c + lane / 16 * 8));
  }
  // A[16, 16] with A[m][k] = tile[r + k][c + m].
  FSQ_DEVICE void left_transposed(uint32_t (&a)[4], int r, int c) const {
    const int lane = int(ptx::lane());
    ptx::ldmatrix<4, true>(a, data.address((r + lane % 8 + lane / 16 * 8) * kPitch + c + lane / 8 % 2 * 8));
  }
  // Two B[16, 8] with B[k][n] = tile[r + n][c + k], of rows r and r + 8: b[0], b[1] and b[2], b[3].
  FSQ_DEVICE void right(uint32_t (&b)[4], int r, int c) const {
    const int lane = int(ptx::lane());
    ptx::ldmatrix<4>(b, data.address((r + lane % 8 + lane / 16 * 8) * kPitch + c + lane / 8 % 2 * 8));
  }
  // Two B[16, 8] with B[k][n] = tile[r + k][c + n], of columns c and c + 8.
  FSQ_DEVICE void right_transposed(uint32_t (&b)[4], int r, int c) const {
    const int lane = int(ptx::lane());
    ptx::ldmatrix<4, true>(b, data.address((r + lane % 16) * kPitch + c + lane / 16 * 8));
  }
};

// d += a b for both halves of what right() and right_transposed() load.
template <class E>
FSQ_DEVICE void multiply_add(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_m16n8k16<E>(d0, a, first);
  ptx::mma_m16n8k16<E>(d1, a, second);
}

// The A[16, 16] of 16 MT rows of a tile, all W columns, held in registers.
template <int MT, int W>
struct LeftRows {
  uint32_t a[MT][W / 16][4];

  template <class E>
  FSQ_DEVICE void load(const Operand<E, W>& from, int row) {
    FSQ_UNROLL
    for (int m = 0; m < MT; ++m) FSQ_UNROLL
    for (int k = 0; k < W / 16; ++k) from.left(a[m][k], row + 16 * m, 16 * k);
  }
};

// sums[m][n] += A B^T over W columns for MT tiles of 16 rows and NT tiles of 8 rows of `b` from 0 on; left(m, k, a)
// loads the A[16, 16] of tile m and columns 16 k.
template <int MT, int NT, class E, int W, class Left>
FSQ_DEVICE void multiply_with(float (&sums)[MT][NT][4], const Operand<E, W>& b, Left left) {
  FSQ_UNROLL
  for (int k = 0; k < W / 16; ++k) {
    uint32_t a[MT][4];
    FSQ_UNROLL
    for (int m = 0; m < MT; ++m) left(a[m], m, k);
    FSQ_UNROLL
    for (int n = 0; n < NT; n += 2) {
      uint32_t right[4];
      b.right(right, 8 * n, 16 * k);
      FSQ_UNROLL
      for (int m = 0; m < MT; ++m) multiply_add<E>(sums[m][n], sums[m][n + 1], a[m], right);
    }
  }
}

// The same for the rows of `a` from `row` on.
template <int MT, int NT, class E, int W>
FSQ_DEVICE void multiply_rows(float (&sums)[MT][NT][4], const Operand<E, W>& a, int row, const Operand<E, W>& b) {
  multiply_with(sums, b, [&](uint32_t (&left)[4], int m, int k) { a.left(left, row + 16 * m, 16 * k); });
}
template <int MT, int NT, class E, int W>
FSQ_DEVICE void multiply_rows(float (&sums)[MT][NT][4], const LeftRows<MT, W>& a, const Operand<E, W>& b) {
  multiply_with(sums, b, [&](uint32_t (&left)[4], int m, int k) {
    FSQ_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = a.a[m][k][i];
  });
}

// Of two neighbouring accumulators, columns 8 n .. 8 n + 15, the A[16, 16] of a product over them.
template <class E>
FSQ_DEVICE void as_left(uint32_t (&a)[4], const float (&s0)[4], const float (&s1)[4]) {
  a[0] = pack<E>(s0[0], s0[1]);
  a[1] = pack<E>(s0[2], s0[3]);
  a[2] = pack<E>(s1[0], s1[1]);
  a[3] = pack<E>(s1[2], s1[3]);
}

// sums[m][n] += P V for the packed A[16, 16] of P, KT side by side, and the 16 KT rows of v, W columns.
template <int MT, int KT, class E, int W>
FSQ_DEVICE void multiply_columns(float (&sums)[MT][W / 8][4], const uint32_t (&p)[MT][KT][4], const Operand<E, W>& v) {
  FSQ_UNROLL
  for (int k = 0; k < KT; ++k) FSQ_UNROLL
  for (int n = 0; n < W / 8; n += 2) {
    uint32_t right[4];
    v.right_transposed(right, 16 * k, 8 * n);
    FSQ_UNROLL
    for (int m = 0; m < MT; ++m) multiply_add<E>(sums[m][n], sums[m][n + 1], p[m][k], right);
  }
}

// The same for P in NT accumulators of 8 columns each, rounded to E.
template <int MT, int NT, class E, int W>
FSQ_DEVICE void multiply_columns(float (&sums)[MT][W / 8][4], const float (&p)[MT][NT][4], const Operand<E, W>& v) {
  uint32_t packed[MT][NT / 2][4];
  FSQ_UNROLL
  for (int m = 0; m < MT; ++m) FSQ_UNROLL
  for (int n = 0; n < NT; n += 2) as_left<E>(packed[m][n / 2], p[m][n], p[m][n + 1]);
  multiply_columns(sums, packed, v);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
