// Kernels that misuse the machine, so that the tests can see the emulator notice.
// Previous hop: tests/cuda/test_emulator.py.
// Next hop: emulator.cpp.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/cuda/hopper.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/swizzle.h"

namespace magvit_fast {
namespace {

cudaLaunchConfig_t one_block(unsigned threads) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 4096;
  return config;
}

// Each thread hands its number to the next; right only with the barrier.
void rotate_kernel(int* out, bool with_barrier) {
  __shared__ int slots[64];
  const int thread = static_cast<int>(threadIdx.x);
  slots[thread] = -1;
  __syncthreads();
  slots[thread] = thread;
  if (with_barrier) __syncthreads();
  out[thread] = slots[(thread + 1) % 64];
}

void lonely_barrier_kernel() {
  if (threadIdx.x % 32 == 0) __syncwarp();
}

void read_early_kernel(const float* from, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(cuda::dynamic_shared());
  cuda::copy_async_16(shared, from, true);
  cuda::copy_async_commit();
  if (wait) cuda::copy_async_wait<0>();
  *out = shared[0];
}

// Rows of 64 bytes without a swizzle: rows 0, 2, 4, 6 of a matrix share their banks.
void conflict_kernel() {
  std::uint32_t fragment[4];
  cuda::load_matrix(fragment, cuda::dynamic_shared() + threadIdx.x % 8 * 64);
}

constexpr std::uint32_t kTile = 1024, kBarrier = 2048;  // addresses in shared memory

// Eight rows of 64 channels, and which of their bits stood first when they were read.
void read_box_kernel(cuda::TensorMap map, std::uint16_t* out, bool wait) {
  cuda::barrier_init(kBarrier, 1);
  cuda::barrier_arrive_expecting(kBarrier, 1024);
  cuda::copy_box_in(kTile, &map, kBarrier, 0, 0, 0, 0, 0);
  if (wait) cuda::barrier_wait(kBarrier, 0);
  std::memcpy(out, emulator::shared_pointer(kTile, 2, 2), 2);
  cuda::barrier_wait(kBarrier, 0);
}

// One byte more than comes.
void wait_forever_kernel(cuda::TensorMap map) {
  cuda::barrier_init(kBarrier, 1);
  cuda::barrier_arrive_expecting(kBarrier, 1025);
  cuda::copy_box_in(kTile, &map, kBarrier, 0, 0, 0, 0, 0);
  cuda::barrier_wait(kBarrier, 0);
}

// A warp writes rows of 16 bytes and sends them away.
void write_box_kernel(cuda::TensorMap map, bool fence) {
  const std::uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  cuda::store_matrix_transposed(kTile + threadIdx.x * 16, ones);
  if (fence) cuda::copy_engine_fence();
  __syncthreads();
  if (threadIdx.x != 0) return;
  cuda::copy_box_out(&map, kTile, 0, 0, 0, 0, 0);
  cuda::copy_out_commit();
  cuda::copy_out_wait();
}

// One product of transposed operands, 16 rows of 64 channels each: a box at kTile, a row of 128
// bytes or more further down, times itself.
void product_kernel(cuda::TensorMap map, float* out, std::uint32_t down) {
  cuda::barrier_init(kBarrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::barrier_arrive_expecting(kBarrier, 1024);
    cuda::copy_box_in(kTile, &map, kBarrier, 0, 0, 0, 0, 0);
  }
  cuda::barrier_wait(kBarrier, 0);
  float sums[32];
  const std::uint64_t eight_rows_twice =
      cuda::wgmma_descriptor_mn(kTile + down, 1024) & ~(std::uint64_t{0x3fff} << 32);
  cuda::product_begin();
  cuda::product_mn<__nv_bfloat16, 64>(sums, eight_rows_twice, eight_rows_twice, false);
  cuda::product_commit();
  cuda::product_wait<0>();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  for (int i = 0; i < 32; ++i)
    out[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

cuda::TensorMap one_box(const void* base) {
  return cuda::tensor_map(
      {base, {64, 8, 1, 1, 1}, {1, 64, 512, 512, 512}, {64, 8, 1, 1, 1}, DType::bf16}, "selftest");
}

}  // namespace

void bind_selftest(pybind11::module_& m) {
  m.def("selftest_rotate", [](bool with_barrier) {
    std::vector<int> out(64);
    const auto config = one_block(64);
    cudaLaunchKernelEx(&config, rotate_kernel, out.data(), with_barrier);
    return out;
  });
  m.def("selftest_deadlock", [] {
    const auto config = one_block(64);
    cudaLaunchKernelEx(&config, lonely_barrier_kernel);
  });
  m.def("selftest_copy", [](bool wait) {
    alignas(16) const float from[4] = {5.0f, 0.0f, 0.0f, 0.0f};
    float out = 0.0f;
    const auto config = one_block(1);
    cudaLaunchKernelEx(&config, read_early_kernel, from, &out, wait);
    return out;
  });
  m.def("selftest_read_box", [](bool wait) {
    alignas(16) std::uint16_t from[512] = {7};
    std::uint16_t out = 0;
    const auto config = one_block(1);
    cudaLaunchKernelEx(&config, read_box_kernel, one_box(from), &out, wait);
    return static_cast<int>(out);
  });
  m.def("selftest_wait_forever", [] {
    alignas(16) std::uint16_t from[512] = {};
    const auto config = one_block(1);
    cudaLaunchKernelEx(&config, wait_forever_kernel, one_box(from));
  });
  m.def("selftest_write_box", [](bool fence) {
    alignas(16) std::uint16_t to[512] = {};
    const auto config = one_block(32);
    cudaLaunchKernelEx(&config, write_box_kernel, one_box(to), fence);
    return static_cast<int>(to[0]);
  });
  m.def("selftest_product", [](const std::vector<std::uint16_t>& rows, std::uint32_t down) {
    alignas(16) std::uint16_t from[512];
    std::memcpy(from, rows.data(), sizeof(from));
    std::vector<float> out(64 * 64);
    auto config = one_block(128);
    cudaLaunchKernelEx(&config, product_kernel, one_box(from), out.data(), down);
    return out;
  });
  m.def("selftest_conflict", [] {
    const auto config = one_block(32);
    cudaLaunchKernelEx(&config, conflict_kernel);
  });
  m.def("selftest_too_many_threads", [] {
    const auto config = one_block(2048);
    return cudaLaunchKernelEx(&config, conflict_kernel);
  });
}

}  // namespace magvit_fast
