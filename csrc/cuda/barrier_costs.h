// What the synchronisation between the parts of a scan costs by itself: kernels that do nothing else, round after
// round, timed by their SM's clock. The scans' choice of tier rests on such figures (exchange_clocks).
#pragma once
#include <stdint.h>

#include <string>

#include "fusedseq.h"

namespace fusedseq {

enum class Barrier : int {
  block = 0,             // __syncthreads
  cluster = 1,           // the cluster's barrier, all threads
  cluster_exchange = 2,  // what tier `cluster` does in a step: a slice to every peer, by bulk copy and mbarrier
  flag = 3,              // release store by one CTA, acquire load by another, taking turns
  grid_exchange = 4,     // what tier `grid` does in a step: slices through global memory, a flag of each rank
  grid = 5,              // a barrier of all CTAs of a cooperative launch, by one counter
  warp_exchange_4 = 6,   // what a step of warps that go their own way does: 32 units of 4 rows to every peer, by
  warp_exchange_8 = 7,   // asynchronous stores of 16 bytes; of 8 rows. 256 threads
};

struct BarrierParams {
  Barrier kind;
  int ctas, threads, rounds;
  int units;         // of a rank in an exchange, of 16 rows and 2 bytes: the slice
  bool handed;       // a word goes from thread to thread, one hand a round, as far as the barrier orders it
  uint64_t* ns;      // [ctas] of all rounds together
  uint64_t* clocks;  // [ctas]
  uint32_t* word;    // [ctas] how often each CTA knows the word to have been handed on, 0 where nothing is
  void* workspace;   // barrier_workspace bytes, zeros, aligned to 256
  void* stream;
};

int64_t barrier_workspace(const BarrierParams& p);
// Errors are text, empty where all is well. Enqueues one launch, that of a barrier which the device has.
std::string barrier_rounds(const BarrierParams& p);

// Clocks that the choice of a tier assumes for what the parts of a group exchange in a step (tier `block`: two
// __syncthreads). Estimates, until they have been measured.
constexpr int exchange_clocks(CudaTier tier, int ranks) {
  return tier == CudaTier::block ? 250 : tier == CudaTier::cluster ? 750 + 55 * ranks : 2200 + 25 * ranks;
}
// Of warps that go their own way, before the bytes: not measured yet.
constexpr int kWarpExchangeClocks = 500;

}  // namespace fusedseq
