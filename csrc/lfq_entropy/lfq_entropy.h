// lfq_entropy: the two entropies of look-up-free quantization over all 2**D codes, exactly, by
// halves. Previous hop: bindings.cpp. Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or
// cuda.cu.
//
// p(bit c of position n is +) = sigmoid(scale * z[n, c]). The bits of a code are independent given
// z, so the probability of a code is the product of two half-code tables, and the sum over
// positions of all 2**D of them is one matrix product: probs[hi, lo] = sum_n high[n, hi] * low[n,
// lo]. Three entry points, so that processes can add up `stats` and `probs` between the first two:
//   sums      z -> stats (sum of sample entropies, number of positions), probs (sums over
//   positions) codebook  probs, stats -> entropy of the mean distribution backward  z, probs, stats
//   and the gradients of both entropies -> gradient of z
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

constexpr index_t kLfqEntropyMaxChannels = 24;

struct LfqEntropyInput {
  const void* z;             // [outer, channels, inner], strides below, in elements
  const std::uint8_t* mask;  // [outer, inner], contiguous, nonzero = counted; null: all are
  index_t outer, channels, inner;
  index_t outer_stride, channel_stride, inner_stride;
  DType dtype;
  float scale;  // 4 * inv_temperature
};

struct LfqEntropySumsParams {
  LfqEntropyInput in;
  double* stats;        // [2]: sum over counted positions of the sample entropy; their number
  float* probs;         // [2**channels]: sum over counted positions; code bit c is channel c
  void* workspace;      // lfq_entropy_workspace_bytes
  bool full_precision;  // float32's in the products; else TF32's (CUDA; the CPU has float32's)
};

// -sum_k P_k log(guard(P_k)) with P = probs / stats[1]; guard: identity (eps 0, and 0 log 0 = 0),
// P + eps, or max(P, eps).
struct LfqEntropyCodebookParams {
  const float* probs;
  const double* stats;
  float* per_sample;  // [1]: stats[0] / stats[1]
  float* entropy;     // [1]; both are 0 where nothing is counted
  void* workspace;
  index_t codes;  // 2**channels
  float eps;
  bool clamp;
};

struct LfqEntropyBackwardParams {
  LfqEntropyInput in;
  const float* probs;  // as the codebook saw them (of all processes)
  const double* stats;
  const float* grad_sample;    // [1]: gradient of stats[0] / stats[1]
  const float* grad_codebook;  // [1]
  void* grad_z;                // dtype and strides of z; 0 at positions that are not counted
  void* workspace;
  float eps;
  bool clamp;
  bool full_precision;
};

// The low half of the code takes this many bits, the high half the rest. At least five where there
// are so many: a row of the matrix product is then a whole number of vectors.
MF_HOST_DEVICE constexpr int lfq_entropy_low_bits(int channels) {
  return channels <= 5 ? channels : (channels - channels / 2 < 5 ? 5 : channels - channels / 2);
}

// The mean sample entropy.
MF_HOST_DEVICE inline float lfq_entropy_per_sample(const double* stats) {
  return static_cast<float>(stats[0] / (stats[1] > 1.0 ? stats[1] : 1.0));
}

// d/dP of -P log(guard(P)).
template <class Log>
MF_HOST_DEVICE inline float lfq_entropy_slope(float p, float eps, bool clamp, Log log) {
  constexpr float kTiny = 1e-37f;
  if (eps <= 0.0f) return -(log(p > kTiny ? p : kTiny) + 1.0f);
  if (clamp) return p > eps ? -(log(p) + 1.0f) : -log(eps);
  return -(log(p + eps) + p / (p + eps));
}

namespace cpu {
index_t lfq_entropy_workspace_bytes(index_t positions, index_t channels, const ExecContext& ctx);
void lfq_entropy_sums(const LfqEntropySumsParams& params, const ExecContext& ctx);
void lfq_entropy_codebook(const LfqEntropyCodebookParams& params, const ExecContext& ctx);
void lfq_entropy_backward(const LfqEntropyBackwardParams& params, const ExecContext& ctx);
}  // namespace cpu
namespace cuda {
index_t lfq_entropy_workspace_bytes(index_t positions, index_t channels, const ExecContext& ctx);
void lfq_entropy_sums(const LfqEntropySumsParams& params, const ExecContext& ctx);
void lfq_entropy_codebook(const LfqEntropyCodebookParams& params, const ExecContext& ctx);
void lfq_entropy_backward(const LfqEntropyBackwardParams& params, const ExecContext& ctx);
}  // namespace cuda

}  // namespace magvit_fast
