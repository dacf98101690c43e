// Philox4x32-10 for several neighboring counters at once, bit for bit that of common/philox.h.
// Previous hop: confidence_remask (kernels.simd.cpp).
// Next hop: none.
//
// A counter word sits in the low half of a 64-bit lane, where the 32 x 32 -> 64 bit multiplication
// wants it; the high halves hold leftovers that no later step reads, so that a round is six
// instructions. Neighboring counters differ in their lowest word alone: what the other three make
// of the first three rounds is computed once (PhiloxStart).
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {

constexpr int kPhiloxDraws = 4 * kLanes;  // numbers of one call: four a 64-bit lane, two streams
constexpr std::uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;

// The keys of every round, low halves of 64-bit lanes.
struct PhiloxKeys {
  std::uint64_t first[10], second[10];

  inline explicit PhiloxKeys(std::uint64_t seed) {
    auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = key0;
      second[round] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

// Numbers of one stream at one step whose counters share the high word of element `first`.
struct PhiloxStart {
  // Rounds 0 to 2 of (lowest word, high word, step, stream); "then" words are xored to what varies.
  std::uint64_t then2_0, then0_1, then2_1, then2_2;

  inline PhiloxStart(const PhiloxKeys& keys, std::uint64_t first, std::uint32_t step,
                     std::uint32_t stream) {
    const std::uint64_t p1 = std::uint64_t{kPhiloxMul1} * step;
    const std::uint64_t x0 = (p1 >> 32) ^ (first >> 34) ^ keys.first[0];
    const std::uint64_t p0 = std::uint64_t{kPhiloxMul0} * static_cast<std::uint32_t>(x0);
    then2_0 = stream ^ keys.second[0];
    then0_1 = p1 ^ keys.first[1];
    then2_1 = (p0 >> 32) ^ keys.second[1];
    then2_2 = p0 ^ keys.second[2];
  }
};

typedef std::uint64_t vq __attribute__((vector_size(kLanes * 4)));

static inline vq multiply_low_halves(vq a, vq b) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(MF_ISA_avx2)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
static inline vq xor_three(vq a, vq b, vq c) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
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

// The numbers of elements first .. first + kPhiloxDraws - 1 in order; first is a multiple of
// kPhiloxDraws and has the high word of `start`. Two independent streams of counters, because the
// ten rounds of one are a chain of multiplications that leaves most of the machine idle.
static inline void philox_draws(const PhiloxKeys& keys, const PhiloxStart& start,
                                std::uint64_t first, vu out[4]) {
  const vq mul0 = vq{} + kPhiloxMul0, mul1 = vq{} + kPhiloxMul1;
  vq x0[2], x1[2], x2[2], x3[2], p0[2], p1[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const vq p = multiply_low_halves(kCount + ((first >> 2) + i * kLanes / 2), mul0);
    x1[i] = multiply_low_halves((p >> 32) ^ start.then2_0, mul1);
    p0[i] = multiply_low_halves((x1[i] >> 32) ^ start.then0_1, mul0);
    p1[i] = multiply_low_halves(p ^ start.then2_1, mul1);
    x0[i] = xor_three(p1[i] >> 32, x1[i], vq{} + keys.first[2]);
    x2[i] = (p0[i] >> 32) ^ start.then2_2;
  }
#pragma GCC unroll 6
  for (int round = 3; round < 9; ++round)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x1[i] = p1[i];
      x3[i] = p0[i];
      p0[i] = multiply_low_halves(x0[i], mul0);
      p1[i] = multiply_low_halves(x2[i], mul1);
      x0[i] = xor_three(p1[i] >> 32, x1[i], vq{} + keys.first[round]);
      x2[i] = xor_three(p0[i] >> 32, x3[i], vq{} + keys.second[round]);
    }
  // The last round, its words already side by side: (x0, x1) and (x2, x3) of each counter.
  const vq low = vq{} + 0xffffffffu;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const vq q0 = multiply_low_halves(x0[i], mul0), q1 = multiply_low_halves(x2[i], mul1);
    const vq first_pair = ((q1 >> 32) | (q1 << 32)) ^ ((p1[i] ^ keys.first[9]) & low);
    const vq second_pair = ((q0 >> 32) | (q0 << 32)) ^ ((p0[i] ^ keys.second[9]) & low);
    // In order: counter 0's pairs, counter 1's pairs, ...
    out[2 * i] = (vu)__builtin_shuffle(first_pair, second_pair, kFront);
    out[2 * i + 1] = (vu)__builtin_shuffle(first_pair, second_pair, kBack);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
