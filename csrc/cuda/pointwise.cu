// The pointwise part of one step, both products of its gates being the caller's: one pass over memory, every operand
// read once and every result written once.
//
// A thread owns N neighbouring units of one row. The wide kernels move up to 16 bytes with every access; the launcher
// chooses them where all rows are dense, aligned and whole numbers of such accesses. The others own one unit and take
// any strides, those of an expanded or a transposed tensor included.
//
// Operands go through GlobalSpan only to be checked under the emulator: no block reads what another writes.
#include "cuda/element.cuh"
#include "cuda/scan.h"
#include "cuda/surface.h"

namespace fusedseq {
namespace FSQ_ISA {
namespace {

constexpr int kThreads = 256;
// Units of a thread of the wide kernels: 16 bytes of the type that is computed in going forward, so that a warp's
// accesses to the products leave no gaps, and registers for many warps; 16 bytes of the states' type going back.
template <class E>
constexpr int kWideForward = 16 / int(sizeof(Compute<E>));
template <class E>
constexpr int kWideBackward = 16 / int(sizeof(E));
template <Cell C>
constexpr int kSavedOf = saved_values(C);

// N units from `unit` on of one row.
struct Place {
  int64_t B, H, row, unit;

  template <int N>
  FSQ_DEVICE static Place mine(int64_t B, int64_t H) {
    return {B, H, int64_t(blockIdx.x) * blockDim.y + threadIdx.y, (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N};
  }
  FSQ_DEVICE bool inside() const { return row < B && unit < H; }
  template <int N>
  FSQ_DEVICE int64_t at(const Strided& m, int gate) const {
    // The first term, formed before anything is known of the matrix, serves all of its gates.
    const int64_t step = N == 1 ? m.su : 1;
    return (row * m.sb + unit * step) + gate * (H * step);
  }
  // Elements of T from the first to the last one of a matrix of `gates` blocks of H columns.
  template <class T>
  FSQ_DEVICE GlobalSpan<T> span(const Strided& m, int gates) const {
    return {static_cast<T*>(m.data), (B - 1) * m.sb + (gates * H - 1) * m.su + 1};
  }
};

// What one access moves: 16 bytes, 8 if there are no more, or a lone value.
template <class T, int N>
struct Piece {
  static constexpr int kBytes = N == 1 ? int(sizeof(T)) : N * int(sizeof(T)) < 16 ? 8 : 16;
  static constexpr int kValues = kBytes / int(sizeof(T));
  static_assert(N % kValues == 0, "whole accesses");
  typedef std::conditional_t<N == 1, T, std::conditional_t<kBytes == 8, uint2, uint4>> Raw;
  T values[kValues];

