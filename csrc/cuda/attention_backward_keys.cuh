// What the kernels of dk and dv share: which rows a tile of keys meets, and how tiles of those rows arrive.
#pragma once
#include "cuda/attention_backward.h"
#include "cuda/attention_gradients.cuh"

namespace fusedseq {
namespace FSQ_ISA {

// Of a launch over tiles of keys.
struct KeysLayout {
  int64_t tiles, section;
  bool q, k, v, dout;  // 16-byte rows
  bool even;           // the rows that a thread copies belong to one head
};

// The rows that keys j0 .. j0 + size - 1 of a sequence meet.
FSQ_DEVICE Range rows_to_meet(const CudaAttentionParams& c, const Sequence& s, int j0, int size, int stream,
                              bool& global) {
  const AttentionParams& p = c.a;
  global = false;
  if (j0 >= s.S) return {0, 0, 0, 0};
  Range rows = row_range(p, s, j0, least(j0 + size, s.S) - 1, stream);
  if (j0 + size > s.S) rows.inner_last = 0;
  if (c.ranks) {
    const int32_t* const ranks = c.ranks + s.b * c.ranks_sb + s.k0;
    global = ranks[least(j0 + size, s.S)] > ranks[j0];
  }
  if (global) {
    const int first = p.causal ? most(j0 - s.diagonal, 0) * heads_of_group(p) / stream * stream : 0;
    rows.first = rows.last ? least(rows.first, first) : first;
    rows.last = s.L * heads_of_group(p);
  }
  return rows;
}

// Fills a tile with the rows from row0 on of a pair, of q or dout, by THREADS threads. With `even` the rows that a
// thread copies belong to one head.
template <int THREADS, class E, int W>
FSQ_DEVICE void load_queries(const Operand<E, W>& to, const AttentionParams& p, const Sequence& s, int hkv, int row0,
                             const Heads& t, int64_t width, bool aligned, bool even, int thread) {
  constexpr int kStep = THREADS / (W / kChunk);
  const E* const base = static_cast<const E*>(t.data) + s.b * t.sb;
  const int G = heads_of_group(p);
  const auto place = [&](const Query& q) { return q.h * t.sh + int64_t(s.q0 + q.i) * t.sn; };
  if (aligned && even)
    to.template load_even<THREADS>(base, int(width), kStep / G * t.sn, s.L * G - row0, thread,
                                   [&](int r) { return place(Query(p, s, hkv, row0 + r)); });
  else
    to.load(base, int(width), aligned, thread, THREADS, [&](int r) {
      const Query q(p, s, hkv, row0 + r);
      return q.real ? place(q) : int64_t(-1);
    });
}
template <int THREADS, int W>
bool even_queries(const AttentionParams& p) {
  return THREADS / (W / kChunk) % (p.Hq / p.Hkv) == 0;
}

// K is what the kernel is compiled for.
template <class K, int W>
std::string launch_keys(void (*kernel)(CudaAttentionGradParams, KeysLayout), const CudaAttentionGradParams& g) {
  const AttentionParams& p = g.fwd.a;
  const KeysLayout layout{
      tile_count(p, p.S, 1, K::kOwn), section(p), aligned(p.q), aligned(p.k), aligned(p.v), aligned(g.dout),
      even_queries<K::kThreads, W>(p)};
  const int64_t tiles = layout.tiles * (p.cu_k ? 1 : p.B) * p.Hkv;
  if (tiles == 0) return "";
  SharedArena arena;
  K::carve(arena, p.dropout);
  Launch launch("attention_backward_keys", describe(p), dim3(unsigned(tiles)), dim3(K::kThreads));
  launch.shared = arena.bytes();
  launch.stream = static_cast<cudaStream_t>(g.fwd.stream);
  return run(kernel, launch, g, layout);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
