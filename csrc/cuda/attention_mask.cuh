// How the CUDA attention kernels cut their work, and which keys a query sees: the definitions of csrc/cpu/attention.h
// and kernels/attention_mask.py.
//
// A pair is one key head of one batch row (or packed sequence) with the G query heads that use it. Its rows are the
// queries of those heads, head by head within each position, so that keys are read once for a whole group and decoding
// fills a tile. Positions count from the first query and the first key of the pair. Tiles of keys begin at multiples of
// their size, so that a row's result depends on nothing else in the batch.
#pragma once
#include "cells/value.h"
#include "cuda/span.cuh"
#include "fusedseq.h"

namespace fusedseq {
namespace FSQ_ISA {

constexpr int kNowhere = 1 << 30;  // the position of a key that is not there

FSQ_BOTH int least(int a, int b) { return a < b ? a : b; }
FSQ_BOTH int most(int a, int b) { return a > b ? a : b; }
FSQ_BOTH int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
FSQ_BOTH int heads_of_group(const AttentionParams& p) { return int(p.Hq) / int(p.Hkv); }

// Whether there may be keys to see from beyond a window.
FSQ_BOTH bool picks(const AttentionParams& p) { return p.global_keys && (p.left >= 0 || (p.right >= 0 && !p.causal)); }

// One batch row, or one sequence of a pack.
struct Sequence {
  int b, q0, L, k0, S;
  int diagonal;  // the key that the first query is aligned with

  FSQ_DEVICE Sequence(const AttentionParams& p, int n) : b(n), q0(0), L(int(p.L)), k0(0), S(int(p.S)), diagonal(0) {
    if (p.cu_q) {
      b = 0;
      q0 = int(p.cu_q[n]);
      L = int(p.cu_q[n + 1]) - q0;
      k0 = int(p.cu_k[n]);
      S = int(p.cu_k[n + 1]) - k0;
    }
    if (p.key_lengths) S = int(p.key_lengths[n]);
    if (p.causal == 2) diagonal = S - L;
  }
};

// How many tiles of `size` cover all sequences' items, `factor` of them for each of the n positions of the tensor.
// Packed sequences get floor(n factor / size) + N: sequence s begins at tile floor(cu[s] factor / size) + s, which
// leaves room for all of its own and can be found without a table.
FSQ_BOTH int64_t tile_count(const AttentionParams& p, int64_t n, int64_t factor, int64_t size) {
  return p.cu_q ? (p.N ? n * factor / size + p.N : 0) : tiles_of(n * factor, size);
}

// Which tile a CTA owns.
struct Work {
  int n, hkv;  // sequence and key head
  int first;   // item of the sequence that the tile begins with

  // `index` counts tiles of all pairs. Pairs come in sections of `section` whose keys and values fit L2 together;
  // within one, tiles of all pairs go from first to last or, if `backwards` (the later rows of a causal mask are the
  // longest), from last to first, so that the shortest end the launch. cu: cu_q or cu_k, null where nothing is packed.
  // I: int64_t, or int where the count allows it, for a division of 64 bits is a subroutine.
  template <class I>
  FSQ_DEVICE Work(const AttentionParams& p, I index, const int64_t* cu, decltype(I()) tiles, decltype(I()) section,
                  int factor, int size, bool backwards) {
    I tile = locate(cu ? 1 : I(p.B), I(p.Hkv), index, tiles, section, backwards);
    if (cu) {
      int64_t low = 0, high = p.N;  // the last sequence that begins at this tile or before
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (cu[middle] * factor / size + middle <= tile ? low : high) = middle;
      }
      n = int(low);
      tile -= I(cu[low] * factor / size + low);
    }
    first = int(tile) * size;
  }
  // The same of B batch rows with `heads` heads, where nothing is packed.
  FSQ_DEVICE Work(int B, int heads, int index, int tiles, int section, int size, bool backwards) {
    first = locate(B, heads, index, tiles, section, backwards) * size;
  }

 private:
  // Sets n and hkv; returns the tile within its pair.
  template <class I>
  FSQ_DEVICE I locate(I B, I heads, I index, I tiles, I section, bool backwards) {
    const I pairs = B * heads, group = index / (tiles * section);
    const I rest = index - group * tiles * section, left = pairs - group * section;
    const I width = left < section ? left : section, pair = group * section + rest % width;
    const I tile = rest / width;
    n = int(pair / heads);
    hkv = int(pair % heads);
    return backwards ? tiles - 1 - tile : tile;
  }
};

// One row of a pair. What is not there repeats the last row, so that it can be computed with.
struct Query {
  bool real;
  int i, h;               // position in the sequence; head
  int d;                  // the key that it is aligned with
  int begin, end, reach;  // first key of its window, the one behind it, and that behind the last global one

