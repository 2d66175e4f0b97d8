// How the warps of a cluster hand values to each other without a barrier of their blocks: pieces of 16 bytes, each by
// an asynchronous store into the shared memory of the rank that needs it, whose mbarrier counts the bytes.
//
// A channel has two buffers. The n-th publication fills buffer (n + 1) % 2 of every rank, and every rank has a part in
// it. Whoever has seen all of publication n knows by it that publication n - 1 has been read everywhere: what is sent
// was computed after that, by a warp from all that it had read itself, or behind a barrier of its block where some
// warps of a rank send a peer nothing. So the buffer may be written again, and no other word is needed. Nor is an
// acquire of the cluster's scope: of shared memory there is one copy, and what it would invalidate is the L1.
//
// Of two ranks or more: a cluster of one CTA has no asynchronous stores. sm_90
#pragma once
#include "cuda/exchange.cuh"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kPiece = 16;  // bytes

// T: as what the receiver reads the pieces.
template <class T>
struct WarpChannel {
  static constexpr int kIn = kPiece / int(sizeof(T));
  SharedSpan<T> data;         // [2][size * kIn]
  SharedSpan<uint64_t> full;  // [2]
  int size, sent;             // pieces of a buffer; those of them that a publication brings

  template <class Arena>
  FSQ_BOTH static WarpChannel carve(Arena& arena, int size, int sent) {
    WarpChannel c;
    c.data = arena.template take<T>(2 * size * kIn);
    c.full = arena.template take<uint64_t>(2);
    c.size = size;
    c.sent = sent;
    return c;
  }
  // Where publication n lies, as an element of data; for n = -1 that is what a scan begins with.
  FSQ_DEVICE int at(int n) const { return (n + 1) % 2 * size * kIn; }
  FSQ_DEVICE void expect(int n) const {
    ptx::mbarrier_arrive_expect_tx(full.address((n + 1) % 2), uint32_t(sent * kPiece));
  }
  // Between what every thread does to prepare the block's memory and the first of so many publications.
  FSQ_DEVICE void begin(int publications) const {
    if (threadIdx.x == 0) {
      for (int which : {0, 1}) ptx::mbarrier_init(full.address(which), 1);
      for (int n : {0, 1})
        if (n < publications) expect(n);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  // The place of a piece in a rank's buffer, for `send`.
  struct Place {
    uint32_t data, full;
  };
  FSQ_DEVICE Place place(int piece, int rank) const {
    return {ptx::mapa(data.address(piece * kIn), uint32_t(rank)), ptx::mapa(full.address(0), uint32_t(rank))};
  }
  // By every lane, or where `when` holds. The warp's lanes have read all that they will of publication n - 1, and
  // __syncwarp stands in between.
  template <class V>
  FSQ_DEVICE void send(int n, const Place& to, V value) const {
    const uint32_t which = uint32_t(n + 1) % 2;
    ptx::st_async(to.data + which * uint32_t(size * kPiece), value, to.full + which * uint32_t(sizeof(uint64_t)));
  }
  template <class V>
  FSQ_DEVICE void send_if(bool when, int n, const Place& to, V value) const {
    const uint32_t which = uint32_t(n + 1) % 2;
    ptx::st_async_if(when, to.data + which * uint32_t(size * kPiece), value,
                     to.full + which * uint32_t(sizeof(uint64_t)));
  }
  // False, to all lanes of a warp, if the others did not answer.
  FSQ_DEVICE bool wait(int n) const { return arrived(full.address((n + 1) % 2), uint32_t(n / 2 % 2)); }
  // After the wait for publication n and before this warp's part in the next, by one thread of the block.
  FSQ_DEVICE void rearm(int n, int publications) const {
    if (n + 2 < publications) expect(n + 2);
  }
  // What was sent to this CTA it has waited for, and what it sent was in registers: but a CTA must not leave while a
  // peer has not begun to wait for the others.
  FSQ_DEVICE void end() const {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