  FSQ_DEVICE static Piece of(const Raw& raw) {
    Piece piece;
    memcpy(static_cast<void*>(piece.values), &raw, sizeof raw);
    return piece;
  }
  FSQ_DEVICE void store(const GlobalSpan<T>& span, int64_t at) const {
    if constexpr (N == 1) {
      span.store(at, values[0]);
    } else {
      Raw raw;
      memcpy(static_cast<void*>(&raw), static_cast<const void*>(values), sizeof raw);
      if constexpr (kBytes == 16)
        span.store_16(at, raw);
      else
        span.store(at, raw);
    }
  }
};

// x = the units of block `gate` of `gates`, in the type that is computed in; zeros if there is no matrix.
template <class T, int N>
FSQ_DEVICE void read(const Place& place, const Strided& m, int gate, int gates, Compute<T> (&x)[N]) {
  typedef Piece<T, N> P;
  const int64_t at = place.at<N>(m, gate);
  if (!m.data) {
    FSQ_UNROLL
    for (int i = 0; i < N; ++i) x[i] = Compute<T>(0);
    return;
  }
  const GlobalSpan<T> span = place.span<T>(m, gates);
  FSQ_UNROLL
  for (int i = 0; i < N; i += P::kValues) {
    const P piece = P::of(span.template load<typename P::Raw>(at + i));
    FSQ_UNROLL
    for (int j = 0; j < P::kValues; ++j) x[i + j] = widen(piece.values[j]);
  }
}

template <class T, int N>
FSQ_DEVICE void write(const Place& place, const Strided& m, int gate, int gates, const Compute<T> (&x)[N]) {
  typedef Piece<T, N> P;
  const GlobalSpan<T> span = place.span<T>(m, gates);
  const int64_t at = place.at<N>(m, gate);
  FSQ_UNROLL
  for (int i = 0; i < N; i += P::kValues) {
    P piece;
    FSQ_UNROLL
    for (int j = 0; j < P::kValues; ++j) piece.values[j] = narrow<T>(x[i + j]);
    piece.store(span, at + i);
  }
}

// Adds a matrix's units to x, if there is one.
template <class T, int N>
FSQ_DEVICE void add(const Place& place, const Strided& m, int gate, int gates, Compute<T> (&x)[N]) {
  if (!m.data) return;
  Compute<T> more[N];
  read<T>(place, m, gate, gates, more);
  FSQ_UNROLL
  for (int i = 0; i < N; ++i) x[i] += more[i];
}

// The biases of a gate, to what x and h give to it. Apart from what loads these: an addition waits for its operands,
// and with it every load behind it.
template <class E, int N>
FSQ_DEVICE void add_biases(const CudaCellParams& p, const Place& place, int gate, int G, Compute<E> (&x)[N],
                           Compute<E> (&y)[N]) {
  add<E>(place, p.b_ih, gate, G, x);
  add<E>(place, p.b_hh, gate, G, y);
}

template <Cell C, class E, int N>
__global__ void __launch_bounds__(kThreads) cell_forward(CudaCellParams p) {
  typedef Compute<E> S;
  constexpr int G = kGatesOf<C>;
  const Place place = Place::mine<N>(p.B, p.H);
  if (!place.inside()) return;
  const Activations act;
  S h[N];
  if constexpr (C == Cell::gru_reset_before) {
    S before[N];
    read<E>(place, p.h, 0, 1, before);
    if (p.phase == 0) {
      S x[2][N], y[2][N];
      FSQ_UNROLL
      for (int g = 0; g < 2; ++g) {
        read<S>(place, p.gx, g, G, x[g]);
        read<S>(place, p.gh, g, 2, y[g]);
      }
      FSQ_UNROLL
      for (int g = 0; g < 2; ++g) add_biases<E>(p, place, g, G, x[g], y[g]);
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        x[0][i] = act.gate(x[0][i] + y[0][i]);
        x[1][i] = act.gate(x[1][i] + y[1][i]);
        h[i] = x[0][i] * before[i];
      }
      FSQ_UNROLL
      for (int g = 0; g < 2; ++g) write<S>(place, p.kept, g, kSavedOf<C>, x[g]);
    } else {
      S x[N], y[N], z[N];
      read<S>(place, p.gx, 2, G, x);
      read<S>(place, p.gh, 0, 1, y);
      read<S>(place, p.kept, 1, kSavedOf<C>, z);
      add_biases<E>(p, place, 2, G, x, y);
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        x[i] = act.state(x[i] + y[i]);
        h[i] = gru_blend(z[i], x[i], before[i], act);
      }
      write<S>(place, p.kept, 2, kSavedOf<C>, x);
    }
  } else {
    // All that is read, before anything is computed.
    S x[G][N], y[G][N], before[N];
    FSQ_UNROLL
    for (int g = 0; g < G; ++g) {
      read<S>(place, p.gx, g, G, x[g]);
      read<S>(place, p.gh, g, G, y[g]);
    }
    if constexpr (C == Cell::lstm) read<E>(place, p.c, 0, 1, before);
    if constexpr (C == Cell::gru) read<E>(place, p.h, 0, 1, before);
    FSQ_UNROLL
    for (int g = 0; g < G; ++g) add_biases<E>(p, place, g, G, x[g], y[g]);
    if constexpr (C == Cell::lstm) {
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        const LstmStep<S> step =
            lstm_fwd(x[0][i] + y[0][i], x[1][i] + y[1][i], x[2][i] + y[2][i], x[3][i] + y[3][i], before[i], act);
        x[0][i] = step.i;
        x[1][i] = step.f;
        x[2][i] = step.g;
        x[3][i] = step.o;
        before[i] = step.c;
        h[i] = step.h;
      }
      write<E>(place, p.c_new, 0, 1, before);
      if (p.kept.data) write<S>(place, p.kept, 4, kSavedOf<C>, before);
    } else if constexpr (C == Cell::gru) {
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        const GruStep<S> step = gru_fwd(x[0][i] + y[0][i], x[1][i] + y[1][i], x[2][i], y[2][i], before[i], act);
        x[0][i] = step.r;
        x[1][i] = step.z;
        x[2][i] = step.n;
        h[i] = step.h;
      }
      if (p.kept.data) write<S>(place, p.kept, 3, kSavedOf<C>, y[2]);
    } else {
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        const S a = x[0][i] + y[0][i];
        h[i] = p.cell == Cell::rnn_relu ? rnn_fwd<true>(a, act) : rnn_fwd<false>(a, act);
      }
    }
    if (kSavedOf<C> && p.kept.data) {
      FSQ_UNROLL
      for (int g = 0; g < G; ++g) write<S>(place, p.kept, g, kSavedOf<C>, x[g]);
    }
  }
  write<E>(place, p.h_new, 0, 1, h);
}

