// Warpgroups: wgmma, whose products run beside the threads, and the registers that setmaxnreg moves between warpgroups.
//
// A product is computed when the last thread of the warpgroup has issued it. Until the wait its sums are kept here and
// the registers that they belong to are poisoned; what it read from shared memory is noted for the tensor cores of each
// warp, whose clock the wait hands to the warp.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kRows = 64, kTerms = 16, kChunk = 8;  // of halves

Warpgroup& warpgroup_of(const Thread& thread) {
  return thread.block->warpgroups[size_t(thread.linear) / kWarpgroupSize];
}

bool within(const void* data, size_t bytes, const void* range, size_t range_bytes) {
  const auto *at = static_cast<const char*>(data), *from = static_cast<const char*>(range);
  return at >= from && at + bytes <= from + range_bytes;
}

bool overlap(const void* data, size_t bytes, const void* range, size_t range_bytes) {
  const auto *at = static_cast<const char*>(data), *from = static_cast<const char*>(range);
  return at < from + range_bytes && from < at + bytes;
}

// Registers that are about to be used must be as a wgmma_fence since their last return has found them.
void check_fenced(const Products& mine, const void* data, size_t bytes, const char* what) {
  uint64_t returned = 0;
  for (const Products::Returned& one : mine.returned)
    if (overlap(data, bytes, one.data, one.bytes)) returned = std::max(returned, one.fence);
  for (const Products::Fenced& one : mine.fenced) {
    if (!within(data, bytes, one.data, one.was.size()) || one.fence <= returned) continue;
    if (memcmp(data, one.was.data() + (static_cast<const char*>(data) - one.data), bytes))
      fail("wgmma: the registers of %s were written after the wgmma_fence that named them", what);
    return;
  }
  fail("wgmma: no wgmma_fence has named the registers of %s since the thread could last access them", what);
}

bool poisoned(const Products::Flight& flight) {
  return std::all_of(flight.d, flight.d + flight.sums.size(), [](const float& value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits == kPoison;
  });
}

Products::Flight& take_accumulators(Products& mine, float* d, size_t count) {
  for (auto& flight : mine.flights) {
    if (flight->d == d && flight->sums.size() == count) {
      if (!poisoned(*flight)) fail("wgmma: accumulators were written while a wgmma that adds to them is in flight");
      return *flight;
    }
    if (overlap(d, count * 4, flight->d, flight->sums.size() * 4))
      fail("wgmma: its %zu accumulators overlap %zu of a wgmma of another shape in flight", count, flight->sums.size());
  }
  check_fenced(mine, d, count * 4, "the accumulators");
  mine.flights.emplace_back(new Products::Flight{d, std::vector<float>(d, d + count), 0});
  for (size_t i = 0; i < count; ++i) memcpy(d + i, &kPoison, 4);
  return *mine.flights.back();
}

struct Request {
  const Thread* thread;
  WgmmaShape shape;
  bool accumulate;
  uint64_t a_descriptor, b_descriptor;
  const uint32_t* a;
  float* sums;
};

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Where chunks lie, see csrc/cuda/matrix.h.
struct Operand {
  uint32_t start, leading, stride, width;  // width of the swizzle, or 0
  bool mn_major;

