// Checked views of memory that threads share. On a device each is a bare pointer; under the emulator every access is
// tested for bounds and alignment, and for a race with the other threads (docs/emulator.md).
//
// Shared memory is dynamic only, carved by an arena that host and device walk alike:
//
//   template <class Arena> FSQ_BOTH static Layout carve(Arena& arena, int H) { return {arena.template take<float>(H)};
//   } device: SharedArena arena = dynamic_shared();       host: SharedArena arena; carve(arena, H); arena.bytes()
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/ptx.cuh"

#define FSQ_DEVICE __device__ __forceinline__
#define FSQ_BOTH __host__ __device__ __forceinline__

namespace fusedseq {

// `size` elements of T in this CTA's shared memory, from `data`.
template <class T>
class SharedSpan {
 public:
  FSQ_BOTH SharedSpan() : SharedSpan(nullptr, 0) {}

#ifdef FSQ_EMULATE
  SharedSpan(void* data, int size) : data_(static_cast<T*>(data)), size_(size) {}

  T operator[](int i) const { return load<T>(i); }
  template <class V>
  V load(int i) const {
    V value;
    memcpy(static_cast<void*>(&value), emulator::shared_read(data_, size_, i, sizeof(T), sizeof(V)), sizeof(V));
    return value;
  }
  void store(int i, T value) const { store<T>(i, value); }
  template <class V>
  void store(int i, V value) const {
    memcpy(emulator::shared_write(data_, size_, i, sizeof(T), sizeof(V)), static_cast<const void*>(&value), sizeof(V));
  }
  T* pointer(int i) const { return static_cast<T*>(emulator::shared_atomic(data_, size_, i, sizeof(T))); }
  uint32_t address(int i) const { return emulator::shared_window_address(data_, size_, i, sizeof(T)); }
#else
  FSQ_BOTH SharedSpan(void* data, int) : data_(static_cast<T*>(data)) {}

  FSQ_DEVICE T operator[](int i) const { return data_[i]; }
  // sizeof(V) bytes (a float4, say) from element i on, aligned to their size.
  template <class V>
  FSQ_DEVICE V load(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  FSQ_DEVICE void store(int i, T value) const { data_[i] = value; }
  template <class V>
  FSQ_DEVICE void store(int i, V value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  // For atomics only.
  FSQ_DEVICE T* pointer(int i) const { return data_ + i; }
  // For the functions of ptx.cuh.
  FSQ_DEVICE uint32_t address(int i) const { return ptx::shared_address(data_ + i); }
#endif

  // Elements first .. first + size.
  FSQ_DEVICE SharedSpan sub(int first, int size) const {
#ifdef FSQ_EMULATE
    emulator::check_sub(size_, first, size);
#endif
    return SharedSpan(data_ + first, size);
  }

 private:
  T* data_;
#ifdef FSQ_EMULATE
  int size_;
#endif
};

// Hands out shared memory from the front.
class SharedArena {
 public:
  // Without a base: for counting bytes on the host.
  FSQ_BOTH explicit SharedArena(char* base = nullptr) : base_(base), used_(0) {}

  template <class T>
  FSQ_BOTH SharedSpan<T> take(int size, int align = 16) {
    used_ = (used_ + align - 1) / align * align;
#ifdef __CUDA_ARCH__
    char* data = base_ + used_;  // no question asked, or nvcc would no longer know that it is shared memory
#else
    char* data = base_ ? base_ + used_ : nullptr;
#endif
    used_ += size * int(sizeof(T));
    return SharedSpan<T>(data, size);
  }
  FSQ_BOTH int bytes() const { return used_; }

 private:
  char* base_;
  int used_;
};

// The dynamic shared memory of this CTA, 1024-byte aligned as TMA's swizzles ask.
FSQ_DEVICE SharedArena dynamic_shared() {
#ifdef FSQ_EMULATE
  return SharedArena(emulator::shared_base());
#else
  extern __shared__ __align__(1024) char fsq_shared[];
  return SharedArena(fsq_shared);
#endif
}

// `size` elements of T in global memory through which CTAs of one launch exchange data. What only one CTA writes and
// none other reads needs no span, but for its bounds and alignment to be checked.
template <class T>
class GlobalSpan {
 public:
#ifdef FSQ_EMULATE
  GlobalSpan(T* data, int64_t size) : data_(data), size_(size) {}

  template <class V = T>
  V load(int64_t i) const {
    V value;
    memcpy(static_cast<void*>(&value), emulator::global_read(data_, size_, i, sizeof(T), sizeof(V)), sizeof(V));
    return value;
  }
  template <class V>
  void store(int64_t i, V value) const {
    memcpy(emulator::global_write(data_, size_, i, sizeof(T), sizeof(V)), static_cast<const void*>(&value), sizeof(V));
  }
  void store_16(int64_t i, uint4 value) const {
    ptx::st_global_16(emulator::global_write(data_, size_, i, sizeof(T), sizeof value), value);
  }
  const T* source(int64_t i, int count) const {
    return static_cast<const T*>(emulator::global_read(data_, size_, i, sizeof(T), sizeof(T) * count));
  }
#else
  FSQ_DEVICE GlobalSpan(T* data, int64_t) : data_(data) {}

  template <class V = T>
  FSQ_DEVICE V load(int64_t i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <class V>
  FSQ_DEVICE void store(int64_t i, V value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  // 16 bytes in one access for sure.
  FSQ_DEVICE void store_16(int64_t i, uint4 value) const { ptx::st_global_16(data_ + i, value); }
  // Where an asynchronous copy finds `count` elements.
  FSQ_DEVICE const T* source(int64_t i, int) const { return data_ + i; }
#endif

 private:
  T* data_;
#ifdef FSQ_EMULATE
  int64_t size_;
#endif
};

}  // namespace fusedseq
