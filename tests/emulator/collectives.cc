// Collectives of a warp: every lane of the mask brings a request, the last one to come answers them all.
#include <algorithm>

#include "machine.h"

namespace fusedseq {
namespace emulator {

namespace {

constexpr uint32_t kAll = 0xffffffffu;

struct ShuffleRequest {
  uint64_t value, answer;
  Shuffle kind;
  int operand, width;
};

void answer_shuffles(void** requests, uint32_t mask) {
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    auto* request = static_cast<ShuffleRequest*>(requests[lane]);
    if (!request) continue;
    const int first = lane / request->width * request->width, last = first + request->width - 1;
    int source = lane;
    switch (request->kind) {
      case Shuffle::index:
        source = first + (request->operand & (request->width - 1));
        break;
      case Shuffle::up:
        source = lane - request->operand;
        break;
      case Shuffle::down:
        source = lane + request->operand;
        break;
      case Shuffle::exclusive_or:
        source = lane ^ request->operand;
        break;
    }
    if (source < first || source > last) source = lane;
    // A lane outside the mask has no value to give.
    request->answer =
        mask >> source & 1 ? static_cast<ShuffleRequest*>(requests[source])->value : 0x7fff7fff7fff7fffull;
  }
}

struct BallotRequest {
  bool predicate;
  uint32_t answer;
};

void answer_ballots(void** requests, uint32_t) {
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    if (requests[lane] && static_cast<BallotRequest*>(requests[lane])->predicate) votes |= 1u << lane;
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    if (requests[lane]) static_cast<BallotRequest*>(requests[lane])->answer = votes;
}

struct MmaRequest {
  Product product;
  float* d;
  const uint32_t *a, *b;
};

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

float half_of(Product product, uint32_t packed, int which) {
  const uint32_t bits = which ? packed >> 16 : packed & 0xffffu;
  return product == Product::bf16 ? from_bits(bits << 16) : half_to_float(bits);
}

// PTX ISA 9.7.14.5: which elements of the matrices a lane holds.
void answer_mma(void** requests, uint32_t) {
  float a[16][16], b[16][8];
  const Product product = static_cast<MmaRequest*>(requests[0])->product;
  const int depth = product == Product::tf32 ? 8 : 16;
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    const auto& request = *static_cast<MmaRequest*>(requests[lane]);
    const int g = lane / 4, t = lane % 4;
    if (product == Product::tf32) {
      constexpr uint32_t kept = 0xffffe000u;  // the tensor core ignores the lowest 13 bits
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = from_bits(request.a[i] & kept);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = from_bits(request.b[i] & kept);
    } else {
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) a[g + 8 * (i & 1)][2 * t + j + 8 * (i >> 1)] = half_of(product, request.a[i], j);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) b[2 * t + j + 8 * i][g] = half_of(product, request.b[i], j);
    }
  }
  float d[16][8];
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    std::copy(sums, sums + 8, d[row]);
  }
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    float* sums = static_cast<MmaRequest*>(requests[lane])->d;
    for (int i = 0; i < 4; ++i) sums[i] += d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
  }
}

struct LdmatrixRequest {
  uint32_t* registers;
  int matrices;
  bool transposed;
  Thread* thread;
  Target row;
};

void answer_ldmatrix(void** requests, uint32_t) {
  const auto& any = *static_cast<LdmatrixRequest*>(requests[0]);
  for (int matrix = 0; matrix < any.matrices; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto& request = *static_cast<LdmatrixRequest*>(requests[8 * matrix + row]);
      note_shared(*request.thread, request.row.block, request.row.offset, 16, false);
      memcpy(values[row], request.row.data(), 16);
    }
    for (int lane = 0; lane < int(kWarpSize); ++lane) {
      const auto& request = *static_cast<LdmatrixRequest*>(requests[lane]);
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = request.transposed ? values[2 * t][g] : values[g][2 * t];
      const uint32_t high = request.transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
      request.registers[matrix] = low | high << 16;
    }
  }
}

}  // namespace

float half_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

void meet(const char* kind, uint32_t mask, void* request, void (*complete)(void** requests, uint32_t mask)) {
  Thread* me = self();
  Warp& warp = *me->warp;
  const uint32_t bit = 1u << me->lane;
  if (!(mask & bit)) fail("%s with mask 0x%08x, in which the calling lane %d is missing", kind, mask, me->lane);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1 && (!warp.lanes[lane] || warp.lanes[lane]->state == State::exited))
      fail("%s with mask 0x%08x waits for lane %u, which %s", kind, mask, lane,
           warp.lanes[lane] ? "has exited" : "does not exist");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.mask == mask && !strcmp(other.kind, kind))
      meeting = &other;
    else if (other.mask & bit && mask & other.arrived)
      fail(
          "lanes of a warp meet in different collectives: this one in %s with mask 0x%08x, lanes 0x%08x in %s with "
          "mask "
          "0x%08x",
          kind, mask, other.arrived, other.kind, other.mask);
  }
  if (!meeting) {
    warp.meetings.push_back({kind, mask, 0, {}});
    meeting = &warp.meetings.back();
  }
  meeting->arrived |= bit;
  meeting->requests[me->lane] = request;
  if (meeting->arrived != mask) {
    wait(kind);
    return;
  }
  complete(meeting->requests, mask);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) wake(warp.lanes[lane]);
  *meeting = warp.meetings.back();
  warp.meetings.pop_back();
  progress();
  if (chance(2)) yield_ready();
}

uint64_t shuffle(const char* call, uint32_t mask, uint64_t value, Shuffle kind, int operand, int width) {
  if (width < 1 || width > int(kWarpSize) || (width & (width - 1)))
    fail("%s: width %d; must be a power of 2 up to 32", call, width);
  ShuffleRequest request = {value, 0, kind, operand, width};
  meet(call, mask, &request, answer_shuffles);
  return request.answer;
}

uint32_t ballot(const char* call, uint32_t mask, bool predicate) {
  BallotRequest request = {predicate, 0};
  meet(call, mask, &request, answer_ballots);
  return request.answer;
}

uint32_t active_lanes() {
  uint32_t lanes = 0;
  for (uint32_t lane = 0; lane < kWarpSize; ++lane)
    if (self()->warp->lanes[lane] && self()->warp->lanes[lane]->state != State::exited) lanes |= 1u << lane;
  return lanes;
}

void mma(Product product, float* d, const uint32_t* a, const uint32_t* b) {
  MmaRequest request = {product, d, a, b};
  const char* call = product == Product::bf16  ? "mma_m16n8k16<bf16>"
                     : product == Product::f16 ? "mma_m16n8k16<f16>"
                                               : "mma_m16n8k8_tf32";
  meet(call, kAll, &request, answer_mma);
}

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address) {
  static const char* const names[2][5] = {{"", "ldmatrix<1>", "ldmatrix<2>", "", "ldmatrix<4>"},
                                          {"", "ldmatrix<1, trans>", "ldmatrix<2, trans>", "", "ldmatrix<4, trans>"}};
  const char* call = names[transposed][matrices];
  Thread* me = self();
  LdmatrixRequest request = {registers, matrices, transposed, me, {me->block, 0}};
  if (me->lane < 8 * matrices) {
    request.row = resolve(address, 16, 16, call);
    if (request.row.block != me->block) fail("%s: the row lies in another block", call);
  }
  meet(call, kAll, &request, answer_ldmatrix);
}

}  // namespace emulator
}  // namespace fusedseq
