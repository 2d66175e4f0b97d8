// Bias, activation, dropout and residual of rows, forward and backward; cells/activation.h has the math.
#include "cpu/families.h"
#include "cpu/rows.h"
//
#include "cells/activation.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class S, Activation A>
class BiasActivation {
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>;
  const BiasActivationParams& p;
  const int64_t blocks, pitch;

 public:
  explicit BiasActivation(const BiasActivationParams& p)
      : p(p), blocks((p.d + kBlock - 1) / kBlock), pitch(max64(kBlock, round_up(p.d, kBlock))) {}

  Status forward() const {
    const V scale = splat(S(p.dropout.scale));
    parallel(row_threads(p.threads, p.rows, p.d), [&](int thread, int count) {
      const Range part = split(p.rows, thread, count);
      for (int64_t r = part.begin; r < part.end; ++r)
        for (int64_t b = 0; b < blocks; ++b) {
          const uint64_t bits = p.dropout.on ? kept_columns(p.dropout, r, b) : 0;
          for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
            V y = activation_fwd<A>(input(r, j, n));
            if (p.dropout.on) y = kept<S>(y * scale, bits >> (v * L));
            if (p.residual) y = y + load_as<S>(p.residual, p.dtype, r * p.d + j, n);
            store_as<S>(p.out, p.dtype, r * p.d + j, y, n);
          });
        }
    });
    return Status::ok;
  }

  Status backward(const BiasActivationGradParams& q) const {
    const Groups groups(p.rows);
    const V scale = splat(S(p.dropout.scale));
    Arena arena;
    S* partial = nullptr;
    const auto place = [&] { partial = arena.take<S>(q.dbias ? groups.count * pitch : 0); };
    place();
    if (!arena.allocate()) return Status::out_of_memory;
    place();
    Jobs jobs;
    Barrier all;
    parallel(row_threads(p.threads, p.rows, p.d), [&](int thread, int count) {
      for (int64_t i; (i = jobs.take()) < groups.count;) {
        S* const sums = q.dbias ? partial + i * pitch : nullptr;
        if (sums) memset(sums, 0, sizeof(S) * size_t(pitch));
        const Range rows = groups.range(i);
        for (int64_t r = rows.begin; r < rows.end; ++r)
          for (int64_t b = 0; b < blocks; ++b) {
            const uint64_t bits = p.dropout.on ? kept_columns(p.dropout, r, b) : 0;
            for_vectors<S>(b, p.d, [&](int64_t j, int64_t n, int v) {
              V dy = load_as<S>(q.dout, p.dtype, r * p.d + j, n);
              if (p.dropout.on) dy = kept<S>(dy * scale, bits >> (v * L));
              if constexpr (A != Activation::identity) dy = dy * activation_bwd<A>(input(r, j, n));
              if (q.dx) store_as<S>(q.dx, p.dtype, r * p.d + j, dy, n);
              if (sums) store(sums + j, load(sums + j) + dy);
            });
          }
      }
      if (!q.dbias) return;
      all.wait(count);
      const Range part = split(pitch / kBlock, thread, count);
      add_groups(static_cast<S*>(q.dbias), partial, groups.count, pitch, part.begin * kBlock,
                 min64(p.d, part.end * kBlock));
    });
    return Status::ok;
  }

 private:
  V input(int64_t r, int64_t j, int64_t n) const {
    const V x = load_as<S>(p.x, p.dtype, r * p.d + j, n);
    return p.bias ? x + load_as<S>(p.bias, p.dtype, j, n) : x;
  }
};

// Calls run(BiasActivation<S, A>) with the types of a call.
template <class S, class F>
static Status with_activation(const BiasActivationParams& p, F run) {
  switch (p.activation) {
    case Activation::relu:
      return run(BiasActivation<S, Activation::relu>(p));
    case Activation::gelu:
      return run(BiasActivation<S, Activation::gelu>(p));
    case Activation::gelu_tanh:
      return run(BiasActivation<S, Activation::gelu_tanh>(p));
    case Activation::silu:
      return run(BiasActivation<S, Activation::silu>(p));
    default:
      return run(BiasActivation<S, Activation::identity>(p));
  }
}
template <class F>
static Status with_types(const BiasActivationParams& p, F run) {
  return p.dtype == DType::f64 ? with_activation<double>(p, run) : with_activation<float>(p, run);
}

Status bias_activation_forward(const BiasActivationParams& p) {
  return with_types(p, [](const auto& kernel) { return kernel.forward(); });
}
Status bias_activation_backward(const BiasActivationGradParams& p) {
  return with_types(p.fwd, [&](const auto& kernel) { return kernel.backward(p); });
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
