// causal_conv3d: the weight gradient of 1x1x1 kernels, a product of two lists of pixels.
// Previous hop: cpu_point_grad.cpp.
// Next hop: point_grad.simd.cpp.
#pragma once

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

// x and dy, or dy and x: channels of the one run along vectors, those of the other are scalars.
struct PointGradParams {
  const void* vectors;  // [pixels][vector_channels]
  const void* scalars;  // [pixels][scalar_channels]
  index_t vector_channels, scalar_channels;
  DType dtype;
};

struct PointGradItem {
  index_t vector_begin, vector_end, scalar_begin, scalar_end, pixel_begin, pixel_end;
};

constexpr index_t kPointLines = 64;  // packed at a time: of a pixel, or of two that are multiplied
constexpr index_t kPointScalars = 64;   // of a packed block
constexpr index_t kPointVectors = 128;  // most channels of an item: sums and packed pixels stay in
constexpr index_t kMostPointScalars = 256;  // the L2 cache

// Floats: the sums [block of columns][scalar][columns, in whole vectors], and the packed pixels.
constexpr index_t point_sums(index_t vectors, index_t scalars, int isa) {
  return round_up(vectors, gather_lanes(isa)) * scalars;
}
constexpr index_t point_packed(int isa) {
  return kPointLines * (kPointVectors + kMostPointScalars) + 2 * gather_lanes(isa);
}

MF_DECLARE_SIMD(void, conv3d_point_grad,
                (const PointGradParams& params, const PointGradItem& item, float* sums,
                 float* packed))

}  // namespace magvit_fast