template <Cell C, class E, int N>
__global__ void __launch_bounds__(kThreads) cell_backward(CudaCellGradParams p) {
  typedef Compute<E> S;
  constexpr int G = kGatesOf<C>;
  const Place place = Place::mine<N>(p.B, p.H);
  if (!place.inside()) return;
  const Activations act;
  constexpr int kSaved = kSavedOf<C> ? kSavedOf<C> : 1;
  S saved[kSaved][N], dh[N];
  if constexpr (C == Cell::gru_reset_before) {
    S before[N], past[N];
    read<E>(place, p.h, 0, 1, before);
    if (p.phase == 0) {
      read<S>(place, p.kept, 1, kSaved, saved[1]);
      read<S>(place, p.kept, 2, kSaved, saved[2]);
      read<E>(place, p.dh, 0, 1, dh);
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) {
        const GruGrad<S> g = gru_before_bwd(saved[1][i], saved[2][i], before[i], dh[i], act);
        saved[1][i] = g.dz;
        saved[2][i] = g.dn;
        past[i] = g.dh_prev;
      }
      write<E>(place, p.dgates, 1, G, saved[1]);
      write<E>(place, p.dgates, 2, G, saved[2]);
    } else {
      S drh[N];
      read<S>(place, p.kept, 0, kSaved, saved[0]);
      read<S>(place, p.drh, 0, 1, drh);
      read<S>(place, p.dh_past, 0, 1, past);
      FSQ_UNROLL
      for (int i = 0; i < N; ++i) saved[0][i] = gru_before_bwd_reset(saved[0][i], before[i], drh[i], past[i], act);
      write<E>(place, p.dgates, 0, G, saved[0]);
    }
    write<S>(place, p.dh_past, 0, 1, past);
    return;
  }
  read<E>(place, p.dh, 0, 1, dh);
  if constexpr (C == Cell::lstm || C == Cell::gru) {
    FSQ_UNROLL
    for (int k = 0; k < kSaved; ++k) read<S>(place, p.kept, k, kSaved, saved[k]);
  }
  if constexpr (C == Cell::lstm) {
    S before[N], dc[N];
    read<E>(place, p.c, 0, 1, before);
    read<E>(place, p.dc, 0, 1, dc);
    FSQ_UNROLL
    for (int i = 0; i < N; ++i) {
      const LstmGrad<S> g =
          lstm_bwd(saved[0][i], saved[1][i], saved[2][i], saved[3][i], saved[4][i], before[i], dh[i], dc[i], act);
      saved[0][i] = g.di;
      saved[1][i] = g.df;
      saved[2][i] = g.dg;
      saved[3][i] = g.dg_o;
      dc[i] = g.dc_prev;
    }
    FSQ_UNROLL
    for (int g = 0; g < G; ++g) write<E>(place, p.dgates, g, G, saved[g]);
    write<E>(place, p.dc_past, 0, 1, dc);
  } else if constexpr (C == Cell::gru) {
    S before[N];
    read<E>(place, p.h, 0, 1, before);
    FSQ_UNROLL
    for (int i = 0; i < N; ++i) {
      const GruGrad<S> g = gru_bwd(saved[0][i], saved[1][i], saved[2][i], saved[3][i], before[i], dh[i], act);
      saved[0][i] = g.dr;
      saved[1][i] = g.dz;
      saved[2][i] = g.dn;
      saved[3][i] = g.dhn;
      dh[i] = g.dh_prev;
    }
    FSQ_UNROLL
    for (int g = 0; g < 3; ++g) {
      write<E>(place, p.dgates, g, G, saved[g]);
      // r and z twice, so that the product with W_hh finds its three blocks side by side.
      write<E>(place, p.dinner, g, G, saved[g < 2 ? g : 3]);
    }
    write<S>(place, p.dh_past, 0, 1, dh);
  } else if constexpr (C == Cell::rnn_tanh) {
    read<S>(place, p.y, 0, 1, saved[0]);
    FSQ_UNROLL
    for (int i = 0; i < N; ++i)
      dh[i] =
          p.cell == Cell::rnn_relu ? rnn_bwd<true>(saved[0][i], dh[i], act) : rnn_bwd<false>(saved[0][i], dh[i], act);
    write<E>(place, p.dgates, 0, G, dh);
  }
}

