// Residual, dropout and layer normalisation of rows, forward and backward; cells/norm.h has the math.
//
// A row passes through a buffer in the first-level cache: its sum, the two moments, the result. Backward forms the sum
// and the moments again, so that forward keeps nothing but its inputs.
#include <math.h>

#include "cpu/families.h"
#include "cpu/rows.h"
//
#include "cells/norm.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S>
class LayerNorm {
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kVecs = int(kBlock) / L;
  struct Moments {
    V mean, rstd;
  };
  const LayerNormParams& p;
  const int64_t blocks, pitch;  // pitch: whole vectors, at least one

 public:
  explicit LayerNorm(const LayerNormParams& p)
      : p(p), blocks((p.d + kBlock - 1) / kBlock), pitch(max64(kBlock, round_up(p.d, kBlock))) {}

  Status forward() const {
    const int threads = row_threads(p.threads, p.rows, p.d);
    Arena arena;
    S* sums = nullptr;
    const auto place = [&] { sums = arena.take<S>(threads * pitch); };
    place();
    if (!arena.allocate()) return Status::out_of_memory;
    place();
    parallel(threads, [&](int thread, int count) {
      S* const s = sums + thread * pitch;
      const Range part = split(p.rows, thread, count);
      for (int64_t r = part.begin; r < part.end; ++r) {
        const Moments m = moments(s, sum_row(r, s, nullptr));
        for (int64_t b = 0; b < blocks; ++b)
          for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int) {
            const V y = normalized(load(s + j), m.mean, m.rstd);
            const V w = p.weight ? load_as<S>(p.weight, p.dtype, j, n) : splat(S(1));
            const V c = p.bias ? load_as<S>(p.bias, p.dtype, j, n) : V{};
            store_as<S>(p.out, p.dtype, r * p.d + j, fma(y, w, c), n);
            if (p.sum) store_as<S>(p.sum, p.dtype, r * p.d + j, load(s + j), n);
          });
      }
    });
    return Status::ok;
  }

  Status backward(const LayerNormGradParams& g) const {
    const int threads = row_threads(p.threads, p.rows, p.d);
    const Groups groups(p.rows);
    const bool parameters = g.dweight || g.dbias;
    Arena arena;
    S *sums = nullptr, *partial = nullptr;
    uint64_t* bits = nullptr;
    const auto place = [&] {
      sums = arena.take<S>(2 * threads * pitch);
      bits = arena.take<uint64_t>(threads * round_up(blocks, 8));
      partial = arena.take<S>(parameters ? 2 * groups.count * pitch : 0);
    };
    place();
    if (!arena.allocate()) return Status::out_of_memory;
    place();
    Jobs jobs;
    Barrier all;
    parallel(threads, [&](int thread, int count) {
      S* const s = sums + 2 * thread * pitch;
      uint64_t* const keep = bits + thread * round_up(blocks, 8);
      for (int64_t i; (i = jobs.take()) < groups.count;) {
        S* const into = parameters ? partial + 2 * i * pitch : nullptr;
        if (into) memset(into, 0, sizeof(S) * size_t(2 * pitch));
        const Range rows = groups.range(i);
        for (int64_t r = rows.begin; r < rows.end; ++r) row_backward(g, r, s, s + pitch, keep, into);
      }
      if (!parameters) return;
      all.wait(count);
      const Range part = split(pitch / kBlock, thread, count);
      const int64_t begin = part.begin * kBlock, end = min64(p.d, part.end * kBlock);
      if (g.dweight) add_groups(static_cast<S*>(g.dweight), partial, groups.count, 2 * pitch, begin, end);
      if (g.dbias) add_groups(static_cast<S*>(g.dbias), partial + pitch, groups.count, 2 * pitch, begin, end);
    });
    return Status::ok;
  }

 private:
  // s = residual + dropout(x), zero behind the row; returns its total. `keep` receives what dropout kept.
  S sum_row(int64_t r, S* s, uint64_t* keep) const {
    V acc[kVecs] = {};
    const V scale = splat(S(p.dropout.scale));
    for (int64_t b = 0; b < blocks; ++b) {
      uint64_t bits = ~uint64_t(0);
      if (p.dropout.on) bits = kept_columns(p.dropout, r, b);
      if (keep) keep[b] = bits;
      for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
        V x = load_as<S>(p.x, p.dtype, r * p.d + j, n);
        if (p.dropout.on) x = kept<S>(x * scale, bits >> (v * L));
        if (p.residual) x = x + load_as<S>(p.residual, p.dtype, r * p.d + j, n);
        store(s + j, x);
        acc[v] = acc[v] + x;
      });
    }
    return fold(acc);
  }
  static S fold(V (&acc)[kVecs]) {
    V sum = acc[0];
    for (int v = 1; v < kVecs; ++v) sum = sum + acc[v];
    return total(sum);
  }
  Moments moments(const S* s, S sum) const {
    const V mean = splat(S(sum / S(p.d)));
    V acc[kVecs] = {}, rest[kVecs] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
        const V c = first_n<S>(load(s + j) - mean, n);
        acc[v] = fma(c, c, acc[v]);
        rest[v] = rest[v] + c;
      });
    // What rounding left of a mean far from 0.
    const double left = double(fold(rest)) / double(p.d);
    return {mean + splat(S(left)), splat(S(1 / sqrt(double(fold(acc)) / double(p.d) - left * left + p.eps)))};
  }

  // Two passes: means of g and g n over the row, then the gradient of the sum. n takes the place of s.
  void row_backward(const LayerNormGradParams& q, int64_t r, S* s, S* g, uint64_t* keep, S* partial) const {
    const int64_t at = r * p.d;
    V mean_g{}, mean_gn{}, rstd{};
    if (q.dout) {
      const Moments m = moments(s, sum_row(r, s, keep));
      V acc_g[kVecs] = {}, acc_gn[kVecs] = {};
      for (int64_t b = 0; b < blocks; ++b)
        for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
          const V y = normalized(load(s + j), m.mean, m.rstd), dy = load_as<S>(q.dout, p.dtype, at + j, n);
          const V gw = p.weight ? dy * load_as<S>(p.weight, p.dtype, j, n) : dy;
          store(s + j, y);
          store(g + j, gw);
          acc_g[v] = acc_g[v] + gw;
          acc_gn[v] = fma(gw, y, acc_gn[v]);
          if (partial) {
            store(partial + j, fma(dy, y, load(partial + j)));
            store(partial + pitch + j, load(partial + pitch + j) + dy);
          }
        });
      mean_g = splat(S(fold(acc_g) / S(p.d)));
      mean_gn = splat(S(fold(acc_gn) / S(p.d)));
      rstd = m.rstd;
    } else if (p.dropout.on) {
      for (int64_t b = 0; b < blocks; ++b) keep[b] = kept_columns(p.dropout, r, b);
    }
    if (!q.dx && !q.dresidual) return;
    const V scale = splat(S(p.dropout.scale));
    for (int64_t b = 0; b < blocks; ++b)
      for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
        V ds = q.dout ? normalized_bwd(load(g + j), load(s + j), rstd, mean_g, mean_gn) : V{};
        if (q.dsum) ds = ds + load_as<S>(q.dsum, p.dtype, at + j, n);
        if (q.dresidual) store_as<S>(q.dresidual, p.dtype, at + j, ds, n);
        if (p.dropout.on) ds = kept<S>(ds * scale, keep[b] >> (v * L));
        if (q.dx) store_as<S>(q.dx, p.dtype, at + j, ds, n);
      });
  }
};

Status layer_norm_forward(const LayerNormParams& p) {
  return p.dtype == DType::f64 ? LayerNorm<double>(p).forward() : LayerNorm<float>(p).forward();
}
Status layer_norm_backward(const LayerNormGradParams& p) {
  return p.fwd.dtype == DType::f64 ? LayerNorm<double>(p.fwd).backward(p) : LayerNorm<float>(p.fwd).backward(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
