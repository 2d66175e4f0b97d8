// The first half of attention's backward: probabilities again from lse, and the gradients of logits, for the
// accumulators of mma.sync.
//
// With D = dout . out - dlse of a row, the gradient of its logit is P (dP - D), where dP = dout . v (0 where dropped;
// Dao et al. 2022, arXiv:2205.14135, algorithm 4). The gradient of a sink is -P_sink D. Products and sums are float32;
// P and the gradients are rounded to the type of the tensors where they enter products again.
#pragma once
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/attention_operand.cuh"
#include "cuda/attention_scores.cuh"

namespace fusedseq {
namespace FSQ_ISA {

// What a tile of `rows` queries brings along, in shared memory; lse in units of ln 2, +inf for rows that are not there
// or see nothing. Full: for calls whose logits are more than scaled products (plain_logits).
template <bool Full>
struct RowTable {
  SharedSpan<float> lse, delta, slope;
  SharedSpan<int> diagonal;
  SharedSpan<int64_t> bias, dense;
  int rows;

  template <class Arena>
  FSQ_BOTH static RowTable carve(Arena& arena, int rows) {
    RowTable t;
    t.rows = rows;
    t.lse = arena.template take<float>(rows);
    t.delta = arena.template take<float>(rows);
    t.diagonal = arena.template take<int>(rows);
    if (Full) {
      t.slope = arena.template take<float>(rows);
      t.bias = arena.template take<int64_t>(rows);
      t.dense = arena.template take<int64_t>(rows);
    }
    return t;
  }

  // Rows first .. first + count.
  FSQ_DEVICE RowTable part(int first, int count) const {
    RowTable t;
    t.rows = count;
    t.lse = lse.sub(first, count);
    t.delta = delta.sub(first, count);
    t.diagonal = diagonal.sub(first, count);
    if (Full) {
      t.slope = slope.sub(first, count);
      t.bias = bias.sub(first, count);
      t.dense = dense.sub(first, count);
    }
    return t;
  }

  // query(r) is the Query of row r. The numbers arrive by asynchronous copies: the caller commits and waits.
  template <class At>
  FSQ_DEVICE void fill(const CudaAttentionGradParams& g, const Sequence& s, int thread, int threads, At query) const {
    const AttentionParams& p = g.fwd.a;
    FSQ_UNROLL_BY(1)  // a thread has one row or two
    for (int r = thread; r < rows; r += threads) {
      const Query q = query(r);
      const int64_t at = (s.b * p.Hq + q.h) * p.L + s.q0 + q.i;
      if (q.real) {
        ptx::cp_async<4>(lse.address(r), g.lse2 + at);
        ptx::cp_async<4>(delta.address(r), g.delta + at);
      } else {
        lse.store(r, infinity());
        delta.store(r, 0.0f);
      }
      diagonal.store(r, q.d);
      if (Full) {
        slope.store(r, p.alibi_slopes ? static_cast<const float*>(p.alibi_slopes)[q.h] : 0.0f);
        bias.store(r, p.bias.data ? table_row(p.bias, s, q) : 0);
        dense.store(r, p.dense.data ? table_row(p.dense, s, q) : 0);
      }
    }
  }
};

// What dropout leaves of a tile of queries and keys: of each row a bit for each key.
struct KeptTable {
  SharedSpan<uint32_t> words;  // of 32 keys
  int blocks;                  // of 64 keys, for each row

  template <class Arena>
  FSQ_BOTH static KeptTable carve(Arena& arena, int rows, int keys) {
    KeptTable t;
    t.blocks = (keys + 2 * kRandomKeys - 2) / kRandomKeys;  // a tile may begin within a block
    t.words = arena.template take<uint32_t>(rows * t.blocks * 2);
    return t;
  }
  // Rows first .. first + count.
  FSQ_DEVICE KeptTable part(int first, int count) const {
    KeptTable t;
    t.blocks = blocks;
    t.words = words.sub(first * blocks * 2, count * blocks * 2);
    return t;
  }
  // Of key x and those behind it, bit by bit. x: how far the key lies from the first one of its tile's first block, in
  // a tile of picked keys its column. Bits of keys behind the tile mean nothing.
  FSQ_DEVICE uint32_t bits(int row, int x) const {
    const int first = row * blocks * 2, at = x / 32;
    const uint32_t low = words[first + at], high = words[first + least(at + 1, blocks * 2 - 1)];
    return uint32_t((uint64_t(high) << 32 | low) >> x % 32);
  }