// Whether every access to the matrix may move the bytes of N elements of T, or 16 if there are more.
template <class T, int N>
bool aligned(const Strided& m, int64_t rows) {
  constexpr int64_t bytes = Piece<T, N>::kBytes;
  return !m.data || (m.su == 1 && reinterpret_cast<uintptr_t>(m.data) % bytes == 0 &&
                     (rows == 1 || m.sb * sizeof(T) % bytes == 0));
}

template <class E, int N>
bool fits_wide(const CudaCellParams& p) {
  bool fits = p.H % N == 0;
  for (const Strided& m : {p.gx, p.gh, p.kept}) fits &= aligned<Compute<E>, N>(m, p.B);
  for (const Strided& m : {p.b_ih, p.b_hh, p.h, p.c, p.h_new, p.c_new}) fits &= aligned<E, N>(m, p.B);
  return fits;
}
template <class E, int N>
bool fits_wide(const CudaCellGradParams& p) {
  bool fits = p.H % N == 0;
  for (const Strided& m : {p.kept, p.y, p.drh, p.dh_past}) fits &= aligned<Compute<E>, N>(m, p.B);
  for (const Strided& m : {p.h, p.c, p.dh, p.dc, p.dgates, p.dinner, p.dc_past}) fits &= aligned<E, N>(m, p.B);
  return fits;
}

// Blocks as wide as the rows, up to their threads; short rows share one.
template <class P>
std::string launch(const char* name, void (*kernel)(P), const P& p, int units) {
  const int64_t groups = (p.H + units - 1) / units;
  int across = 1;
  while (across < groups && across < kThreads) across *= 2;
  const int down = kThreads / across;
  Launch launch(name, describe(p.cell, p.dtype, {{"B", p.B}, {"H", p.H}}),
                dim3(unsigned((p.B + down - 1) / down), unsigned((groups + across - 1) / across)),
                dim3(unsigned(across), unsigned(down)));
  launch.stream = static_cast<cudaStream_t>(p.stream);
  return run(kernel, launch, p);
}

}  // namespace
}  // namespace FSQ_ISA

std::string cuda_cell_forward(const CudaCellParams& p, bool& wide) {
  using namespace FSQ_ISA;
  return for_element(p.dtype, [&](auto e) {
    typedef decltype(e) E;
    constexpr int N = kWideForward<E>;
    wide = fits_wide<E, N>(p);
    return for_cell(p.cell, [&](auto c) {
      constexpr Cell C = decltype(c)::value;
      return wide ? launch("cell_forward", &cell_forward<C, E, N>, p, N)
                  : launch("cell_forward", &cell_forward<C, E, 1>, p, 1);
    });
  });
}

std::string cuda_cell_backward(const CudaCellGradParams& p, bool& wide) {
  using namespace FSQ_ISA;
  return for_element(p.dtype, [&](auto e) {
    typedef decltype(e) E;
    constexpr int N = kWideBackward<E>;
    wide = fits_wide<E, N>(p);
    return for_cell(p.cell, [&](auto c) {
      constexpr Cell C = decltype(c)::value;
      return wide ? launch("cell_backward", &cell_backward<C, E, N>, p, N)
                  : launch("cell_backward", &cell_backward<C, E, 1>, p, 1);
    });
  });
}

}  // namespace fusedseq
