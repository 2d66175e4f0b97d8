// A linear layer over many rows: y = x W^T + b, and its gradients dx = dy W, dW = dy^T x, db = sum of dy's rows.
//
// x W^T and dy W are cut in units of one panel of columns and a stretch of rows. A thread packs the panel of the weight
// that its unit needs, which stays in the second-level cache while the rows go by. dW is a sum over rows: each thread
// owns a range of its rows and adds up the products of stretches of kChain rows of dy and x, in order. Which thread
// does what changes no result.
#include "cpu/families.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace fusedseq {
namespace FSQ_ISA {

template <class P>
class Linear {
  typedef typename P::Sum S;
  typedef Vec<S> V;
  static constexpr int L = kLanes<S>, kPanel = kMaxPanel * L;
  // Rows whose sums stay in the first-level cache from chain to chain; rows for which packing a panel is no cost; bytes
  // of packed rows of x that share the second-level cache with what they are multiplied by.
  static constexpr int64_t kRows = 96, kStretch = 8 * kRows, kGroup = 512 * 1024;
  const LinearParams& p;

 public:
  explicit Linear(const LinearParams& p) : p(p) {}

  Status forward() const {
    return multiply_by_panels(p.x, p.x_pitch, p.K, p.N, p.y, p.bias, [&](S* dst, int64_t v, int u) {
      pack_gates<P>(dst, 1, u, p.w, p.dtype, 0, p.N, v * L, p.K);
    });
  }

  Status backward(const LinearGradParams& q) const {
    Status status = Status::ok;
    if (q.dx)
      status = multiply_by_panels(q.dy, q.dy_pitch, p.N, p.K, q.dx, nullptr, [&](S* dst, int64_t v, int u) {
        pack_columns<P>(dst, u, p.w, p.dtype, p.K, v * L, 0, p.N);
      });
    if (status == Status::ok && (q.dw || q.db)) status = weight_gradients(q);
    return status;
  }

 private:
  // Enough for all threads to have much the same to do.
  int64_t count_stretches(int64_t panels) const {
    int64_t n = max64((p.M + kStretch - 1) / kStretch, (4 * p.threads + panels - 1) / panels);
    if (panels % p.threads != 0) n = round_up(n, p.threads);
    return min64(n, (p.M + kRows - 1) / kRows);
  }

  // out[rows, columns] = a[rows, K] b + bias, with pack(dst, v, u) laying out u vectors of columns of b from v on.
  template <class F>
  Status multiply_by_panels(const void* left, int64_t pitch, int64_t K, int64_t columns, void* out, const void* bias,
                            F pack) const {
    const S* const a = static_cast<const S*>(left);
    S* const c = static_cast<S*>(out);
    const int64_t panels = (columns + kPanel - 1) / kPanel, stretches = count_stretches(panels);
    Arena arena;
    S *packed = nullptr, *edge = nullptr;
    const int64_t size = K * kPanel + kPanel, block = kRows * kPanel;
    const auto place = [&] {
      packed = arena.take<S>(p.threads * size);
      edge = arena.take<S>(p.threads * block);
    };
    place();
    if (!arena.allocate()) return Status::out_of_memory;
    place();
    parallel(p.threads, [&](int thread, int count) {
      S *const b = packed + thread * size, *const base = b + K * kPanel, *const spare = edge + thread * block;
      const Range units = split(panels * stretches, thread, count);
      int64_t held = -1;
      for (int64_t i = units.begin; i < units.end; ++i) {
        const int64_t panel = i / stretches, col = panel * kPanel, width = min64(kPanel, columns - col);
        const int u = int((width + L - 1) / L);
        if (panel != held) {
          pack(b, panel * kMaxPanel, u);
          for (int v = 0; v < u; ++v)
            store(base + v * L, bias ? load_n(static_cast<const S*>(bias) + col + v * L, width - v * L) : V{});
          held = panel;
        }
        const Range rows = split(p.M, int(i % stretches), int(stretches));
        for_tiles(rows.size(), kRows, [&](int64_t r, int m) {
          const int64_t row = rows.begin + r;
          S* const to = c + row * columns + col;
          if (width == u * L) {
            multiply_panel<P>(a + row * pitch, pitch, m, K, b, u * L, u, base, 0, to, columns);
            return;
          }
          multiply_panel<P>(a + row * pitch, pitch, m, K, b, u * L, u, base, 0, spare, kPanel);
          for (int j = 0; j < m; ++j) memcpy(to + j * columns, spare + j * kPanel, sizeof(S) * size_t(width));
        });
      }
    });
    return Status::ok;
  }

