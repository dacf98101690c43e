// Philox4x32-10 for several neighboring counters at once, bit for bit that of common/philox.h.
// Previous hop: confidence_remask (kernels.simd.cpp).
// Next hop: none.
//
// A counter word sits in the low half of a 64-bit lane, where the 32 x 32 -> 64 bit multiplication
// wants it; the high halves hold leftovers that no later step reads, so that a round is six
// instructions.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {

constexpr int kPhiloxDraws = 2 * kLanes;  // numbers of one call: four a 64-bit lane

#if defined(__x86_64__)
typedef std::uint64_t vq __attribute__((vector_size(kLanes * 4)));

static inline vq multiply_low_halves(vq a, vq b) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(MF_ISA_avx2)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
constexpr vq kCount = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr vq kFront = {0, 8, 1, 9, 2, 10, 3, 11}, kBack = {4, 12, 5, 13, 6, 14, 7, 15};
#elif defined(MF_ISA_avx2)
constexpr vq kCount = {0, 1, 2, 3};
constexpr vq kFront = {0, 4, 1, 5}, kBack = {2, 6, 3, 7};
#else
constexpr vq kCount = {0, 1};
constexpr vq kFront = {0, 2}, kBack = {1, 3};
#endif

// The numbers of elements first .. first + kPhiloxDraws - 1 in order; first is a multiple of four.
static inline void philox_draws(std::uint64_t first, std::uint32_t step, std::uint32_t stream,
                                std::uint32_t key0, std::uint32_t key1, vu out[2]) {
  const vq group = kCount + (first >> 2);
  const vq mul0 = vq{} + 0xD2511F53u, mul1 = vq{} + 0xCD9E8D57u;
  vq x0 = group, x1 = group >> 32, x2 = vq{} + step, x3 = vq{} + stream;
  for (int round = 0; round < 10; ++round) {
    const vq p0 = multiply_low_halves(x0, mul0), p1 = multiply_low_halves(x2, mul1);
    x0 = (p1 >> 32) ^ x1 ^ (vq{} + key0);
    x1 = p1;
    x2 = (p0 >> 32) ^ x3 ^ (vq{} + key1);
    x3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const vq low = vq{} + 0xffffffffu;
  const vq first_pair = (x0 & low) | (x1 << 32), second_pair = (x2 & low) | (x3 << 32);
  // In order: counter 0's pairs, counter 1's pairs, ...
  out[0] = (vu)__builtin_shuffle(first_pair, second_pair, kFront);
  out[1] = (vu)__builtin_shuffle(first_pair, second_pair, kBack);
}
#else
static inline void philox_draws(std::uint64_t first, std::uint32_t step, std::uint32_t stream,
                                std::uint32_t key0, std::uint32_t key1, vu out[2]) {
  for (int i = 0; i < kPhiloxDraws; i += 4) {
    const std::uint64_t index = first + static_cast<std::uint64_t>(i);
    const Philox4 draw = philox4x32(philox_counter(index, step, stream), key0, key1);
    for (int j = 0; j < 4; ++j) out[(i + j) / kLanes][(i + j) % kLanes] = draw.x[j];
  }
}
#endif

}  // namespace MF_ISA
}  // namespace magvit_fast
