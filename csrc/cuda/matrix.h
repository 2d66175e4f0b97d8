// Operands of wgmma in shared memory: how a descriptor says where their elements lie (PTX ISA, 9.7.15.5.1.2).
//
// The unit is a chunk of 8 halves, 16 bytes. `major` names the index that is contiguous, "line" a value of the other
// one: with Major::k lines are rows of A or columns of B, and the 16 terms of a product are two chunks; with Major::mn
// lines are terms, and rows or columns come in chunks. Eight lines make a pattern:
//
//   swizzle of w bytes   line l of a pattern begins at byte l w and holds w / 16 chunks; the chunk found at an address
//   is the one
//                        with bits 4.. of the address XOR bits 7.. of it, as many as w / 16 has
//   none                 line l of a pattern begins at byte 16 l and holds one chunk
//
//   major, swizzle   leading                                      stride
//   k, w             not used                                     from 8 lines to the next 8
//   k, none          from the first chunk of terms to the second  from 8 lines to the next 8
//   mn, w            from w / 16 chunks to the next               from 8 lines (terms) to the next 8
//   mn, none         from 8 lines (terms) to the next 8           from a chunk to the next
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/tensor_map.h"

namespace fusedseq {
namespace ptx {

// Which index of an operand is contiguous in shared memory: that of the sum, or that of A's rows or B's columns.
enum class Major { k = 0, mn = 1 };

// The operand whose first chunk lies at `shared`; offsets in bytes, multiples of 16. A swizzled pattern begins at a
// multiple of 8 times the swizzle's width; `shared` may be further on in it.
__host__ __device__ inline uint64_t matrix_descriptor(uint32_t shared, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
  const auto field = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffffu) >> 4); };
  return field(shared) | field(leading) << 16 | field(stride) << 32 | uint64_t((4 - int(swizzle)) & 3) << 62;
}

// The operand that begins so many bytes (a multiple of 16) further on.
__host__ __device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace ptx
}  // namespace fusedseq
