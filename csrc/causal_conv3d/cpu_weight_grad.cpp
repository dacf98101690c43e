// causal_conv3d on the CPU: the weight gradient, cut into items that own their part of the result.
// Previous hop: bindings.cpp.
// Next hop: weight_grad.simd.cpp.
//
// An item sums over all pixels in a fixed order, whatever the cutting: results do not depend on
// threads.
#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "causal_conv3d/weight_grad.h"
#include "causal_conv3d/workspace.h"
#include "common/check.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kSumBytes = 512 * 1024;  // an item's sums stay in the L2 cache

struct Cut {
  index_t vector_channels, scalar_channels;  // per group
  index_t vector_block, scalar_block, tap_block;
  index_t vector_blocks, scalar_blocks, tap_blocks, items;
};

// Which channels run along vectors: the choice that wastes fewer lanes.
bool vectors_over_output(const Conv3dShape& s, index_t lanes) {
  const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  return round_up(out, lanes) * in <= round_up(in, lanes) * out;
}

Cut cut(const Conv3dShape& s, const ExecContext& ctx) {
  Cut c;
  const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const bool over_output = vectors_over_output(s, gather_lanes(ctx.isa));
  c.vector_channels = over_output ? out : in;
  c.scalar_channels = over_output ? in : out;
  c.vector_block = gather_columns(ctx.isa);
  c.vector_blocks = ceil_div(c.vector_channels, c.vector_block);
  c.scalar_blocks = ceil_div(c.scalar_channels, kScalarChannels);
  c.scalar_block = ceil_div(c.scalar_channels, c.scalar_blocks);
  // All taps together, one kt, one (kt, kh) or one tap: as many as the cache holds and threads
  // allow.
  const index_t row = s.w.kernel, frame = s.h.kernel * row;
  for (const index_t taps : {s.t.kernel * frame, frame, row, index_t{1}}) {
    c.tap_block = taps;
    c.tap_blocks = s.t.kernel * frame / taps;
    c.items = s.groups * c.vector_blocks * c.scalar_blocks * c.tap_blocks;
    const index_t bytes = weight_grad_sums(taps, ctx.isa) * 4;
    if (bytes <= kSumBytes && c.items >= 4 * ctx.num_threads) break;
  }
  return c;
}

index_t thread_floats(const Cut& c, int isa) {
  return weight_grad_sums(c.tap_block, isa) + weight_grad_packed(isa);
}

struct Tables {
  std::int32_t *t, *h, *w;
};

Tables take_tables(const Conv3dShape& s, Workspace& workspace) {
  return {workspace.take<std::int32_t>(s.t.kernel * s.t.out),
          workspace.take<std::int32_t>(s.h.kernel * s.h.out),
          workspace.take<std::int32_t>(s.w.kernel * s.w.out)};
}

void fill(const AxisMap& axis, index_t step, std::int32_t* table) {
  for (index_t k = 0; k < axis.kernel; ++k)
    for (index_t o = 0; o < axis.out; ++o) {
      const index_t source = source_index(axis, o, k);
      *table++ = source < 0 ? -1 : static_cast<std::int32_t>(source * step);
    }
}

}  // namespace

std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  if (winograd_serves(shape, ConvOp::weight_grad, ctx.isa))
    return winograd_weight_grad_workspace(shape, ctx);
  Workspace workspace(nullptr);
  take_tables(shape, workspace);
  workspace.take<float>(thread_floats(cut(shape, ctx), ctx.isa) * ctx.num_threads);
  return workspace.bytes();
}

void causal_conv3d_weight_grad(const Conv3dWeightGradParams& p, const ExecContext& ctx) {
  const Conv3dShape& s = p.shape;
  if (winograd_serves(s, ConvOp::weight_grad, ctx.isa)) return winograd_weight_grad(p, ctx);
  check(s.w.source * s.in_channels < (index_t{1} << 31),
        "causal_conv3d: a row of x has more than 2^31 elements");
  const Cut c = cut(s, ctx);
  Workspace workspace(p.workspace);
  const Tables tables = take_tables(s, workspace);
  const index_t floats = thread_floats(c, ctx.isa);
  float* memory = workspace.take<float>(floats * ctx.num_threads);
  fill(s.t, 1, tables.t);
  fill(s.h, 1, tables.h);
  fill(s.w, s.in_channels, tables.w);

  WeightGradParams w{};
  w.source = source_side(s, p.history, p.x);
  w.output = output_side(s, p.dy);
  w.dweight = p.dweight;
  w.batch = s.batch, w.groups = s.groups;
  w.in_group = s.in_channels / s.groups, w.out_group = s.out_channels / s.groups;
  w.kernel_t = s.t.kernel, w.kernel_h = s.h.kernel, w.kernel_w = s.w.kernel;
  w.t_source = tables.t, w.h_source = tables.h, w.w_source = tables.w;
  w.vector_is_output = vectors_over_output(s, gather_lanes(ctx.isa));
  w.dtype = s.dtype;

  const auto kernel = MF_PICK_SIMD(conv3d_weight_grad, ctx.isa);
  parallel_items(c.items, ctx.num_threads, [&](index_t i, int thread) {
    const auto part = [&i](index_t count, index_t block, index_t size, index_t& begin,
                           index_t& end) {
      begin = i % count * block;
      end = begin + block < size ? begin + block : size;
      i /= count;
    };
    WeightGradItem item;
    part(c.tap_blocks, c.tap_block, c.tap_blocks * c.tap_block, item.tap_begin, item.tap_end);
    part(c.scalar_blocks, c.scalar_block, c.scalar_channels, item.scalar_begin, item.scalar_end);
    part(c.vector_blocks, c.vector_block, c.vector_channels, item.vector_begin, item.vector_end);
    item.group = i;
    kernel(w, item, memory + thread * floats);
  });
}

}  // namespace magvit_fast::cpu
