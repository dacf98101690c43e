// Integer helpers of index maps, shared by host and device and tested on the CPU.
// Previous hop: every op.
// Next hop: none.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MF_HOST_DEVICE __host__ __device__
#else
#define MF_HOST_DEVICE
#endif

namespace magvit_fast {

using index_t = std::int64_t;

template <class T>
MF_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
MF_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace magvit_fast
