// causal_conv3d on the CPU: the weight gradient, cut into items that own their part of the result.
// Previous hop: bindings.cpp.
// Next hop: weight_grad.simd.cpp.
//
// An item sums over its pixels in a fixed order, and pixels are shared out by the shape alone:
// results do not depend on threads.
#include <algorithm>

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/cpu_grouped.h"
#include "causal_conv3d/cpu_point_grad.h"
#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/cpu_slices.h"
#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "causal_conv3d/weight_grad.h"
#include "causal_conv3d/workspace.h"
#include "common/check.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kSumBytes = 512 * 1024;  // an item's sums stay in the L2 cache
// Where there are fewer items, pixels are shared out: into as many slices as are cheap to add up,
// but into some in any case.
constexpr index_t kItems = 16, kLeastItems = 8;
constexpr index_t kCheapBytes = 640 * 1024, kMostBytes = 1024 * 1024;  // sums of an item's slices

// Few output channels, few lanes: where each pixel of x meets at most one of y a tap, x can be the
// fixed side with its channels along vectors, and y moves over it with its taps in reverse.
bool swaps_sides(const Conv3dShape& s, index_t lanes) {
  const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  if (round_up(out, lanes) * in <= round_up(in, lanes) * out) return false;
  for (const AxisMap& a : {s.t, s.h, s.w})
    if (a.stride != 1 || a.mode != PadMode::zeros) return false;
  return true;
}

// The shape with its sides as the kernel sees them.
struct Sides {
  Conv3dShape s;
  bool swapped;

  Sides(const Conv3dShape& shape, int isa)
      : s(with_flat_plane(shape)), swapped(swaps_sides(s, gather_lanes(isa))) {
    if (!swapped) return;
    std::swap(s.in_channels, s.out_channels);
    s.t = reversed(s.t), s.h = reversed(s.h), s.w = reversed(s.w);
  }
};

struct Cut {
  index_t vector_channels, scalar_channels;  // per group
  index_t vector_block, scalar_block, tap_rows;
  index_t vector_blocks, scalar_blocks, tap_blocks, items, slices;
  index_t item_sums;  // floats
};

// Which channels run along vectors: the choice that wastes fewer lanes.
bool vectors_over_output(const Conv3dShape& s, index_t lanes) {
  const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  return round_up(out, lanes) * in <= round_up(in, lanes) * out;
}

Cut cut(const Conv3dShape& s, const WeightGradParams& p, const ExecContext& ctx) {
  Cut c;
  c.vector_channels = p.vector_is_output ? p.out_group : p.in_group;
  c.scalar_channels = p.vector_is_output ? p.in_group : p.out_group;
  c.vector_block = gather_columns(ctx.isa);
  c.vector_blocks = ceil_div(c.vector_channels, c.vector_block);
  c.scalar_blocks = ceil_div(c.scalar_channels, kScalarChannels);
  c.scalar_block = ceil_div(c.scalar_channels, c.scalar_blocks);
  const index_t widest = round_up(least(c.vector_block, c.vector_channels), gather_lanes(ctx.isa));
  const index_t row_sums = s.w.kernel * c.scalar_block * widest;
  const index_t whole = s.groups * c.vector_blocks * c.scalar_blocks;
  const index_t tap_rows = s.t.kernel * s.h.kernel;
  // All taps together, one kt, or one (kt, kh): as many as the caches hold.
  c.slices = 0;
  for (const index_t rows : {tap_rows, s.h.kernel, index_t{1}}) {
    c.tap_rows = rows;
    c.tap_blocks = tap_rows / rows;
    c.items = whole * c.tap_blocks;
    c.item_sums = rows * row_sums;
    // Once there are slices they stay: results must not depend on the threads.
    if (c.slices == 0 && c.item_sums * 4 <= kSumBytes) {
      const index_t cheap = least(ceil_div(kItems, c.items), kCheapBytes / (c.item_sums * 4));
      const index_t slices = std::max(cheap, ceil_div(kLeastItems, c.items));
      if (slices * c.item_sums * 4 <= kMostBytes) c.slices = least(slices, grad_blocks(p, ctx.isa));
    }
    const index_t each = c.slices > 1 ? 1 : 4;  // items of a thread; whole ones cost unequally
    if (c.slices > 0 && c.items * c.slices >= each * ctx.num_threads) break;
  }
  if (c.slices == 0) c.slices = 1;
  return c;
}

struct Plan {
  WeightGradParams params{};
  Cut cut;
  SourceTables tables;
  SliceTree tree;
  float* sums;    // [item][slice], or of each thread
  float* packed;  // of each thread
  index_t packed_size;
};

