// vq_nearest: the nearest row of a codebook for every position.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
//
// Distances are compared in float32 as |c|^2 - 2 z.c, tile by tile, and never stored. Where the two
// smallest lie closer than float32 can tell apart (vq_nearest_margin), all codes are compared again
// in float64, so that the result is the nearest code, and of equally near ones the first, on every
// device and at every instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct VqNearestParams {
  const void* z;          // [outer, channels, inner], strides below, in elements
  const float* codebook;  // [codes, channels], contiguous
  std::int64_t* indices;  // [outer, inner], contiguous
  void* workspace;
  index_t outer, channels, inner;
  index_t outer_stride, channel_stride, inner_stride;
  index_t codes;
  DType dtype;  // of z

  MF_HOST_DEVICE index_t positions() const { return outer * inner; }
  MF_HOST_DEVICE index_t first_element(index_t position) const {
    return position / inner * outer_stride + position % inner * inner_stride;
  }
};

// How far apart two float32 scores must be for their order to be certain. A score errs by at most
// (channels + 4) units of 2^-24 of 2 |z| |c| + |c|^2: one a product and sum, and the last steps.
MF_HOST_DEVICE inline double vq_nearest_margin(index_t channels, double z_norm, double code_norm) {
  const double unit = 5.9604644775390625e-8;
  return 2.0 * static_cast<double>(channels + 4) * unit *
         (2.0 * z_norm * code_norm + code_norm * code_norm);
}

// The codebook as the CPU's kernels read it: panels of kVqPanel codes, [channels][kVqPanel] each,
// and |c|^2; the missing codes of the last panel are infinitely far.
constexpr index_t kVqPanel = 32;
struct VqNearestTables {
  float* panels;  // [panels, channels, kVqPanel]
  float* norms;   // [panels, kVqPanel]
  double largest_norm;
};

#define MF_VQ_NEAREST_ENTRIES                                                              \
  index_t vq_nearest_workspace_bytes(index_t codes, index_t channels, const ExecContext&); \
  void vq_nearest_search(const VqNearestParams& params, const ExecContext& ctx);
namespace cpu {
MF_VQ_NEAREST_ENTRIES
}
namespace cuda {
MF_VQ_NEAREST_ENTRIES
}
#undef MF_VQ_NEAREST_ENTRIES

// Positions [begin, end); scratch holds kVqBlock * channels floats.
constexpr index_t kVqBlock = 12;
MF_DECLARE_SIMD(void, vq_nearest_range,
                (const VqNearestParams& params, const VqNearestTables& tables, float* scratch,
                 index_t begin, index_t end))

}  // namespace magvit_fast
