// causal_conv3d: the weight gradient, as products of packed pixels of x and of dy.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: weight_grad.simd.cpp.
//
// One side is fixed, the pixels of dy; the other moves over it from tap to tap, the source rows.
// Channels of one of the two run along vectors, those of the other are scalars.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct WeightGradParams {
  SplitTensor source, output;  // history and x; dy. Or the other way round, see swaps_sides
  index_t batch, groups, in_group, out_group;
  index_t kernel_t, kernel_h, kernel_w, stride_w, dilation_w;
  // Source frame and row of every output and tap, or -1.
  const std::int32_t* t_source;  // [kernel_t][output frames]
  const std::int32_t* h_source;  // [kernel_h][output rows]
  // Source column of every padded position from that of output 0 and tap 0 on, or -1.
  const std::int32_t* w_source;
  const std::int32_t* w_run;  // positions from here on with neighboring sources, or all without
  bool vector_is_output;      // vectors run over output channels (else: over input channels)
  // Output pixels of a block: lines (of two rows where bfloat16 is multiplied in pairs) x columns.
  index_t block_lines, block_columns;
  DType dtype;
};

// One unit of work: the gradients of some rows of taps, of a block of vector channels by one of
// scalar channels, over some of the blocks of pixels.
struct WeightGradItem {
  index_t group, vector_begin, vector_end, scalar_begin, scalar_end;
  index_t tap_row_begin, tap_row_end;  // of kernel_t * kernel_h
  index_t block_begin, block_end;
};

constexpr index_t kGradPixels = 64;      // lines * columns of a block, about
constexpr index_t kScalarChannels = 64;  // most scalar channels of an item

constexpr index_t grad_line_rows(DType dtype, int isa) {
  return dtype == DType::bf16 && multiplies_bf16(isa) ? 2 : 1;
}
// Source columns that the outputs of a block's line meet.
constexpr index_t grad_line_sources(const WeightGradParams& p) {
  return (p.block_columns - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
}
constexpr index_t grad_blocks(const WeightGradParams& p, int isa) {
  return p.batch * (p.output.early_frames + p.output.late_frames) *
         ceil_div(p.output.height, p.block_lines * grad_line_rows(p.dtype, isa)) *
         ceil_div(p.output.width, p.block_columns);
}

// The sums of an item: [tap][scalar channel][vector channel, in whole vectors]. `packed` is memory
// of the thread for grad_packed elements of float32.
constexpr index_t grad_packed(const WeightGradParams& p, int isa) {
  const index_t widest =
      gather_columns(isa) > kScalarChannels ? gather_columns(isa) : kScalarChannels;
  return p.block_lines * (p.block_columns + grad_line_sources(p)) * widest + 4 * gather_lanes(isa);
}

MF_DECLARE_SIMD(void, conv3d_weight_grad,
                (const WeightGradParams& params, const WeightGradItem& item, float* sums,
                 float* packed))
// to += from, for the sums of slices (cpu_slices.h).
MF_DECLARE_SIMD(void, conv3d_add_sums, (float* to, const float* from, index_t count))
// Rounds the sums to `type` at their own place, from the first on; count in whole vectors.
MF_DECLARE_SIMD(void, conv3d_round_sums, (float* sums, index_t count, DType type))

}  // namespace magvit_fast