Plan make_plan(const Sides& sides, const Conv3dWeightGradParams& of, const ExecContext& ctx,
               Workspace& workspace) {
  Plan plan;
  const Conv3dShape& s = sides.s;
  WeightGradParams& p = plan.params;
  if (sides.swapped) {
    p.source = {nullptr,      const_cast<void*>(of.dy), 0, s.t.source, s.h.source, s.w.source,
                s.in_channels};
    p.output = {const_cast<void*>(of.history),
                const_cast<void*>(of.x),
                s.history_frames,
                s.frames,
                s.h.out,
                s.w.out,
                s.out_channels};
  } else {
    p.source = source_side(s, of.history, of.x);
    p.output = output_side(s, of.dy);
  }
  p.batch = s.batch, p.groups = s.groups;
  p.in_group = s.in_channels / s.groups, p.out_group = s.out_channels / s.groups;
  p.kernel_t = s.t.kernel, p.kernel_h = s.h.kernel, p.kernel_w = s.w.kernel;
  p.stride_w = s.w.stride, p.dilation_w = s.w.dilation;
  p.vector_is_output = sides.swapped || vectors_over_output(s, gather_lanes(ctx.isa));
  p.dtype = s.dtype;
  const index_t width = p.output.width, rows = grad_line_rows(s.dtype, ctx.isa);
  p.block_columns = ceil_div(width, ceil_div(width, kGradPixels));
  p.block_lines = least(kGradPixels / p.block_columns, ceil_div(p.output.height, rows));
  plan.tables = source_tables(s.t, s.h, s.w, workspace);
  p.t_source = plan.tables.t, p.h_source = plan.tables.h, p.w_source = plan.tables.w;
  p.w_run = plan.tables.w_run;
  plan.cut = cut(s, p, ctx);
  plan.tree = SliceTree(plan.cut.items, plan.cut.slices, ctx.isa, workspace);
  const index_t kept = plan.cut.slices > 1 ? plan.cut.items * plan.cut.slices : ctx.num_threads;
  plan.sums = workspace.take<float>(kept * plan.cut.item_sums);
  plan.packed_size = grad_packed(p, ctx.isa);
  plan.packed = workspace.take<float>(plan.packed_size * ctx.num_threads);
  return plan;
}

WeightGradItem item_of(const Plan& plan, index_t i, index_t slice, int isa) {
  const Cut& c = plan.cut;
  const auto part = [&i](index_t count, index_t block, index_t size, index_t& begin, index_t& end) {
    begin = i % count * block;
    end = least(begin + block, size);
    i /= count;
  };
  WeightGradItem item;
  part(c.tap_blocks, c.tap_rows, c.tap_blocks * c.tap_rows, item.tap_row_begin, item.tap_row_end);
  part(c.scalar_blocks, c.scalar_block, c.scalar_channels, item.scalar_begin, item.scalar_end);
  part(c.vector_blocks, c.vector_block, c.vector_channels, item.vector_begin, item.vector_end);
  item.group = i;
  const index_t blocks = grad_blocks(plan.params, isa);
  item.block_begin = blocks * slice / c.slices;
  item.block_end = blocks * (slice + 1) / c.slices;
  return item;
}

// An item's sums into its part of dweight [out_channels, in_channels / groups, taps].
template <class T>
void write(const WeightGradParams& p, const WeightGradItem& item, bool swapped, index_t lanes,
           const T* sums, T* dweight) {
  const index_t all_taps = p.kernel_t * p.kernel_h * p.kernel_w;
  const index_t first = item.tap_row_begin * p.kernel_w;
  const index_t taps = item.tap_row_end * p.kernel_w - first;
  const index_t scalars = item.scalar_end - item.scalar_begin;
  const index_t columns = round_up(item.vector_end - item.vector_begin, lanes);
  // A line of the sums is read once for all its columns, and results are written tap by tap.
  constexpr index_t kLine = 16, kTaps = 8;
  for (index_t s = 0; s < scalars; ++s)
    for (index_t v = item.vector_begin; v < item.vector_end; v += kLine) {
      const index_t scalar = item.scalar_begin + s, width = least(kLine, item.vector_end - v);
      index_t out = p.vector_is_output ? v : scalar, in = p.vector_is_output ? scalar : v;
      index_t outs = p.out_group, ins = p.in_group;
      if (swapped) std::swap(out, in), std::swap(outs, ins);
      const index_t step = (p.vector_is_output != swapped ? ins : 1) * all_taps;  // of columns
      T* to = dweight + ((item.group * outs + out) * ins + in) * all_taps;
      const T* from = sums + s * columns + v - item.vector_begin;
      for (index_t tap = 0; tap < taps; tap += kTaps) {
        const index_t some = least(kTaps, taps - tap);
        T line[kTaps][kLine];
        for (index_t t = 0; t < some; ++t, from += scalars * columns)
          for (index_t k = 0; k < width; ++k) line[t][k] = from[k];
        const index_t at = swapped ? all_taps - 1 - first - tap : first + tap;
        for (index_t k = 0; k < width; ++k)
          for (index_t t = 0; t < some; ++t)
            to[k * step + (swapped ? at - t : at + t)] = line[t][k];
      }
    }
}