  // Of the keys from `first` on, which counts from the beginning of the tensor. query(r) is the Query of row r. One
  // evaluation tells four keys; sixteen lanes make a block of a row, and all lanes of a warp must take part.
  template <class At>
  FSQ_DEVICE void fill(const Random& random, const Sequence& s, int rows, int first, int keys, int thread, int threads,
                       At query) const {
    const int base = first / kRandomKeys, used = (first + keys - 1) / kRandomKeys - base + 1;
    for (int n = thread; n < rows * 16; n += threads) {
      const Query q = query(n / 16);
      for (int block = 0; block < used; ++block) {
        const RandomWords all = philox(random.seed, uint32_t((base + block) * 16 + n % 16), uint32_t(s.q0 + q.i),
                                       uint32_t(q.h), uint32_t(s.b));
        gather(n / 16, block, [&](int w) { return all.w[w] >= random.threshold; });
      }
    }
  }
  // Of the global keys from `at` on.
  template <class At>
  FSQ_DEVICE void fill_picked(const Random& random, const Sequence& s, int rows, const GlobalKeys& far, int at,
                              int keys, int thread, int threads, At query) const {
    for (int n = thread; n < rows * 16; n += threads) {
      const Query q = query(n / 16);
      for (int block = 0; block < blocks; ++block)
        gather(n / 16, block, [&](int w) {
          const int x = block * kRandomKeys + w * 16 + n % 16;
          return x < keys && at + x < far.last &&
                 random.keeps(uint32_t(s.b), uint32_t(q.h), uint32_t(s.q0 + q.i), uint32_t(s.k0 + far.key(at + x)));
        });
    }
  }

 private:
  // Lane 16 n + c of a warp has the keys 16 w + c of a block, of a row of its own for each n.
  template <class Kept>
  FSQ_DEVICE void gather(int row, int block, Kept kept) const {
    const uint32_t shift = ptx::lane() / 16 * 16;
    uint32_t of[4];
    FSQ_UNROLL
    for (int w = 0; w < 4; ++w) of[w] = __ballot_sync(0xffffffffu, kept(w)) >> shift & 0xffff;
    if (ptx::lane() % 16) return;
    FSQ_UNROLL
    for (int half = 0; half < 2; ++half)
      words.store((row * blocks + block) * 2 + half, of[2 * half] | of[2 * half + 1] << 16);
  }
};

// How a row sees the keys of a tile.
enum class Look {
  window,  // those near it
  beyond,  // those picked from the list of global keys that are not near
  both,    // those near it, and global ones: `global` tells
};

// The numbers of a call that every element needs.
struct GradientNumbers {
  float scale, softcap, keep_scale;  // with `scaled` the scale makes logits in units of ln 2
  Window window;
  bool causal, dropout;
  bool scaled;  // logits are scaled products, and windows alone hide keys, as in plain calls