  Operand(uint64_t descriptor, bool mn_major) : mn_major(mn_major) {
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fffu) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    const uint32_t swizzle = uint32_t(descriptor >> 62);
    width = swizzle ? 256u >> swizzle : 0;
    if (descriptor >> 49 & 7) fail("wgmma: a matrix descriptor with a base offset, which is not emulated");
    if (descriptor & 0x3ff1c000c000c000ull)
      fail("wgmma: 0x%016llx is no matrix descriptor", (unsigned long long)descriptor);
  }

  // Chunk c of line l: c counts chunks of terms and l rows or columns; or c chunks of those and l terms.
  uint32_t address(uint32_t l, uint32_t c) const {
    if (!width) return start + l % 8 * 16 + (mn_major ? l / 8 * leading + c * stride : l / 8 * stride + c * leading);
    const uint32_t chunks = width / 16, across = mn_major ? c / chunks * leading : c / chunks * width;
    const uint32_t linear = start + l % 8 * width + l / 8 * stride + across + c % chunks * 16;
    return linear ^ (linear >> 7 & (chunks - 1)) << 4;
  }

  // values[line][element], of `lines` rows or columns with 16 terms or of 16 terms with `lines` elements, read by the
  // tensor cores of these warps, each on behalf of one thread.
  void read(uint16_t* values, int outer, const Thread* const* readers, int warps) const {
    const int lines = mn_major ? kTerms : outer, chunks = (mn_major ? outer : kTerms) / kChunk;
    for (int l = 0; l < lines; ++l)
      for (int c = 0; c < chunks; ++c) {
        const Target at = resolve(address(uint32_t(l), uint32_t(c)), 16, 16, "wgmma");
        check_proxy(at.block, at.offset, 16, "wgmma");
        for (int w = 0; w < warps; ++w)
          note_agent(tensor_core(*readers[w]), *readers[w], at.block, at.offset, 16, false);
        uint16_t chunk[kChunk];
        memcpy(chunk, at.data(), 16);
        for (int i = 0; i < kChunk; ++i) {
          const int line = mn_major ? c * kChunk + i : l, term = mn_major ? l : c * kChunk + i;
          values[line * kTerms + term] = chunk[i];
        }
      }
  }
};

float widen(Product product, uint32_t bits) {
  if (product == Product::bf16) return from_bits(bits << 16);
  return half_to_float(bits);
}

void check_uniform(void** requests) {
  const auto& first = *static_cast<const Request*>(requests[0]);
  for (int i = 1; i < kWarpgroupSize; ++i) {
    const auto& other = *static_cast<const Request*>(requests[i]);
    const bool same = other.shape.product == first.shape.product && other.shape.columns == first.shape.columns &&
                      other.shape.mn_major_a == first.shape.mn_major_a &&
                      other.shape.mn_major_b == first.shape.mn_major_b && other.accumulate == first.accumulate &&
                      other.a_descriptor == first.a_descriptor && other.b_descriptor == first.b_descriptor &&
                      !other.a == !first.a;
    if (!same)
      fail("wgmma: %s and %s differ in shape, descriptors or `accumulate`", describe(*first.thread).c_str(),
           describe(*other.thread).c_str());
  }
}

// PTX ISA 9.7.15.5.1.1: which elements of the matrices a thread holds.
void multiply(void** requests) {
  check_uniform(requests);
  const auto request = [&](int thread) -> const Request& { return *static_cast<const Request*>(requests[thread]); };
  const Request& any = request(0);
  const int columns = any.shape.columns;
  const Thread* readers[4];
  for (int w = 0; w < 4; ++w) readers[w] = request(w * int(kWarpSize) + int(random_below(kWarpSize))).thread;
  std::vector<uint16_t> a(kRows * kTerms), b(size_t(columns) * kTerms);
  Operand(any.b_descriptor, any.shape.mn_major_b).read(b.data(), columns, readers, 4);
  if (!any.a) {
    // Each warp is taken to read all of A: which rows it does read is not said.
    Operand(any.a_descriptor, any.shape.mn_major_a).read(a.data(), kRows, readers, 4);
  } else {
    for (int thread = 0; thread < kWarpgroupSize; ++thread)
      for (int i = 0; i < 8; ++i) {
        const int lane = thread % 32, row = thread / 32 * 16 + lane / 4 + (i / 2 & 1) * 8;
        const int term = lane % 4 * 2 + (i & 1) + i / 4 * 8;
        a[size_t(row * kTerms + term)] = uint16_t(request(thread).a[i / 2] >> (i & 1) * 16);
      }
  }
  ++machine.now;
  std::vector<float> wide_b(b.size());  // [term][column]
  for (int j = 0; j < columns; ++j)
    for (int k = 0; k < kTerms; ++k)
      wide_b[size_t(k * columns + j)] = widen(any.shape.product, b[size_t(j * kTerms + k)]);
  std::vector<float> row(static_cast<size_t>(columns));
  for (int r = 0; r < kRows; ++r) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (int k = 0; k < kTerms; ++k) {
      const float left = widen(any.shape.product, a[size_t(r * kTerms + k)]);
      const float* right = wide_b.data() + k * columns;
      for (int j = 0; j < columns; ++j) row[size_t(j)] += left * right[j];
    }
    for (int t = 0; t < 4; ++t) {
      const Request& owner = request(r / 16 * 32 + r % 8 * 4 + t);
      for (int j = 0; j < columns / 8; ++j)
        for (int i = 0; i < 2; ++i) {
          float& sum = owner.sums[4 * j + r % 16 / 8 * 2 + i];
          sum = (any.accumulate ? sum : 0.0f) + row[size_t(8 * j + 2 * t + i)];
        }
    }
  }
}

}  // namespace

