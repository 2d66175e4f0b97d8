// What the stand-in headers ask of the emulator. Names follow the CUDA or PTX function that they serve.
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>

namespace fusedseq {
namespace emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// The built-in variables of the running thread.
struct ThreadView {
  Index3 index;
};
extern ThreadView* current;
const Index3& current_thread();
const Index3& current_block();
const Index3& block_size();
const Index3& grid_size();
int current_lane();

// Shared and exchanged memory: where the bytes of element i, `bytes` long, lie, once the access has been checked.
char* shared_base();
const void* shared_read(const void* data, int size, int i, int element, int bytes);
void* shared_write(void* data, int size, int i, int element, int bytes);
void* shared_atomic(void* data, int size, int i, int element);
uint32_t shared_window_address(const void* data, int size, int i, int element);
uint32_t shared_window_address(const void* pointer);
void check_sub(int size, int first, int count);
const void* global_read(const void* data, int64_t size, int64_t i, int element, int bytes);
void* global_write(void* data, int64_t size, int64_t i, int element, int bytes);

// Barriers of a block.
void sync_block();
// __syncthreads_and / _or / _count: how many threads of the block gave true.
int sync_block_count(bool predicate);
void barrier(int id, int threads, bool waits);
void sync_warp(uint32_t mask);

// Warp collectives: value of the lane chosen by `source`, of what every lane of the mask passed.
enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(const char* call, uint32_t mask, uint64_t value, Shuffle kind, int operand, int width);
uint32_t ballot(const char* call, uint32_t mask, bool predicate);
uint32_t active_lanes();
enum class Product { bf16, f16, tf32 };
void mma(Product product, float* d, const uint32_t* a, const uint32_t* b);
void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address);

// Asynchronous copies of a thread.
void cp_async(uint32_t address, const void* source, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending);

// mbarriers.
void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_inval(uint32_t address);
enum class Arrival { own, remote, remote_reads };
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Arrival arrival);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, bool cluster);
void fence_mbarrier_init();

// Clusters.
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(bool publishes);
void cluster_wait();
uint32_t mapa(uint32_t address, uint32_t rank);
void remote_read(void* value, uint32_t address, int bytes);
void remote_write(uint32_t address, const void* value, int bytes);
void st_async(uint32_t address, const void* value, int bytes, uint32_t mbarrier);
void bulk_to_remote(uint32_t to, uint32_t from, uint32_t bytes, uint32_t mbarrier);
void bulk_to_shared(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier);
void fence_proxy_async();

// Warpgroups. What is an array of registers elsewhere is a pointer and a number of 4-byte registers here.
struct Registers {
  void* data;
  int count;
};
struct WgmmaShape {
  Product product;
  int columns;
  bool mn_major_a, mn_major_b;
};
void wgmma_fence(const Registers* named, int arrays);
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending, const Registers* named, int arrays);
void setmaxnreg(int registers, bool increase);

// Tensor maps: what the 128 opaque bytes of one record.
struct TensorBox {
  uint64_t magic, data;
  uint32_t last[5];    // size - 1
  uint64_t stride[5];  // bytes
  uint16_t box[5];
  uint8_t rank, swizzle_bytes;
};
void record(uint64_t (&opaque)[16], const TensorBox& box);
void tensor_load(uint32_t to, const void* map, const int* at, int rank, uint32_t mbarrier);
void tensor_store(const void* map, const int* at, int rank, uint32_t from);
void bulk_commit();
void bulk_wait(int pending);

// Flags and atomics, called before the access itself, between which no other thread runs.
enum class Order { relaxed, acquire, release, acquire_release };
void check_flag(const void* address, int bytes, const char* call);
void flag_read(const void* address, Order order, const char* call);
void flag_write(const void* address, Order order);
void flag_update(const void* address, Order order);
// After an atomic: one that changed nothing may be a thread that spins.
void atomic_done(bool changed, const char* call);
void fence();

void nanosleep(uint32_t nanoseconds);
uint64_t clock_nanoseconds();
[[noreturn]] void trap(const char* call);

struct DeviceView {
  int capability = 0, sm_count = 0, shared_per_block = 0, shared_per_sm = 0, max_cluster = 0;
};
std::string query(DeviceView& device);

// Runs a kernel: body(arguments) in every thread. Returns the error's text, without the kernel's name, or "".
struct LaunchRequest {
  const char* name;
  std::string shape;
  Index3 grid, block;
  int shared, cluster;
  bool cooperative;
};
std::string launch(const LaunchRequest& request, void (*body)(void*), void* arguments);
std::string occupancy(int& blocks_per_sm, int& clusters, const LaunchRequest& request);

}  // namespace emulator
}  // namespace fusedseq
