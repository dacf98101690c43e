// causal_conv3d on the CPU: the weight gradient of groups of few channels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: grouped_weight_grad.simd.cpp.
//
// Rows of dy are shared out by the shape alone and their sums added in order: results do not depend
// on threads.
#include "causal_conv3d/cpu_grouped.h"
#include "causal_conv3d/cpu_slices.h"
#include "causal_conv3d/weight_grad.h"
#include "causal_conv3d/workspace.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kItems = 16;

// Lanes are channels of dy; the units of a sum are those of its group of x.
GroupLanes gradient_lanes(const Conv3dShape& s, int isa) {
  const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const index_t width = gather_lanes(isa);
  const GroupSource source = in * out == 1 ? GroupSource::pixel : GroupSource::spread;
  return {s.groups, in, out, in, groups_together(in, out, s.groups, width), 1, width, source};
}

struct Plan {
  GroupedGradParams params{};
  SourceTables tables;
  index_t rows;          // of dy, two together where they are joined
  index_t step, chunks;  // vectors of an item, and items that share the vectors
  index_t slices;        // of the rows
  index_t vector_sums;   // floats
  SliceTree tree;
  float* sums = nullptr;  // [chunk][slice][vector][tap][unit][lane]
};

Plan make_plan(const Conv3dWeightGradParams& of, const ExecContext& ctx, Workspace& workspace) {
  Plan plan;
  const Conv3dShape s = with_flat_plane(of.shape);
  GroupedGradParams& p = plan.params;
  p.source = source_side(s, of.history, of.x);
  p.output = output_side(s, of.dy);
  p.lanes = gradient_lanes(s, ctx.isa);
  p.kernel_t = s.t.kernel, p.kernel_h = s.h.kernel, p.kernel_w = s.w.kernel;
  p.stride_w = s.w.stride, p.dilation_w = s.w.dilation;
  p.type = s.dtype;
  plan.tables = source_tables(s.t, s.h, s.w, workspace);
  p.t_source = plan.tables.t, p.h_source = plan.tables.h, p.w_source = plan.tables.w;
  const index_t vectors = p.lanes.vectors();
  plan.step = std::min(vectors, grouped_vectors(GroupSource::pixel, ctx.isa));
  plan.chunks = ceil_div(vectors, plan.step);
  plan.rows = s.batch * s.t.out * ceil_div(s.h.out, grad_line_rows(s.dtype, ctx.isa));
  plan.slices = std::min(ceil_div(kItems, plan.chunks), plan.rows);
  plan.vector_sums = p.kernel_t * p.kernel_h * p.kernel_w * p.lanes.units * p.lanes.width;
  plan.tree = SliceTree(plan.chunks, plan.slices, ctx.isa, workspace);
  plan.sums = workspace.take<float>(plan.chunks * plan.slices * plan.step * plan.vector_sums);
  return plan;
}

// A vector's sums into dweight [out channel][in channel of the group][tap].
template <class T>
void write(const GroupedGradParams& p, index_t vector, const float* sums, T* dweight) {
  const GroupLanes& l = p.lanes;
  const index_t taps = p.kernel_t * p.kernel_h * p.kernel_w;
  for (index_t i = 0; i < l.lanes(vector); ++i) {
    T* to = dweight + (l.channel(vector) + i) * l.units * taps;
    for (index_t k = 0; k < l.units; ++k)
      for (index_t tap = 0; tap < taps; ++tap)
        *to++ = from_float<T>(sums[(tap * l.units + k) * l.width + i]);
  }
}

void write(const GroupedGradParams& p, index_t vector, const float* sums, void* dweight) {
  switch (p.type) {
    case DType::f32:
      return write(p, vector, sums, static_cast<float*>(dweight));
    case DType::bf16:
      return write(p, vector, sums, static_cast<bf16_t*>(dweight));
    case DType::f16:
      return write(p, vector, sums, static_cast<f16_t*>(dweight));
  }
}

}  // namespace

bool grouped_weight_grad_serves(const Conv3dShape& s, int isa) {
  if (s.groups == 1) return false;
  const GroupLanes lanes = gradient_lanes(s, isa);
  return lanes.together >= 2 && (isa > 0 || lanes.source == GroupSource::pixel);
}

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
    const index_t chunk = i / plan.slices, slice = i % plan.slices, first = chunk * plan.step;
    const index_t last = std::min(first + plan.step, vectors);
    float* sums = plan.sums + chunk * plan.slices * item_sums;
    kernel(p, {first, last, plan.rows * slice / plan.slices, plan.rows * (slice + 1) / plan.slices},
           sums + slice * item_sums);
    if (!plan.tree.add(chunk, slice, sums, item_sums)) return;
    for (index_t v = first; v < last; ++v)
      write(p, v, sums + (v - first) * plan.vector_sums, params.dweight);
  });
}

}  // namespace magvit_fast::cpu
