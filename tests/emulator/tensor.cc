// Tensor maps and the copies that go by them.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

constexpr uint64_t kMagic = 0x70616d2d71736600ull;
constexpr int kElement = 2;

TensorBox recorded(const void* map, int rank, const char* call) {
  TensorBox box;
  static_assert(sizeof box <= 128, "a tensor map has 128 bytes");
  memcpy(&box, map, sizeof box);
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("%s: the tensor map must lie at a multiple of 64 bytes", call);
  if (box.magic != kMagic) fail("%s: this is no encoded tensor map", call);
  if (box.rank != rank) fail("%s: %d coordinates for a tensor map of %d dimensions", call, rank, box.rank);
  return box;
}

uint32_t elements(const TensorBox& box) {
  uint32_t count = 1;
  for (int i = 0; i < box.rank; ++i) count *= box.box[i];
  return count;
}

// visit(position in the box, address in global memory or null outside of the tensor) for each element of the box.
template <class Visit>
void each_element(const TensorBox& box, const int (&at)[5], Visit visit) {
  const uint32_t count = elements(box);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t rest = i;
    bool inside = true;
    uint64_t address = box.data;
    for (int d = 0; d < box.rank; ++d) {
      const int64_t x = int64_t(at[d]) + rest % box.box[d];
      rest /= box.box[d];
      inside &= x >= 0 && x <= int64_t(box.last[d]);
      address += uint64_t(x) * box.stride[d];
    }
    visit(i, inside ? reinterpret_cast<char*>(address) : nullptr);
  }
}

// Where element i of the box lies, from `base` on in shared memory: the swizzle goes by the address.
uint32_t place(const TensorBox& box, uint32_t base, uint32_t i) {
  const uint32_t address = base + i * kElement, mask = box.swizzle_bytes ? box.swizzle_bytes / 16u - 1 : 0;
  return (address ^ (address >> 7 & mask) << 4) - base;
}

Target shared_box(const TensorBox& box, uint32_t shared, const char* call) {
  const Target target = resolve(shared, int(elements(box)) * kElement, 128, call);
  if (box.swizzle_bytes && target.offset % (8u * box.swizzle_bytes))
    fail("%s: a box with a swizzle of %d bytes begins at byte %u of shared memory, no multiple of %d", call,
         box.swizzle_bytes, target.offset, 8 * box.swizzle_bytes);
  return target;
}

struct Corner {
  int at[5];
  Corner(const int* from, int rank) : at{} { std::copy(from, from + rank, at); }
};

}  // namespace

void record(uint64_t (&opaque)[16], const TensorBox& box) {
  TensorBox named = box;
  named.magic = kMagic;
  memset(opaque, 0, sizeof opaque);
  memcpy(opaque, &named, sizeof named);
}

void tensor_load(uint32_t to, const void* map, const int* at, int rank, uint32_t mbarrier) {
  const char* call = "tensor_load";
  const TensorBox box = recorded(map, rank, call);
  const Target target = shared_box(box, to, call);
  const Corner corner(at, rank);
  Delivery delivery = {};
  delivery.bytes = elements(box) * kElement;
  check_proxy(target.block, target.offset, delivery.bytes, call);
  const uint32_t base = target.offset;
  delivery.gather = [box, corner, base](unsigned char* data) {
    each_element(box, corner.at, [&](uint32_t i, const char* from) {
      unsigned char* element = data + place(box, base, i);
      if (from)
        memcpy(element, from, kElement);
      else
        memset(element, 0, kElement);
    });
  };
  if (chance(2)) {
    delivery.data.resize(delivery.bytes);
    delivery.gather(delivery.data.data());
  }
  start_delivery(target, std::move(delivery), mbarrier, call);
}

void tensor_store(const void* map, const int* at, int rank, uint32_t from) {
  const char* call = "tensor_store";
  Thread* me = self();
  const TensorBox box = recorded(map, rank, call);
  const Target source = shared_box(box, from, call);
  if (source.block != me->block) fail("%s: the source lies in another block", call);
  const uint32_t bytes = elements(box) * kElement, base = source.offset;
  check_proxy(source.block, base, bytes, call);
  if (me->store_agent == kNobody) me->store_agent = new_agent();
  note_agent(me->store_agent, source.block, base, int(bytes), false);
  ++machine.now;
  const Corner corner(at, rank);
  me->open_stores.push_back({base, bytes, [box, corner, base](const unsigned char* data) {
                               each_element(box, corner.at, [&](uint32_t i, char* to) {
                                 if (to) memcpy(to, data + place(box, base, i), kElement);
                               });
                             }});
}

void bulk_commit() {
  Thread* me = self();
  me->store_groups.push_back({std::move(me->open_stores), machine.now++});
  me->open_stores.clear();
}

// The data moves when it is waited for; that it may have been read before shows as a race of those who overwrite it.
void bulk_wait(int pending) {
  Thread* me = self();
  auto& groups = me->store_groups;
  const size_t done = groups.size() - std::min(groups.size(), size_t(pending));
  for (size_t i = 0; i < done; ++i) {
    for (const PendingStore& store : groups[i].stores)
      store.write(reinterpret_cast<const unsigned char*>(me->block->shared + store.offset));
    if (me->store_agent != kNobody) me->seen = with_thread(me->seen, me->store_agent, groups[i].stamp);
  }
  groups.erase(groups.begin(), groups.begin() + long(done));
  if (chance(8)) yield_ready();
}

}  // namespace emulator
}  // namespace fusedseq