  FSQ_DEVICE Query(const AttentionParams& p, const Sequence& s, int hkv, int r) {
    const int G = heads_of_group(p);
    real = r < s.L * G;
    r = most(least(r, s.L * G - 1), 0);
    i = G == 1 ? r : r / G;
    h = G == 1 ? hkv : hkv * G + r % G;
    d = i + s.diagonal;
    begin = p.left >= 0 ? most(d - int(p.left), 0) : 0;
    end = p.right >= 0 ? least(d + int(p.right) + 1, s.S) : s.S;
    reach = p.causal ? least(d + 1, s.S) : s.S;
  }
  // Whether the window, or for keys picked from the list of global ones what lies beyond it, has this key.
  FSQ_DEVICE bool sees(int j, bool picked) const {
    const bool near = j >= begin && j < end;
    return picked ? !near && j < reach : near;
  }
};

// What all rows of a sequence have in common: how far from the key that a row is aligned with (Query::d) the keys of
// its window lie.
struct Window {
  int left;
  uint32_t size;  // from the first key to the last
  int keys;

  FSQ_DEVICE Window() : left(0), size(0), keys(0) {}
  // Positions are below 2^29: a window without a bound reaches everywhere, and no sum overflows.
  FSQ_DEVICE Window(const AttentionParams& p, const Sequence& s)
      : left(p.left >= 0 && p.left < kNowhere ? int(p.left) : kNowhere),
        size(uint32_t(left) + uint32_t(p.right >= 0 && p.right < kNowhere ? int(p.right) : kNowhere)),
        keys(s.S) {}
  FSQ_DEVICE bool near(int distance) const { return uint32_t(distance + left) <= size; }
  FSQ_DEVICE bool has(int j) const { return uint32_t(j) < uint32_t(keys); }
};

// Rows [first, last) of keys or queries, of which tiles within [inner_first, inner_last) need no mask. Both inner
// bounds are multiples of the tile, as is `first`.
struct Range {
  int first, inner_first, inner_last, last;

  FSQ_DEVICE bool whole(int at, int size) const { return at >= inner_first && at + size <= inner_last; }
};

FSQ_DEVICE int up_to(int n, int size) { return (n + size - 1) / size * size; }

// The keys that queries i_low .. i_high see through their windows, within [lower, upper); tiles of `size`.
FSQ_DEVICE Range keys_of_queries(const AttentionParams& p, const Sequence& s, int i_low, int i_high, int lower,
                                 int upper, int size) {
  const int d_low = i_low + s.diagonal, d_high = least(i_high, s.L - 1) + s.diagonal;
  Range k{lower, lower, 0, least(s.S, upper)};
  k.inner_last = k.last;
  int seen = 0;
  if (p.left >= 0) {
    seen = most(d_low - int(p.left), 0);
    k.first = most(seen / size * size, lower);
    k.inner_first = most(up_to(most(d_high - int(p.left), 0), size), lower);
  }
  if (p.right >= 0) {
    k.inner_last = least(most(d_low + int(p.right) + 1, 0), k.last);
    k.last = least(most(d_high + int(p.right) + 1, 0), k.last);
  }
  if (seen >= k.last || i_low >= s.L) k.last = 0;
  return k;
}
// The same for rows r_low .. r_high of a pair.
FSQ_DEVICE Range key_range(const AttentionParams& p, const Sequence& s, int r_low, int r_high, int lower, int upper,
                           int size) {
  const int G = heads_of_group(p);
  return keys_of_queries(p, s, r_low / G, r_high / G, lower, upper, size);
}

// The other way round: queries that see keys j_low .. j_high, and those that see all of them; not rounded to tiles.
FSQ_DEVICE Range queries_of_keys(const AttentionParams& p, const Sequence& s, int j_low, int j_high) {
  int first = 0, last = s.L, inner_first = 0, inner_last = s.L;
  if (p.right >= 0) {
    first = most(j_low - int(p.right) - s.diagonal, 0);
    inner_first = most(j_high - int(p.right) - s.diagonal, 0);
  }
  if (p.left >= 0) {
    last = least(most(j_high + int(p.left) - s.diagonal + 1, 0), s.L);
    inner_last = least(most(j_low + int(p.left) - s.diagonal + 1, 0), s.L);
  }
  if (first >= last) last = 0;
  return {first, inner_first, least(inner_last, last), last};
}
// The same as rows of a pair; tiles of `size`.
FSQ_DEVICE Range row_range(const AttentionParams& p, const Sequence& s, int j_low, int j_high, int size) {
  const int G = heads_of_group(p);
  const Range i = queries_of_keys(p, s, j_low, j_high);
  return {i.first * G / size * size, up_to(i.inner_first * G, size), i.inner_last * G, i.last * G};
}

// The global keys of a sequence, sorted: for keys beyond a window.
struct GlobalKeys {
  const int32_t* positions;  // of this batch row, counted from its first key
  int k0;
  int first, last;  // of those in the sequence's first `reach` keys

  FSQ_DEVICE GlobalKeys() : positions(nullptr), k0(0), first(0), last(0) {}
  FSQ_DEVICE GlobalKeys(const CudaAttentionParams& p, const Sequence& s, int reach)
      : positions(nullptr), k0(s.k0), first(0), last(0) {
    if (!p.positions) return;
    const int32_t* const ranks = p.ranks + s.b * p.ranks_sb;
    positions = p.positions + s.b * p.positions_sb;
    first = ranks[k0];
    last = ranks[k0 + most(reach, 0)];
  }
  FSQ_DEVICE int key(int at) const { return at < last ? positions[at] - k0 : kNowhere; }
};

}  // namespace FSQ_ISA
}  // namespace fusedseq
