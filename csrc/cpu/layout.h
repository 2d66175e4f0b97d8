// Which rows are alive at a time step and where they lie.
//
// Inside a scan, rows are sorted by length, longest first: at time t the rows 0..alive(t) are live and the row (t, j)
// has the number offset(t) + j in dense buffers. That is PackedSequence's order, so packed input needs no copy, a
// padded batch with lengths costs a permutation, and a padded batch is the case where all lengths are T.
#pragma once
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace fusedseq {
namespace FSQ_ISA {

class Layout {
 public:
  int64_t T, B;
  bool packed;

  void place(Arena& arena, const ScanParams& p) {
    T = p.T;
    B = p.B;
    packed = p.batch_sizes != nullptr;
    user_row_ = arena.take<int64_t>(B);
    alive_ = arena.take<int64_t>(T + 1);
    offset_ = arena.take<int64_t>(T + 1);
    lengths_ = arena.take<int64_t>(B);
  }

  void fill(const ScanParams& p) {
    for (int64_t t = 0; t <= T; ++t) alive_[t] = p.batch_sizes && t < T ? p.batch_sizes[t] : 0;
    for (int64_t j = 0; j < B; ++j) user_row_[j] = j;
    if (p.lengths) {
      for (int64_t b = 0; b < B; ++b)
        if (p.lengths[b] > 0) ++alive_[p.lengths[b] - 1];
      for (int64_t t = T - 2; t >= 0; --t) alive_[t] += alive_[t + 1];
      // alive_[n - 1] rows have length >= n, so the rows of length n start where those of length n + 1 end.
      int64_t zero_at = T > 0 ? alive_[0] : 0;
      for (int64_t t = 0; t < T; ++t) offset_[t] = alive_[t + 1];
      for (int64_t b = 0; b < B; ++b) {
        const int64_t n = p.lengths[b];
        user_row_[n > 0 ? offset_[n - 1]++ : zero_at++] = b;
      }
    } else if (!p.batch_sizes) {
      for (int64_t t = 0; t < T; ++t) alive_[t] = B;
    }
    offset_[0] = 0;
    for (int64_t t = 0; t < T; ++t) offset_[t + 1] = offset_[t] + alive_[t];
    for (int64_t j = 0, t = T; j < B; ++j) {
      while (t > 0 && alive_[t - 1] <= j) --t;
      lengths_[j] = t;
    }
    uniform_ = !p.lengths && (T == 0 || alive_[T - 1] == B);
  }

  int64_t alive(int64_t t) const { return t >= 0 && t < T ? alive_[t] : 0; }
  int64_t offset(int64_t t) const { return offset_[t]; }
  int64_t total() const { return offset_[T]; }
  int64_t length(int64_t j) const { return lengths_[j]; }
  int64_t user_row(int64_t j) const { return user_row_[j]; }

  // Element offset of row (t, j) in a user tensor.
  int64_t at(const Rows& r, int64_t t, int64_t j) const {
    return packed ? (offset_[t] + j) * r.sb : t * r.st + user_row_[j] * r.sb;
  }
  // A mask at row (t, j); false for a step that the row does not take.
  bool flag(const Rows& r, int64_t t, int64_t j) const {
    return r.data && j < alive(t) && static_cast<const unsigned char*>(r.data)[at(r, t, j)];
  }
  // Calls f(t, j, k) for the rows k of `part`, counted from the first row of step t0, of the steps [t0, t1).
  template <class F>
  void for_rows(int64_t t0, int64_t t1, Range part, F f) const {
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t first = offset_[t] - offset_[t0];
      for (int64_t k = max64(first, part.begin); k < min64(first + alive_[t], part.end); ++k) f(t, k - first, k);
    }
  }

  // True if rows of all time steps lie at one distance from each other, `pitch`, in scan order.
  bool dense(const Rows& r) const { return packed || (uniform_ && (T <= 1 || B == 1 || r.st == B * r.sb)); }
  int64_t pitch(const Rows& r) const { return !packed && B == 1 ? r.st : r.sb; }

 private:
  int64_t *user_row_, *alive_, *offset_, *lengths_;
  bool uniform_;
};

// The part of a scan that one thread does: its group runs one direction at a time, its team a range of rows, itself a
// range of unit vectors. Teams never wait for each other within a time step.
struct Share {
  bool idle;
  int group, groups;    // direction d belongs to group d % groups
  int thread, threads;  // within the group
  int team, teams;      // row range
  int slice, slices;    // unit range; threads of a team
  Range rows, vectors;
};

// How a group of m threads divides `rows` x `vectors` (of `gates` gates, K long): cycles of one step, estimated.
FSQ_INLINE Share plan(int thread, int threads, int64_t directions, int64_t rows, int64_t vectors, int gates, int64_t K,
                      int64_t steps, bool rows_divisible, int vector_bytes) {
  Share s{};
  s.groups = int(min64(directions, threads));
  s.group = int(int64_t(thread) * s.groups / threads);
  while (int64_t(s.group) * threads / s.groups > thread) --s.group;
  while (int64_t(s.group + 1) * threads / s.groups <= thread) ++s.group;
  const Range mine = split(threads, s.group, s.groups);
  const int m = int(mine.size()), q = thread - int(mine.begin);
  int64_t best = -1;
  const int most_slices = int(max64(1, min64(m, vectors)));
  for (int slices = 1; slices <= most_slices; ++slices) {
    const int most_teams = rows_divisible ? int(max64(1, min64(m / slices, rows))) : 1;
    for (int teams = 1; teams <= most_teams; ++teams) {
      const int64_t r = (rows + teams - 1) / teams, v = (vectors + slices - 1) / slices;
      const int64_t tall = tile_rows(gates), tiles = (r + tall - 1) / tall;
      // Loading a vector of weights takes 2 cycles from L2 and 4 from L3, most of it hidden behind the products, but
      // less so the further away it is.
      const bool near = v * gates * K * vector_bytes <= 768 * 1024;
      const int64_t loads = tiles * gates;
      const int64_t per_k = max64(r * gates, loads * (near ? 2 : 4)) + r + loads * (near ? 0 : 2);
      int64_t cycles = (per_k * K + r * 100) * v;
      cycles += slices > 1 ? 700 : 0;                              // the barrier
      cycles += slices * teams > 1 ? 10000 / max64(steps, 1) : 0;  // waking the pool: 2,000 if it spins
      if (best < 0 || cycles < best) {
        best = cycles;
        s.slices = slices;
        s.teams = teams;
      }
    }
  }
  s.threads = s.slices * s.teams;
  s.thread = q;
  s.idle = q >= s.threads;
  s.team = q / s.slices;
  s.slice = q % s.slices;
  s.rows = split(rows, s.team, s.teams);
  s.vectors = split(vectors, s.slice, s.slices);
  return s;
}

}  // namespace FSQ_ISA
}  // namespace fusedseq
