// mbarriers, and the asynchronous copies that report to them.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

constexpr int kMbarrierBytes = 8;
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that an mbarrier can count

Mbarrier* lookup(Block* block, uint32_t offset) {
  for (Mbarrier& barrier : block->mbarriers)
    if (barrier.offset == offset) return &barrier;
  return nullptr;
}

Mbarrier& find(uint32_t address, const char* call, Block** owner = nullptr) {
  const Target target = resolve(address, kMbarrierBytes, kMbarrierBytes, call);
  Mbarrier* barrier = lookup(target.block, target.offset);
  if (!barrier) fail("%s: no mbarrier has been initialised at byte %u of the shared memory", call, target.offset);
  const Thread* me = self();
  if (barrier->initialiser != me->id && !covers(me->seen.get(), barrier->initialiser, barrier->initialised))
    fail("%s: no barrier orders it after the mbarrier's initialisation by %s", call,
         describe(barrier->initialiser).c_str());
  if (owner) *owner = target.block;
  return *barrier;
}

void mark(Block* block, uint32_t offset, Record record) {
  for (int i = 0; i < kMbarrierBytes / 2; ++i) block->shadow[offset / 2 + uint32_t(i)] = {record, {}};
}

void complete_if_done(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.completed = barrier.arrived.take(barrier.completed);
  barrier.completed_cluster = barrier.arrived_cluster.take(barrier.completed_cluster);
  barrier.pending = barrier.count;
  ++barrier.phase;
  progress();
}

void check_bulk(uint32_t bytes, const char* call) {
  if (bytes % 16 || bytes == 0) fail("%s: %u bytes; must be a positive multiple of 16", call, bytes);
}

}  // namespace

void start_delivery(const Target& to, Delivery delivery, uint32_t mbarrier, const char* call) {
  Block* owner = nullptr;
  Mbarrier& barrier = find(mbarrier, call, &owner);
  if (owner != to.block) fail("%s: the mbarrier must lie in the block that receives the data", call);
  delivery.block = to.block;
  delivery.offset = to.offset;
  delivery.mbarrier = barrier.offset;
  note_agent(barrier.agent, to.block, to.offset, int(delivery.bytes), true);
  delivery.seen = self()->seen;
  delivery.issuer = self()->id;
  delivery.issued = machine.now++;
  machine.deliveries.push_back(std::move(delivery));
  progress();
  if (chance(4)) yield_ready();
}

void mbarrier_init(uint32_t address, uint32_t count) {
  const Target target = resolve(address, kMbarrierBytes, kMbarrierBytes, "mbarrier_init");
  Thread* me = self();
  if (target.block != me->block) fail("mbarrier_init: the mbarrier lies in another block");
  if (count < 1 || count > (1u << 20) - 1) fail("mbarrier_init: %u arrivals; must be 1 to 2^20 - 1", count);
  if (lookup(target.block, target.offset))
    fail("mbarrier_init: an mbarrier lives there already; mbarrier_inval ends it");
  note_shared(*me, target.block, target.offset, kMbarrierBytes, true);
  mark(target.block, target.offset, {kMbarrier, 0, false, 3});
  Mbarrier barrier = {};
  barrier.offset = target.offset;
  barrier.count = barrier.pending = count;
  barrier.initialiser = me->id;
  barrier.initialised = machine.now;
  barrier.agent = new_agent();
  target.block->mbarriers.push_back(barrier);
}

void mbarrier_inval(uint32_t address) {
  Block* owner = nullptr;
  Mbarrier& barrier = find(address, "mbarrier_inval", &owner);
  mark(owner, barrier.offset, {self()->id, machine.now, false, 3});
  barrier = owner->mbarriers.back();
  owner->mbarriers.pop_back();
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Arrival arrival) {
  const char* call = expected_bytes ? "mbarrier_arrive_expect_tx" : "mbarrier_arrive";
  const bool reads = arrival == Arrival::remote_reads;
  Block* owner = nullptr;
  Mbarrier& barrier = find(address, call, &owner);
  const Thread* me = self();
  const bool own = owner == me->block;
  if (!own && arrival == Arrival::own)
    fail("%s: the mbarrier lies in another block; %s_remote arrives there", call, call);
  if (barrier.pending == 0)
    fail("%s: over-arrival: all %u arrivals of phase %llu have come, only data is missing", call, barrier.count,
         (unsigned long long)barrier.phase);
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBytes) fail("%s: more than 2^20 - 1 bytes expected in one phase", call);
  const Stamp stamp = machine.now++;
  if (!own) owner->remote[reads ? me->id | kArrival : me->id] = stamp;
  for (Publication* published : {&barrier.arrived, &barrier.arrived_cluster}) {
    if (reads && !own)
      published->add_reads(me->seen, me->id, stamp);
    else if (own || published == &barrier.arrived_cluster)
      published->add(me->seen, me->id, stamp);
  }
  --barrier.pending;
  complete_if_done(barrier);
  progress();
  if (chance(4)) yield_ready();
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, bool cluster) {
  const char* call = cluster ? "mbarrier_try_wait_cluster" : "mbarrier_try_wait";
  if (parity > 1) fail("%s: parity %u; must be 0 or 1", call, parity);
  Block* owner = nullptr;
  find(address, call, &owner);
  if (owner != self()->block) fail("%s: the mbarrier lies in another block", call);
  yield_polling(call);
  Mbarrier& barrier = find(address, call);
  if ((barrier.phase & 1) == parity) return false;
  acquire(cluster ? barrier.completed_cluster : barrier.completed);
  return true;
}

