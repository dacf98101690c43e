// group_norm_silu: group normalization, affine and adaptive terms, SiLU; and the gradients.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp, backward.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/group_stats.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

// What both directions know of the problem. Tensors lie channels-last, [B, T, H, W, C], or in
// planes, [B, C, T, H, W] (the CPU's kernels, without scale and shift).
//   y = act((norm(x) * weight + bias) * (1 + scale) + shift)
// scale and shift are read by cell: position (t, h, w) reads cell ((t + skipped) / cell[0],
// h / cell[1], w / cell[2]). An axis along which both are broadcast is one cell.
struct GroupNormSiluInput {
  const void* x;
  const float* weight;  // [C] or null
  const float* bias;    // [C] or null
  const void* scale;    // dtype of x, channels adjacent, or null
  const void* shift;    // likewise
  index_t batch, frames, height, width, channels, groups;
  index_t cell[3];                           // positions of a cell along t, h, w
  index_t skipped;                           // frames of the first cell that x does not have
  index_t scale_stride[4], shift_stride[4];  // of batch and cells (t, h, w), in elements; 0 repeats
  bool per_frame;                            // statistics of one frame, else of the whole clip
  bool silu;
  bool planes;  // channels-first
  float eps;
  DType dtype;

  MF_HOST_DEVICE bool adaptive() const { return scale != nullptr || shift != nullptr; }
  // Where channel c of the plane of (frame, row of height) begins.
  MF_HOST_DEVICE index_t plane(index_t frame, index_t row, index_t c) const {
    const index_t b = frame / frames, t = frame % frames;
    return (((b * channels + c) * frames + t) * height + row) * width;
  }
  MF_HOST_DEVICE index_t frame_elements() const { return height * width * channels; }
  // A span shares its statistics.
  MF_HOST_DEVICE index_t spans() const { return per_frame ? batch * frames : batch; }
};

struct GroupNormSiluForward {
  GroupNormSiluInput in;
  void* y;            // as x; null: the statistics alone
  GroupStats* stats;  // [spans, groups]
  void* workspace;
  bool ready;  // the statistics are given
};

struct GroupNormSiluBackward {
  GroupNormSiluInput in;
  const void* dy;           // as x
  const GroupStats* stats;  // of the forward pass
  void* dx;                 // as x
  float* dweight;           // [C]
  float* dbias;             // [C]
  float* dscale;            // [B, T, cells of h, cells of w, C] where adaptive
  float* dshift;            // likewise
  void* workspace;
};

// Frames are cut into slabs of whole rows; sums run over a slab and then over slabs in order, so
// that results do not depend on the number of threads. A cell of h never lies in two slabs.
struct GroupNormSiluPlan {
  index_t slab_rows;  // of height
  index_t slabs_per_frame;
  index_t slabs_per_span;
  index_t slabs;
  index_t padded_channels;  // room of a table with one float a channel

  MF_HOST_DEVICE GroupNormSiluPlan(const GroupNormSiluInput& in, index_t slab_bytes) {
    const index_t row_bytes = in.width * in.channels * 4;
    const index_t unit = in.adaptive() ? in.cell[1] : 1;
    index_t rows = row_bytes > 0 ? slab_bytes / row_bytes / unit * unit : in.height;
    if (rows < unit) rows = unit;
    slab_rows = rows < in.height ? rows : in.height;
    slabs_per_frame = slab_rows > 0 ? ceil_div(in.height, slab_rows) : 0;
    slabs = in.batch * in.frames * slabs_per_frame;
    slabs_per_span = in.per_frame ? slabs_per_frame : in.frames * slabs_per_frame;
    padded_channels = round_up(in.channels, index_t{16});
  }
};

// Rows [first, last) of height of one frame.
struct GroupNormSiluSlab {
  index_t frame, batch, time, first, last;

  MF_HOST_DEVICE GroupNormSiluSlab(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan,
                                   index_t slab) {
    frame = slab / plan.slabs_per_frame;
    batch = frame / in.frames;
    time = frame % in.frames;
    first = slab % plan.slabs_per_frame * plan.slab_rows;
    last = first + plan.slab_rows < in.height ? first + plan.slab_rows : in.height;
  }
};

#define MF_GROUP_NORM_SILU_ENTRIES                                                               \
  bool group_norm_silu_takes_planes(bool adaptive);                                              \
  index_t group_norm_silu_workspace_bytes(const GroupNormSiluInput& in, const ExecContext& ctx); \
  void group_norm_silu_forward(const GroupNormSiluForward& params, const ExecContext& ctx);      \
  void group_norm_silu_backward(const GroupNormSiluBackward& params, const ExecContext& ctx);
namespace cpu {
MF_GROUP_NORM_SILU_ENTRIES
}
namespace cuda {
MF_GROUP_NORM_SILU_ENTRIES
}
#undef MF_GROUP_NORM_SILU_ENTRIES

// One slab of each pass, in either layout; `scratch` is kGroupNormSiluTables tables of
// padded_channels floats.
constexpr index_t kGroupNormSiluTables = 6;
#define MF_GROUP_NORM_SILU_PASSES(layout)                                                     \
  /* moments [groups, 2]: mean and sum of squared deviations of the slab's values. */         \
  MF_DECLARE_SIMD(void, group_norm_silu_##layout##_moments,                                   \
                  (const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t slab, \
                   float* scratch, double* moments))                                          \
  MF_DECLARE_SIMD(void, group_norm_silu_##layout##_apply,                                     \
                  (const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t slab, \
                   const GroupStats* stats, float* scratch, void* y))                         \
  /* sums [2, padded_channels]: of dn and of dn * (x - mean), */                              \
  /* dn = d loss / d (norm(x) * weight + bias). */                                            \
  MF_DECLARE_SIMD(void, group_norm_silu_##layout##_sums,                                      \
                  (const GroupNormSiluBackward& params, const GroupNormSiluPlan& plan,        \
                   index_t slab, const GroupStats* stats, float* scratch, float* sums))       \
  /* terms [groups, 2]: means over the group of weight * dn and of weight * dn * xhat. */     \
  MF_DECLARE_SIMD(void, group_norm_silu_##layout##_input_grad,                                \
                  (const GroupNormSiluBackward& params, const GroupNormSiluPlan& plan,        \
                   index_t slab, const GroupStats* stats, const float* terms, float* scratch))
MF_GROUP_NORM_SILU_PASSES(rows)
MF_GROUP_NORM_SILU_PASSES(planes)
#undef MF_GROUP_NORM_SILU_PASSES

}  // namespace magvit_fast
