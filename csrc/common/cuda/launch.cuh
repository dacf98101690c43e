// What every CUDA launch needs: the right device, the right stream, and an error that names the op.
// Previous hop: cuda.cu of every op.
// Next hop: the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/exec_context.h"

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

 private:
  const char* op_;
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace magvit_fast::cuda