void meet_warpgroup(const char* kind, void* request, void (*complete)(void** requests)) {
  Thread* me = self();
  Block* block = me->block;
  Warpgroup& group = warpgroup_of(*me);
  const int first = me->linear / kWarpgroupSize * kWarpgroupSize;
  if (first + kWarpgroupSize > machine.threads_per_block)
    fail("%s: the warpgroup from thread %d on has no 128 threads", kind, first);
  for (int i = first; i < first + kWarpgroupSize; ++i)
    if (block->threads[size_t(i)].state == State::exited)
      fail("%s waits for thread %d of its warpgroup, which has exited", kind, i);
  if (group.arrived && strcmp(group.kind, kind))
    fail("threads of a warpgroup do different things: this one %s, %d others %s", kind, group.arrived, group.kind);
  group.kind = kind;
  group.requests[me->linear - first] = request;
  if (++group.arrived < kWarpgroupSize) {
    wait(kind);
    return;
  }
  complete(group.requests);
  group.arrived = 0;
  for (int i = first; i < first + kWarpgroupSize; ++i) wake(&block->threads[size_t(i)]);
  progress();
  if (chance(2)) yield_ready();
}

void wgmma_fence(const Registers* named, int arrays) {
  Products& mine = self()->products;
  meet("wgmma_fence", kAll, nullptr, [](void**, uint32_t) {});
  ++mine.fences;
  for (int i = 0; i < arrays; ++i) {
    const char* data = static_cast<const char*>(named[i].data);
    const size_t bytes = size_t(named[i].count) * 4;
    for (size_t j = mine.fenced.size(); j-- > 0;)
      if (overlap(data, bytes, mine.fenced[j].data, mine.fenced[j].was.size()))
        mine.fenced.erase(mine.fenced.begin() + long(j));
    mine.fenced.push_back({data, std::vector<char>(data, data + bytes), mine.fences});
  }
}

void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool accumulate) {
  Thread* me = self();
  Products& mine = me->products;
  if (a) check_fenced(mine, a, 16, "A");
  Products::Flight& flight = take_accumulators(mine, d, size_t(shape.columns) / 2);
  flight.last = ++mine.issued;
  if (a) mine.operands.push_back({a, {a[0], a[1], a[2], a[3]}, mine.issued});
  Request request = {me, shape, accumulate, a_descriptor, b_descriptor, a, flight.sums.data()};
  meet_warpgroup("wgmma", &request, multiply);
}

void wgmma_commit() {
  Thread* me = self();
  meet("wgmma_commit", kAll, me, [](void** lanes, uint32_t) {
    const Thread& any = *static_cast<Thread*>(lanes[0]);
    const ClockRef clock = with_thread(ClockRef(), tensor_core(any), machine.now++);
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      Products& theirs = static_cast<Thread*>(lanes[lane])->products;
      theirs.committed = theirs.issued;
      theirs.groups.push_back({theirs.issued, clock});
    }
  });
}

