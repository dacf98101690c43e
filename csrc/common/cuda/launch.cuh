// What every CUDA launch needs: the right device, the right stream, and an error that names the op.
// Previous hop: cuda.cu of every op.
// Next hop: the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/exec_context.h"
#include "common/shape.h"

namespace magvit_fast::cuda {

inline cudaStream_t stream_of(const ExecContext& ctx) {
  return static_cast<cudaStream_t>(ctx.stream);
}

inline void check_cuda(cudaError_t code, const char* op) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(code));
}

// Makes ctx.device current for the launch and puts the caller's device back.
class DeviceGuard {
 public:
  DeviceGuard(const ExecContext& ctx, const char* op) : op_(op) {
    check_cuda(cudaGetDevice(&before_), op);
    if (before_ != ctx.device) check_cuda(cudaSetDevice(ctx.device), op);
    changed_ = before_ != ctx.device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  // Call after the launches: a bad launch is reported here, by the op's name.
  void finish() const { check_cuda(cudaGetLastError(), op_); }
  const char* op() const { return op_; }

 private:
  const char* op_;
  int before_ = 0;
  bool changed_ = false;
};

// One launch on the caller's stream; asks for large dynamic shared memory where the kernel needs
// it.
template <class... Expected, class... Actual>
void launch(const DeviceGuard& guard, const ExecContext& ctx, void (*kernel)(Expected...),
            dim3 grid, unsigned threads, std::size_t shared_bytes, Actual&&... arguments) {
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               guard.op());
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ctx);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(arguments)...), guard.op());
}

// The most dynamic shared memory that a block of the device may ask for.
inline std::size_t shared_limit(const ExecContext& ctx, const char* op) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ctx.device),
             op);
  return static_cast<std::size_t>(bytes);
}

// Blocks for a grid-stride loop over `items`, a few waves at most: more would only queue.
inline unsigned blocks_for(index_t items, unsigned threads) {
  const index_t wanted = ceil_div(items, static_cast<index_t>(threads));
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 8192 ? wanted : 8192);
}

// A grid-stride loop over `items` as an op's only kernel: launched on the caller's stream, errors
// by the op's name. In the kernel: for (index_t i = loop_begin(); i < items; i += loop_step()).
constexpr unsigned kLoopThreads = 256;
template <class Kernel, class... Actual>
void launch_loop(const ExecContext& ctx, const char* op, index_t items, Kernel kernel,
                 const Actual&... arguments) {
  if (items == 0) return;
  const DeviceGuard guard(ctx, op);
  launch(guard, ctx, kernel, dim3(blocks_for(items, kLoopThreads)), kLoopThreads, 0, arguments...);
  guard.finish();
}
__device__ __forceinline__ index_t loop_begin() {
  return static_cast<index_t>(blockIdx.x) * kLoopThreads + threadIdx.x;
}
__device__ __forceinline__ index_t loop_step() {
  return static_cast<index_t>(gridDim.x) * kLoopThreads;
}

// Whether 16 bytes at a time can be read and written there.
template <class... Pointer>
bool all_aligned_16(const Pointer*... at) {
  return ((reinterpret_cast<std::uintptr_t>(at) % 16 == 0) && ...);
}

// Grids of one dimension hold 2^31 - 1 blocks.
inline unsigned grid_blocks(index_t blocks, const char* what) {
  check(blocks <= 2147483647, what);
  return static_cast<unsigned>(blocks);
}

}  // namespace magvit_fast::cuda