void write(const WeightGradItem& item, const Plan& plan, const Sides& sides, int isa, float* sums,
           void* dweight) {
  const WeightGradParams& p = plan.params;
  const index_t lanes = gather_lanes(isa);
  MF_PICK_SIMD(conv3d_round_sums, isa)(sums, plan.cut.item_sums, p.dtype);
  const void* of = sums;
  switch (p.dtype) {
    case DType::f32:
      return write(p, item, sides.swapped, lanes, static_cast<const float*>(of),
                   static_cast<float*>(dweight));
    case DType::bf16:
      return write(p, item, sides.swapped, lanes, static_cast<const bf16_t*>(of),
                   static_cast<bf16_t*>(dweight));
    case DType::f16:
      return write(p, item, sides.swapped, lanes, static_cast<const f16_t*>(of),
                   static_cast<f16_t*>(dweight));
  }
}

enum class GradEngine { winograd, grouped, point, direct };

// Asked by the measuring of the workspace and by the work in it, which must agree.
GradEngine engine_for(const Conv3dShape& s, int isa) {
  if (winograd_serves(s, ConvOp::weight_grad, isa)) return GradEngine::winograd;
  if (grouped_weight_grad_serves(s, isa)) return GradEngine::grouped;
  return point_grad_serves(s) ? GradEngine::point : GradEngine::direct;
}

std::size_t direct_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  make_plan(Sides(shape, ctx.isa), {shape, nullptr, nullptr, nullptr, nullptr, nullptr}, ctx,
            workspace);
  return workspace.bytes();
}

void direct_weight_grad(const Conv3dWeightGradParams& p, const ExecContext& ctx) {
  check(p.shape.w.source * p.shape.in_channels < (index_t{1} << 31),
        "causal_conv3d: a row of x has more than 2^31 elements");
  Workspace workspace(p.workspace);
  const Sides sides(p.shape, ctx.isa);
  const Plan plan = make_plan(sides, p, ctx, workspace);
  plan.tables.fill(sides.s.t, sides.s.h, sides.s.w);

  const auto kernel = MF_PICK_SIMD(conv3d_weight_grad, ctx.isa);
  const Cut& c = plan.cut;
  parallel_items(c.items * c.slices, ctx.num_threads, [&](index_t i, int thread) {
    const index_t of = i / c.slices, slice = i % c.slices;
    const WeightGradItem item = item_of(plan, of, slice, ctx.isa);
    float* sums = plan.sums + (c.slices > 1 ? of * c.slices : thread) * c.item_sums;
    kernel(plan.params, item, sums + slice * c.item_sums, plan.packed + thread * plan.packed_size);
    if (plan.tree.add(of, slice, sums, c.item_sums))
      write(item, plan, sides, ctx.isa, sums, p.dweight);
  });
}

}  // namespace

std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  switch (engine_for(shape, ctx.isa)) {
    case GradEngine::winograd:
      return winograd_weight_grad_workspace(shape, ctx);
    case GradEngine::grouped:
      return grouped_weight_grad_workspace(shape, ctx);
    case GradEngine::point:
      return point_grad_workspace(shape, ctx);
    case GradEngine::direct:
      break;
  }
  return direct_workspace(shape, ctx);
}

void causal_conv3d_weight_grad(const Conv3dWeightGradParams& p, const ExecContext& ctx) {
  switch (engine_for(p.shape, ctx.isa)) {
    case GradEngine::winograd:
      return winograd_weight_grad(p, ctx);
    case GradEngine::grouped:
      return grouped_weight_grad(p, ctx);
    case GradEngine::point:
      return point_grad(p, ctx);
    case GradEngine::direct:
      return direct_weight_grad(p, ctx);
  }
}

}  // namespace magvit_fast::cpu
