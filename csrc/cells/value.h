// The macros and the trait that make the cell math generic over the value type.
#pragma once

#if defined(__CUDACC__)
#define FSQ_INLINE static __device__ __forceinline__
#define FSQ_UNROLL _Pragma("unroll")
#else
#define FSQ_INLINE static inline __attribute__((always_inline))
#define FSQ_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fusedseq {
namespace FSQ_ISA {

// Num<V>::c(x): the constant x as a V; Num<V>::Scalar: its element. Scalars here, vectors add theirs.
template <class V>
struct Num {
  typedef V Scalar;
  FSQ_INLINE V c(V x) { return x; }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
