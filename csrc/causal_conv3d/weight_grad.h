// causal_conv3d: the weight gradient, as products of packed pixels of x and of dy.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: weight_grad.simd.cpp.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct WeightGradParams {
  SplitTensor source, output;  // history and x; dy
  void* dweight;               // [out_channels, in_channels / groups, taps], of type `dtype`
  index_t batch, groups, in_group, out_group;
  index_t kernel_t, kernel_h, kernel_w;
  // Source frame, row and column offset (in elements) of every output and tap, or -1.
  const std::int32_t* t_source;  // [kernel_t][output frames]
  const std::int32_t* h_source;  // [kernel_h][output rows]
  const std::int32_t* w_source;  // [kernel_w][output columns]
  bool vector_is_output;         // vectors run over output channels (else: over input channels)
  DType dtype;
};

// One unit of work: the gradients of some taps, of a block of vector channels by one of scalar
// channels.
struct WeightGradItem {
  index_t group, vector_begin, vector_end, scalar_begin, scalar_end, tap_begin, tap_end;
};

constexpr index_t kGradPixels = 96;      // output pixels packed at a time
constexpr index_t kScalarChannels = 64;  // most scalar channels of an item
constexpr index_t kScalarRows = 64;      // most (tap, scalar channel) pairs of one product
constexpr index_t kScalarStride = kScalarRows + 16;  // packed: the last pair may be a whole vector

// float32 elements of one thread's memory: sums [taps][scalar][vector], then the packed pixels.
constexpr index_t weight_grad_sums(index_t taps, index_t isa) {
  return taps * kScalarChannels * gather_columns(static_cast<int>(isa));
}
constexpr index_t weight_grad_packed(index_t isa) {
  return kGradPixels * (kScalarStride + gather_columns(static_cast<int>(isa)));
}

MF_DECLARE_SIMD(void, conv3d_weight_grad,
                (const WeightGradParams& params, const WeightGradItem& item, float* memory))

}  // namespace magvit_fast
