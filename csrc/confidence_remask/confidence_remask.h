// confidence_remask: one step of masked decoding, sampling every unknown token and keeping the
// surest. Previous hop: bindings.cpp. Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or
// cuda.cu.
//
// For an unknown position n of clip b, for each sub-token g, with w_v = exp((logit_v - max) /
// temperature):
//   value      = the first v whose w_0 + ... + w_v exceeds u * (sum of all), u = uniform_wide of
//   words 2e and
//                2e + 1 of stream 0, e = (b*N + n)*G + g; with value_noise: argmax_v (logit /
//                temperature + noise), the first of equals; temperature 0: argmax of the logits
//   log p      = logit[value] - logsumexp(logits)                      (temperature 1)
// token        = sum_g value_g << (g * log2 V)
// confidence   = sum_g log p + choice_temperature * gumbel(stream 1, b*N + n)
// The num_unknown[b] least confident (ties: the lower position) stay unknown, at most as many as
// were. Every unknown position gets its sampled token, also those that stay unknown. gumbel(stream,
// index) = -log(-log(u)), u = uniform_open of word index. Word i of a stream is lane i % 4 of
// philox4x32(philox_counter(i, step, stream), seed's low word, seed's high word).
//
// Weights are float32; sums of at most 64 of them too, and what is summed of those is float64: so a
// value of probability 1e-12 is drawn as rarely as it should be.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/philox.h"
#include "common/shape.h"

namespace magvit_fast {

constexpr int kConfidenceRemaskMaxGroups = 8;
constexpr std::uint32_t kValueStream = 0, kChoiceStream = 1;

struct ConfidenceRemaskParams {
  const void* logits;               // [batch, length, groups, 2**bits]
  const std::int64_t* tokens;       // [batch, length]
  const std::uint8_t* unknown;      // [batch, length]
  const std::int64_t* num_unknown;  // [batch]; below 0 counts as 0
  const float* value_noise;         // [batch, length, groups, 2**bits] or null: drawn
  const float* choice_noise;        // [batch, length] or null: Philox stream 1
  std::int64_t* new_tokens;         // [batch, length]; -1 where the logits are bad
  std::uint8_t* new_unknown;        // [batch, length], 0 or 1
  std::int64_t* bad;  // [1]: set to the smallest unknown position b*length + n with a NaN
                      // or +inf among its logits, no finite one in a sub-token, or a NaN
                      // among its noise. Untouched if there is none
  void* workspace;    // batch * length * 16 bytes
  index_t batch, length;
  int groups, bits;
  DType dtype;
  float temperature, choice_temperature;  // both >= 0
  std::uint64_t seed;
  std::uint32_t step;
};

// Confidence as an unsigned key in the same order; with the position below it, all keys differ.
MF_HOST_DEVICE inline std::uint64_t confidence_key(std::uint32_t float_bits, index_t position) {
  const std::uint32_t order = (float_bits & 0x80000000u) ? ~float_bits : (float_bits | 0x80000000u);
  return (static_cast<std::uint64_t>(order) << 32) | static_cast<std::uint32_t>(position);
}

namespace cpu {
void confidence_remask(const ConfidenceRemaskParams& params, const ExecContext& ctx);
}
namespace cuda {
void confidence_remask(const ConfidenceRemaskParams& params, const ExecContext& ctx);
}

// Samples position `position` of the flattened [batch, length]: writes *token and *log_prob (the
// sum over sub-tokens); false if the logits or the noise are bad there.
MF_DECLARE_SIMD(bool, confidence_remask_sample,
                (const ConfidenceRemaskParams& params, index_t position, std::int64_t* token,
                 float* log_prob))

}  // namespace magvit_fast