  template <bool Full>
  FSQ_DEVICE static GradientNumbers of(const AttentionParams& p, const Sequence& s) {
    GradientNumbers n;
    n.scaled = !Full || (!altered_logits(p) && !p.dense.data && !picks(p) && p.scale > 0);
    n.scale = float(n.scaled ? p.scale * kLog2e : p.scale);
    n.softcap = float(p.softcap);
    n.keep_scale = float(p.keep_scale);
    n.window = Window(p, s);
    n.causal = p.causal != 0;
    n.dropout = Full && p.dropout;
    return n;
  }
  FSQ_DEVICE bool sees(int j, int distance, Look look, bool global) const {
    const bool here = window.near(distance), reach = !causal || distance <= 0;
    const bool seen = look == Look::window ? here : look == Look::beyond ? !here && reach : here || (global && reach);
    return seen && window.has(j);
  }
};

// One element: the probability of a row's key from its product x, before dropout. `tangent` is the softcap's
// derivative. Without Full, for GradientNumbers::scaled, the caller has hidden what is not seen: x is minus infinity.
template <bool Full, class Rows>
FSQ_DEVICE float weigh(const AttentionParams& p, const GradientNumbers& c, const Rows& rows, int r, int j, Look look,
                       bool global, bool edge, float x, float& tangent) {
  const float lse = rows.lse[r];
  tangent = 1.0f;
  if constexpr (!Full) {
    return ptx::exp2_approx(fma(x, c.scale, -lse));
  } else {
    const int distance = j - rows.diagonal[r];
    bool seen = !edge || c.sees(j, distance, look, global);
    if (seen && lse == infinity()) seen = false;  // tables have no such row
    if (seen && p.dense.data) seen = static_cast<const uint8_t*>(p.dense.data)[rows.dense[r] + j * p.dense.ss] != 0;
    float l = x * c.scale;
    if (c.softcap != 0) {
      const float t = FSQ_ISA::tanh(l / c.softcap);
      l = t * c.softcap;
      tangent = fma(-t, t, 1.0f);
    }
    if (p.bias.data && seen) l += bias_at(p, rows.bias[r] + j * p.bias.ss);
    if (p.alibi_slopes) l = fma(-rows.slope[r], ::fabsf(float(distance)), l);
    return seen ? ptx::exp2_approx(fma(l, float(kLog2e), -lse)) : 0.0f;
  }
}

// What dropout leaves of a weight or of its gradient.
FSQ_DEVICE float dropped(const GradientNumbers& c, bool kept, float x) {
  return !c.dropout ? x : kept ? x * c.keep_scale : 0.0f;
}

// One element: of a row and key, its product x becomes the probability that the output was made of, and y = dout . v
// the gradient of its logit, with Raw that of the logit itself, else of the product before the softcap (unscaled).
// `slopes` gains what -dalibi does.
template <bool Full, bool Raw, class Rows>
FSQ_DEVICE void gradient(const AttentionParams& p, const GradientNumbers& c, const Rows& rows, int r, int j, Look look,
                         bool global, bool edge, bool kept, float& x, float& y, float& slopes) {
  float tangent;
  const float weight = weigh<Full>(p, c, rows, r, j, look, global, edge, x, tangent);
  const float ds = weight * (dropped(c, kept, y) - rows.delta[r]);
  if (Full && p.alibi_slopes && weight != 0) slopes = fma(ds, ::fabsf(float(j - rows.diagonal[r])), slopes);
  x = dropped(c, kept, weight);
  y = Raw ? ds : ds * tangent;
}

// Calls `elements` with whether logits need all that weigh<true>() does.
template <bool Full, class Elements>
FSQ_DEVICE void by_logits(const GradientNumbers& c, Elements elements) {
  if constexpr (Full)
    if (!c.scaled) return elements(std::true_type());
  elements(std::false_type());
}

// Whether the table of booleans lets any of the rows see any of the keys; all threads of the block take part.
template <class Key>
FSQ_DEVICE bool allows(const AttentionParams& p, const RowTable<true>& rows, int keys, int behind, int thread,
                       int threads, Key key) {
  bool any = false;
  for (int n = thread; n < rows.rows * keys && !any; n += threads) {
    const int r = n / keys, j = key(n % keys);
    if (rows.lse[r] != infinity() && uint32_t(j) < uint32_t(behind))
      any = static_cast<const uint8_t*>(p.dense.data)[rows.dense[r] + j * p.dense.ss] != 0;
  }
  return __syncthreads_or(any);
}

// Writes the rows of accumulators times `scale`; at(r) is where row r begins, below 0 where it has no place.
template <class E, int W, class At>
FSQ_DEVICE void store_rows(const float (&sums)[W / 8][4], E* base, int width, float scale, int first, At at) {
  FSQ_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t to = at(accumulator_row(first, half));
    if (to < 0) continue;
    const bool pairs = (reinterpret_cast<uintptr_t>(base + to) & 3) == 0;
    FSQ_UNROLL
    for (int n = 0; n < W / 8; ++n) {
      const int c = accumulator_column(n, 0);
      const float low = sums[n][2 * half] * scale, high = sums[n][2 * half + 1] * scale;
      if (pairs && c + 1 < width) {
        *reinterpret_cast<uint32_t*>(base + to + c) = pack<E>(low, high);
      } else {
        if (c < width) base[to + c] = narrow<E>(low);
        if (c + 1 < width) base[to + c + 1] = narrow<E>(high);
      }
    }
  }
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
