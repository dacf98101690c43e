// CUDA's execution model on one CPU thread, so that the kernels themselves run in the tests of
// machines without a GPU. Previous hop: the kernels of csrc/<op>/cuda.cu, compiled as C++ with this
// folder first on the include path. Next hop: emulator.cpp (fibers and barriers).
//
// Every CUDA thread is a fiber. Fibers run until a barrier or a warp collective; the order in which
// they run between two barriers is drawn anew each time, so a missing barrier shows as a wrong or
// varying result. A barrier that some thread never reaches is reported as a deadlock. Dynamic
// shared memory starts as NaN. Asynchronous copies happen when they are waited for, not before;
// those of the copy engine and warpgroup products at a moment drawn anew each time. What this
// cannot show: speed, memory ordering between blocks, alignment faults other than those asserted in
// ptx.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr std::size_t kSlotBytes = 32;

struct CopyGroup {
  struct Copy {
    void* shared;
    const void* global;
    int bytes;
    bool valid;
  };
  Copy copies[64];
  int count = 0;
};

unsigned char* dynamic_shared();

// All live threads of the block; returns how many passed a true predicate.
int block_barrier(bool predicate);

// A warp collective: leaves `bytes` of the caller's operand for the lanes of `mask`, waits for
// them, and returns the table of all 32 operands (kSlotBytes apart), valid until the caller's next
// collective.
const unsigned char* warp_exchange(unsigned mask, const void* operand, std::size_t bytes);
int lane();

// Ends the launch with a std::runtime_error; called by a kernel's instruction that finds itself
// misused.
[[noreturn]] void fail(const char* why);

// Shared memory by the 32-bit address that a kernel computes with; fails where bytes lie outside.
unsigned char* shared_pointer(std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment);
std::uint32_t shared_address(const void* p);
// A number that grows whenever the copy engine or a matrix store writes into the bytes' kilobytes.
unsigned long shared_version(std::uint32_t address, std::uint32_t bytes);
void shared_changed(std::uint32_t address, std::uint32_t bytes);
int thread();

void wait_until(
    const std::function<bool()>& ready);  // another fiber or the copy engine makes it so
void named_barrier(int id, int threads);
// The copy engine: does the work at some later moment. `leaving`: counted by the caller's bulk
// groups.
void later(bool leaving, const std::function<void()>& work);
void bulk_commit();
void bulk_wait(int still_pending);
// Plain writes to shared memory that the copy engine is to read need a fence of the writing thread.
void wrote_shared(std::uint32_t address, std::uint32_t bytes);
void fence_shared();
void demand_fenced();
// Warpgroup products: this thread's part is done between now and the wait for its group.
void product(const std::function<void()>& work);
void product_commit();
void product_wait(int still_pending);

void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_commit();
void copy_wait(int still_pending);

// Runs body once for every thread of every block, block after block. Throws std::runtime_error on a
// deadlock.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

template <class T>
T warp_read(const unsigned char* table, int source) {
  T value;
  std::memcpy(&value, table + static_cast<std::size_t>(source) * kSlotBytes, sizeof(T));
  return value;
}

}  // namespace emulator