void fence_mbarrier_init() { self()->fenced = release(); }

void fence_proxy_async() { self()->proxy_fence = ++machine.now; }

void st_async(uint32_t address, const void* value, int bytes, uint32_t mbarrier) {
  if (machine.cluster_size < 2) fail("st_async: a cluster of one block has no such stores");
  const Target to = resolve(address, bytes, bytes, "st_async");
  Delivery delivery = {};
  delivery.bytes = uint32_t(bytes);
  const auto* data = static_cast<const unsigned char*>(value);
  delivery.data.assign(data, data + bytes);
  delivery.tells_reads = true;
  start_delivery(to, std::move(delivery), mbarrier, "st_async");
}

void bulk_to_remote(uint32_t address, uint32_t from, uint32_t bytes, uint32_t mbarrier) {
  const char* call = "cp_async_bulk_to_remote";
  check_bulk(bytes, call);
  const Target to = resolve(address, int(bytes), 16, call), source = resolve(from, int(bytes), 16, call);
  if (source.block != self()->block) fail("%s: the source lies in another block", call);
  check_proxy(source.block, source.offset, bytes, call);
  check_proxy(to.block, to.offset, bytes, call);
  Delivery delivery = {};
  delivery.bytes = bytes;
  delivery.from = source.block;
  note_agent(find(mbarrier, call).agent, source.block, source.offset, int(bytes), false);
  const auto* data = reinterpret_cast<const unsigned char*>(source.data());
  if (chance(2))
    delivery.data.assign(data, data + bytes);
  else
    delivery.source = data;
  start_delivery(to, std::move(delivery), mbarrier, call);
}

void bulk_to_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t mbarrier) {
  const char* call = "cp_async_bulk_to_shared";
  check_bulk(bytes, call);
  if (reinterpret_cast<uintptr_t>(from) % 16)
    fail("%s misaligned: the source must lie at a multiple of 16 bytes", call);
  const Target to = resolve(address, int(bytes), 16, call);
  check_proxy(to.block, to.offset, bytes, call);
  Delivery delivery = {};
  delivery.bytes = bytes;
  const auto* data = static_cast<const unsigned char*>(from);
  if (chance(2))
    delivery.data.assign(data, data + bytes);
  else
    delivery.source = data;
  start_delivery(to, std::move(delivery), mbarrier, call);
}

void deliver_one() {
  const size_t at = random_below(uint32_t(machine.deliveries.size()));
  Delivery delivery = std::move(machine.deliveries[at]);
  machine.deliveries[at] = std::move(machine.deliveries.back());
  machine.deliveries.pop_back();
  Block* block = delivery.block;
  Mbarrier* barrier = lookup(block, delivery.mbarrier);
  if (!barrier) {
    machine.error = "an asynchronous copy finds its mbarrier invalidated";
    return;
  }
  if (delivery.gather && delivery.data.empty()) {
    delivery.data.resize(delivery.bytes);
    delivery.gather(delivery.data.data());
  }
  const unsigned char* data =
      delivery.data.empty() ? static_cast<const unsigned char*>(delivery.source) : delivery.data.data();
  Access access = {barrier->agent, machine.now, delivery.seen.get(), true, random_below(2)};
  access.issuer = delivery.issuer;
  access.issued = delivery.issued;
  if (const Record* race = note(block->shadow.data(), delivery.offset, int(delivery.bytes), access)) {
    machine.error = format(
        "race: an asynchronous copy writes bytes %u to %u of the shared memory of block (%u,%u,%u) "
        "while %s accesses them",
        delivery.offset, delivery.offset + delivery.bytes - 1, block->index.x, block->index.y, block->index.z,
        describe(race->id).c_str());
    return;
  }
  memcpy(block->shared + delivery.offset, data, delivery.bytes);
  for (Publication* published : {&barrier->arrived, &barrier->arrived_cluster}) {
    published->add(barrier->agent, machine.now);
    if (delivery.tells_reads) published->add_reads(delivery.seen, delivery.issuer, delivery.issued);
  }
  if (delivery.from) delivery.from->sent[barrier->agent] = {machine.now, delivery.issuer, block};
  block->remote[barrier->agent] = machine.now++;
  barrier->bytes -= delivery.bytes;
  complete_if_done(*barrier);
  progress();
}

}  // namespace emulator
}  // namespace fusedseq