  Status weight_gradients(const LinearGradParams& q) const {
    const int64_t panels = (p.K + kPanel - 1) / kPanel;
    const int64_t group = min64(panels, max64(1, kGroup / int64_t(kChain * kPanel * sizeof(S))));
    Arena arena;
    S *packed = nullptr, *edge = nullptr, *sums = nullptr;
    const int64_t size = group * kChain * kPanel, block = kMaxTile * kPanel;
    const bool odd = p.K % L != 0;  // the last vector of a row of dW is the first of the next
    const auto place = [&] {
      packed = arena.take<S>(q.dw ? p.threads * size : 0);
      edge = arena.take<S>(odd ? p.threads * block : 0);
      sums = arena.take<S>(q.db ? round_up(p.N, L) : 0);
    };
    place();
    if (!arena.allocate()) return Status::out_of_memory;
    place();
    parallel(p.threads, [&](int thread, int count) {
      const int64_t vectors = (p.N + L - 1) / L;
      const Range mine = split(vectors, thread, count);
      const Range rows{mine.begin * L, min64(p.N, mine.end * L)};
      if (rows.size() <= 0) return;
      for (int64_t m = 0; m == 0 || m < p.M; m += kChain) {
        const int64_t n = min64(kChain, p.M - m);
        if (q.db) add_rows(q, sums, rows, m, n);
        for (int64_t first = 0; q.dw && first < panels; first += group)
          add_products(q, packed + thread * size, odd ? edge + thread * block : nullptr, rows, m, n, first,
                       min64(panels, first + group));
      }
      if (q.db) memcpy(static_cast<S*>(q.db) + rows.begin, sums + rows.begin, sizeof(S) * size_t(rows.size()));
    });
    return Status::ok;
  }

  // dW[rows, panels] (+)= dy^T x over n rows of them from m on.
  void add_products(const LinearGradParams& q, S* b, S* edge, const Range& rows, int64_t m, int64_t n, int64_t first,
                    int64_t last) const {
    const S *const dy = static_cast<const S*>(q.dy) + m * q.dy_pitch, *const x = static_cast<const S*>(p.x);
    S* const dw = static_cast<S*>(q.dw);
    const auto vectors = [&](int64_t panel) { return int(min64(kMaxPanel, (p.K - panel * kPanel + L - 1) / L)); };
    for (int64_t panel = first; panel < last; ++panel) {
      const int u = vectors(panel);
      S* const to = b + (panel - first) * kChain * kPanel;
      for (int64_t k = 0; k < n; ++k)
        for (int v = 0; v < u; ++v) {
          const int64_t col = panel * kPanel + v * L;
          store(to + (k * u + v) * L, load_n(x + (m + k) * p.x_pitch + col, p.K - col));
        }
    }
    for_tiles(rows.size(), tile_rows(kMaxPanel), [&](int64_t r, int height) {
      const int64_t row = rows.begin + r;
      for (int64_t panel = first; panel < last; ++panel) {
        const int u = vectors(panel);
        const int64_t col = panel * kPanel, width = min64(kPanel, p.K - col);
        const S* const from = b + (panel - first) * kChain * kPanel;
        S* const to = dw + row * p.K + col;
        const bool whole = width == u * L;
        if (!whole && m > 0)
          for (int j = 0; j < height; ++j) memcpy(edge + j * kPanel, to + j * p.K, sizeof(S) * size_t(width));
        S* const c = whole ? to : edge;
        const int64_t pitch = whole ? p.K : kPanel;
        multiply(Tile<P>{height, u, dy + row, 1, q.dy_pitch, from, u * L, n, m > 0 ? c : nullptr, pitch, c, pitch,
                         nullptr, 0, nullptr, 0, 0, m > 0});
        if (!whole)
          for (int j = 0; j < height; ++j) memcpy(to + j * p.K, edge + j * kPanel, sizeof(S) * size_t(width));
      }
    });
  }

  // sums[rows] (+)= the sum of n rows of dy from m on.
  void add_rows(const LinearGradParams& q, S* sums, const Range& rows, int64_t m, int64_t n) const {
    const S* const dy = static_cast<const S*>(q.dy) + m * q.dy_pitch;
    for (int64_t j = rows.begin; j < rows.end; j += L) {
      V part[4] = {};
      for (int64_t k = 0; k < n; k += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (k + i < n) part[i] = part[i] + load_n(dy + (k + i) * q.dy_pitch + j, p.N - j);
      const V sum = (part[0] + part[1]) + (part[2] + part[3]);
      store(sums + j, m > 0 ? load(sums + j) + sum : sum);
    }
  }
};

Status linear_forward(const LinearParams& p) {
  if (p.dtype == DType::f64) return Linear<Whole<double>>(p).forward();
  return Linear<Whole<float>>(p).forward();
}
Status linear_backward(const LinearGradParams& p) {
  if (p.fwd.dtype == DType::f64) return Linear<Whole<double>>(p.fwd).backward(p);
  return Linear<Whole<float>>(p.fwd).backward(p);
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
