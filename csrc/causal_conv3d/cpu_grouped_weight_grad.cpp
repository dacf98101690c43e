// causal_conv3d on the CPU: the weight gradient of groups of few channels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: grouped_weight_grad.simd.cpp.
//
// Rows of dy are shared out by the shape alone and their sums added in order: results do not depend
// on threads.
#include "causal_conv3d/cpu_grouped.h"
#include "causal_conv3d/workspace.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kItems = 16;

struct Plan {
  GroupedGradParams params{};
  SourceTables tables;
  index_t rows;           // of dy
  index_t step, chunks;   // vectors of an item, and items that share the vectors
  index_t slices;         // of the rows
  index_t vector_sums;    // floats
  float* sums = nullptr;  // [chunk][slice][vector][tap][unit][lane]
};

Plan make_plan(const Conv3dWeightGradParams& of, const ExecContext& ctx, Workspace& workspace) {
  Plan plan;
  const Conv3dShape s = with_flat_plane(of.shape);
  GroupedGradParams& p = plan.params;
  p.source = source_side(s, of.history, of.x);
  p.output = output_side(s, of.dy);
  p.lanes.groups = s.groups;
  p.lanes.reduce = p.lanes.units = s.in_channels / s.groups;
  p.lanes.produce = s.out_channels / s.groups;
  p.lanes.together = groups_together(p.lanes.reduce, p.lanes.produce, s.groups, ctx.isa);
  p.lanes.spread = p.lanes.reduce * p.lanes.produce > 1;
  p.kernel_t = s.t.kernel, p.kernel_h = s.h.kernel, p.kernel_w = s.w.kernel;
  p.stride_w = s.w.stride, p.dilation_w = s.w.dilation;
  p.type = s.dtype;
  plan.tables = source_tables(s.t, s.h, s.w, workspace);
  p.t_source = plan.tables.t, p.h_source = plan.tables.h, p.w_source = plan.tables.w;
  const index_t vectors = p.lanes.vectors();
  plan.step = std::min(vectors, grouped_vectors(false, ctx.isa));
  plan.chunks = ceil_div(vectors, plan.step);
  plan.rows = s.batch * s.t.out * s.h.out;
  plan.slices = std::min(ceil_div(kItems, plan.chunks), plan.rows);
  plan.vector_sums = p.kernel_t * p.kernel_h * p.kernel_w * p.lanes.units * gather_lanes(ctx.isa);
  plan.sums = workspace.take<float>(plan.chunks * plan.slices * plan.step * plan.vector_sums);
  return plan;
}

// A vector's sums into dweight [out channel][in channel of the group][tap].
template <class T>
void write(const GroupedGradParams& p, index_t lanes, index_t vector, const float* sums,
           T* dweight) {
  const GroupLanes& l = p.lanes;
  const index_t taps = p.kernel_t * p.kernel_h * p.kernel_w;
  for (index_t i = 0; i < l.count(vector) * l.produce; ++i) {
    T* to = dweight + (vector * l.together * l.produce + i) * l.units * taps;
    for (index_t k = 0; k < l.units; ++k)
      for (index_t tap = 0; tap < taps; ++tap)
        *to++ = from_float<T>(sums[(tap * l.units + k) * lanes + i]);
  }
}

void write(const GroupedGradParams& p, index_t lanes, index_t vector, const float* sums,
           void* dweight) {
  switch (p.type) {
    case DType::f32:
      return write(p, lanes, vector, sums, static_cast<float*>(dweight));
    case DType::bf16:
      return write(p, lanes, vector, sums, static_cast<bf16_t*>(dweight));
    case DType::f16:
      return write(p, lanes, vector, sums, static_cast<f16_t*>(dweight));
  }
}

}  // namespace

std::size_t grouped_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  make_plan({shape, nullptr, nullptr, nullptr, nullptr, nullptr}, ctx, workspace);
  return workspace.bytes();
}

void grouped_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx) {
  Workspace workspace(params.workspace);
  const Plan plan = make_plan(params, ctx, workspace);
  const GroupedGradParams& p = plan.params;
  const Conv3dShape s = with_flat_plane(params.shape);
  plan.tables.fill(s.t, s.h, s.w);
  const index_t vectors = p.lanes.vectors(), item_sums = plan.step * plan.vector_sums;
  const auto kernel = MF_PICK_SIMD(conv3d_grouped_weight_grad, ctx.isa);
  parallel_items(plan.chunks * plan.slices, ctx.num_threads, [&](index_t i, int) {
    const index_t slice = i % plan.slices, first = i / plan.slices * plan.step;
    kernel(p,
           {first, std::min(first + plan.step, vectors), plan.rows * slice / plan.slices,
            plan.rows * (slice + 1) / plan.slices},
           plan.sums + i * item_sums);
  });
  parallel_items(vectors, ctx.num_threads, [&](index_t v, int) {
    float* sums =
        plan.sums + v / plan.step * plan.slices * item_sums + v % plan.step * plan.vector_sums;
    for (index_t slice = 1; slice < plan.slices; ++slice)
      for (index_t k = 0; k < plan.vector_sums; ++k) sums[k] += sums[slice * item_sums + k];
    write(p, gather_lanes(ctx.isa), v, sums, params.dweight);
  });
}

}  // namespace magvit_fast::cpu
