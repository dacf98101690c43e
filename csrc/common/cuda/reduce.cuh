// Sums and maxima over a warp and a block, in an order that depends on the thread count alone.
// Previous hop: lfq_entropy, confidence_remask.
// Next hop: none.
#pragma once

#include <cuda_runtime.h>

namespace magvit_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Every thread of a block of kThreads calls it and receives the sum; `scratch` is shared memory for
// kThreads / 32 values, free again after the call.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  static_assert(kThreads % kWarpSize == 0);
  const int thread = static_cast<int>(threadIdx.x);
  value = warp_sum(value);
  if (thread % kWarpSize == 0) scratch[thread / kWarpSize] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

}  // namespace magvit_fast::cuda
