// Philox4x32-10: counter-based random numbers, the same on CPU, CUDA and in the Python reference
// (Salmon et al., SC'11). Previous hop: confidence_remask (values and confidence noise).
// Next hop: none; pure integer arithmetic, host and device.
#pragma once

#include <cstdint>

#include "common/shape.h"

namespace magvit_fast {

struct Philox4 {
  std::uint32_t x[4];
};

MF_HOST_DEVICE inline Philox4 philox4x32(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
  constexpr std::uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kMul0) * counter.x[0];
    const std::uint64_t p1 = static_cast<std::uint64_t>(kMul1) * counter.x[2];
    const Philox4 next = {{static_cast<std::uint32_t>(p1 >> 32) ^ counter.x[1] ^ key0,
                           static_cast<std::uint32_t>(p1),
                           static_cast<std::uint32_t>(p0 >> 32) ^ counter.x[3] ^ key1,
                           static_cast<std::uint32_t>(p0)}};
    counter = next;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The counter of element `index` of stream `stream` (0: values, 1: confidence) at decoding step
// `step`; four neighbors share one counter, lane = index % 4.
MF_HOST_DEVICE inline Philox4 philox_counter(std::uint64_t index, std::uint32_t step,
                                             std::uint32_t stream) {
  const std::uint64_t group = index >> 2;
  return {
      {static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(group >> 32), step, stream}};
}

// Uniform in (0, 1), exact in float32: (k + 1/2) * 2^-23 with the top 23 bits k.
MF_HOST_DEVICE inline float uniform_open(std::uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * 1.1920928955078125e-7f;
}

// Uniform in (0, 1), exact in float64: (k + 1/2) * 2^-52 with the 52 bits k of `high` and the top
// of `low`.
MF_HOST_DEVICE inline double uniform_wide(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t k = (static_cast<std::uint64_t>(high) << 20) | (low >> 12);
  return (static_cast<double>(k) + 0.5) * 2.220446049250313e-16;
}

}  // namespace magvit_fast