void wgmma_wait(int pending, const Registers* named, int arrays) {
  Thread* me = self();
  Products& mine = me->products;
  meet("wgmma_wait", kAll, nullptr, [](void**, uint32_t) {});
  const size_t done = mine.groups.size() - std::min(mine.groups.size(), size_t(pending));
  const uint64_t last = done ? mine.groups[done - 1].last : 0;
  if (done) acquire(mine.groups[done - 1].clock);
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + long(done));
  const auto is_named = [&](const Products::Flight& flight) {
    return std::any_of(named, named + arrays, [&](const Registers& one) {
      return within(flight.d, flight.sums.size() * 4, one.data, size_t(one.count) * 4);
    });
  };
  for (size_t i = mine.operands.size(); i-- > 0;) {
    const Products::Operand operand = mine.operands[i];
    if (memcmp(operand.a, operand.was, sizeof operand.was))
      fail("wgmma_wait: the registers of A of a wgmma were written before the wait for it");
    if (operand.last <= last) mine.operands.erase(mine.operands.begin() + long(i));
  }
  for (size_t i = mine.flights.size(); i-- > 0;) {
    const Products::Flight& flight = *mine.flights[i];
    if (!poisoned(flight)) fail("wgmma_wait: accumulators were written while a wgmma that adds to them was in flight");
    const bool returns = flight.last <= last;
    if (is_named(flight) && !returns)
      fail("wgmma_wait<%d> names accumulators of a wgmma that %s", pending,
           flight.last > mine.committed ? "is in no group: wgmma_commit is missing" : "is still in flight then");
    if (!returns) continue;
    if (!is_named(flight)) fail("wgmma_wait<%d> ends a wgmma whose accumulators it does not name", pending);
    memcpy(flight.d, flight.sums.data(), flight.sums.size() * 4);
    const auto* data = reinterpret_cast<const char*>(flight.d);
    const size_t bytes = flight.sums.size() * 4;
    mine.returned.erase(std::remove_if(mine.returned.begin(), mine.returned.end(),
                                       [&](const auto& old) { return within(old.data, old.bytes, data, bytes); }),
                        mine.returned.end());
    mine.returned.push_back({data, bytes, mine.fences});
    mine.flights.erase(mine.flights.begin() + long(i));
  }
}

void setmaxnreg(int registers, bool increase) {
  const char* call = increase ? "setmaxnreg_inc" : "setmaxnreg_dec";
  int request = registers;
  meet_warpgroup(call, &request, [](void** requests) {
    const int first = *static_cast<const int*>(requests[0]);
    for (int i = 1; i < kWarpgroupSize; ++i)
      if (*static_cast<const int*>(requests[i]) != first)
        fail("setmaxnreg: threads of a warpgroup ask for %d and %d registers", first,
             *static_cast<const int*>(requests[i]));
  });
  Thread* me = self();
  Block* block = me->block;
  Warpgroup& group = warpgroup_of(*me);
  // The first thread of the group to go on moves the registers, the others find them moved.
  if (increase ? group.registers > registers : group.registers < registers)
    fail("%s: %d registers, but the threads have %d", call, registers, group.registers);
  while (group.registers != registers) {
    const int more = (registers - group.registers) * kWarpgroupSize;
    if (more <= block->free_registers) {
      block->free_registers -= more;
      group.registers = registers;
      progress();
    } else {
      yield_polling(call);
    }
  }
}

const char* unfinished(const Thread& thread) {
  if (!thread.products.flights.empty()) return "a wgmma of it is in flight: wgmma_wait is missing";
  if (!thread.open_stores.empty() || !thread.store_groups.empty())
    return "a tensor_store of it may still read shared memory: bulk_wait_read is missing";
  return nullptr;
}

}  // namespace emulator
}  // namespace fusedseq
