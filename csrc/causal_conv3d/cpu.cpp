// causal_conv3d on the CPU: forward pass and input gradient as work for the gather engine.
// Previous hop: bindings.cpp.
// Next hop: gather.simd.cpp, after cpu_tables.cpp and cpu_pack.cpp; cpu_weight_grad.cpp.
#include <cstring>
#include <utility>

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/cpu_fold.h"
#include "causal_conv3d/cpu_grouped.h"
#include "causal_conv3d/cpu_join.h"
#include "causal_conv3d/cpu_pack.h"
#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/cpu_strip.h"
#include "causal_conv3d/cpu_tables.h"
#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "causal_conv3d/gather.h"
#include "causal_conv3d/workspace.h"
#include "common/check.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

index_t elements(const SplitTensor& t, index_t batch, bool early) {
  return batch * (early ? t.early_frames : t.late_frames) * t.height * t.width * t.channels;
}

using Packing = StripPacking;

index_t packed_bytes(const Packing& p) {
  return packed_size(p.weight, p.layout) * dtype_bytes(p.layout.type);
}

// Products of bfloat16 in hardware.
bool multiplies_pairs(const Conv3dShape& s, int isa) {
  return s.dtype == DType::bf16 && multiplies_bf16(isa);
}

bool is_narrow(index_t produce, index_t reduce) {
  return produce <= kNarrow && reduce >= 8 && reduce <= kNarrowReduce;
}

Packing gather_packing(const Conv3dShape& s, Direction direction, const void* weight, int isa) {
  const bool bf16 = multiplies_pairs(s, isa);
  const DType type = bf16 ? DType::bf16 : DType::f32;
  Packing packing{weight_view(s, direction, weight), {}};
  WeightView& view = packing.weight;
  if (!is_narrow(view.columns, view.reduce)) {
    if (joins_row_taps(s.w, direction, view.reduce)) {
      view.joined = s.w.kernel;
      view.reduce *= view.joined;
      view.taps /= view.joined;
    }
    packing.layout = {gather_columns(isa), gather_lanes(isa), bf16, type};
    return packing;
  }
  std::swap(view.reduce, view.columns);  // [taps][produce][reduce]: vectors run along the sum
  std::swap(view.reduce_stride, view.column_stride);
  packing.layout = {kNarrowReduce, narrow_lanes(isa, bf16), false, type};
  return packing;
}

// Everything the engine needs, in the workspace; with an empty workspace only its size.
struct Plan {
  GatherParams params{};
  Packing packing{};
  RowJoin join{};  // with `columns`, or
  float* wide_early = nullptr;
  float* wide_late = nullptr;
  void* zeros = nullptr;
  void* packed = nullptr;  // unless the caller has packed them
};

Plan make_plan(const Conv3dShape& s, Direction direction, const Tensors& tensors, int isa,
               Workspace& workspace) {
  Plan plan;
  const bool forward = direction == Direction::forward;
  const index_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  GatherParams& p = plan.params;
  p.groups = s.groups;
  p.reduce = forward ? in_group : out_group;
  p.produce = forward ? out_group : in_group;
  p.kernel_t = s.t.kernel, p.kernel_h = s.h.kernel, p.kernel_w = s.w.kernel;
  p.source = forward ? source_side(s, tensors.early_source, tensors.late_source)
                     : output_side(s, tensors.late_source);
  p.target = forward ? output_side(s, tensors.late_target)
                     : source_side(s, tensors.early_target, tensors.late_target);
  p.bias = tensors.bias;
  p.residual = output_side(s, tensors.residual);
  p.target_type = s.dtype;
  check(p.source.width * p.source.channels < (index_t{1} << 31),
        "causal_conv3d: a row of x or of the result has more than 2^31 elements");

  const bool bf16 = multiplies_pairs(s, isa);
  p.source_type = bf16 ? DType::bf16 : DType::f32;
  p.narrow = is_narrow(p.produce, p.reduce);
  plan.packing = gather_packing(s, direction, tensors.weight, isa);
  if (!s.packed) plan.packed = workspace.take<char>(packed_bytes(plan.packing));
  const bool joined = plan.packing.weight.joined > 1;
  if (joined) {
    plan.join = {
        p.source, p.source, s.dtype,    p.source_type,
        s.batch,  s.groups, s.w.kernel, workspace.take<std::int32_t>(p.target.width * s.w.kernel)};
    SplitTensor& to = plan.join.joined;
    to.width = p.target.width;
    to.channels *= s.w.kernel;
    to.early = workspace.take<char>(elements(to, s.batch, true) * dtype_bytes(p.source_type));
    to.late = workspace.take<char>(elements(to, s.batch, false) * dtype_bytes(p.source_type));
    p.source = to;
    p.reduce = plan.packing.weight.reduce;
    p.kernel_w = 1;
  }
  plan.zeros = workspace.take<float>(p.source.channels);
  if (!joined && !bf16 && s.dtype != DType::f32) {
    plan.wide_early = workspace.take<float>(elements(p.source, s.batch, true));
    plan.wide_late = workspace.take<float>(elements(p.source, s.batch, false));
  }
  p.packed = s.packed ? tensors.weight : plan.packed;
  p.zeros = plan.zeros;
  p.t = gather_axis(s.t, direction, workspace);
  p.h = gather_axis(s.h, direction, workspace);
  const AxisMap columns{p.target.width, p.target.width, 1, 1, 1, 0, PadMode::zeros};
  p.w = joined ? gather_width(columns, Direction::forward, p.source.channels, workspace)
               : gather_width(s.w, direction, p.source.channels, workspace);
  return plan;
}

void prepare(Plan& plan, const Conv3dShape& s, Direction direction, const ExecContext& ctx) {
  GatherParams& p = plan.params;
  if (plan.packed)
    pack_weights(plan.packing.weight, plan.packing.layout, plan.packed, ctx.num_threads);
  std::memset(plan.zeros, 0, sizeof(float) * static_cast<std::size_t>(p.source.channels));
  if (plan.join.columns) join_rows(plan.join, s.w, direction, ctx.num_threads);
  if (!plan.wide_late) return;
  const index_t early = elements(p.source, s.batch, true);
  if (early) widen(p.source.early, s.dtype, plan.wide_early, early, ctx.num_threads);
  widen(p.source.late, s.dtype, plan.wide_late, elements(p.source, s.batch, false),
        ctx.num_threads);
  p.source.early = plan.wide_early;
  p.source.late = plan.wide_late;
}

// Blocks of at most kBlockPixels pixels: some rows of a narrow frame, or a part of one wide row.
struct Blocks {
  index_t rows, row_blocks, tiles, tile_blocks;

  explicit Blocks(const GatherParams& p) {
    const index_t width = p.w.width, height = p.target.height;
    rows = width < kBlockPixels ? kBlockPixels / width : 1;
    if (rows > height) rows = height;
    row_blocks = ceil_div(height, rows);
    rows = ceil_div(height, row_blocks);  // of nearly equal size
    tiles = width <= kBlockPixels ? p.w.tiles : kBlockPixels / kTilePixels;
    tile_blocks = ceil_div(p.w.tiles, tiles);
    tiles = ceil_div(p.w.tiles, tile_blocks);
  }
};

bool by_winograd(const Conv3dShape& s, Direction direction, int isa) {
  const bool forward = direction == Direction::forward;
  return winograd_serves(s, forward ? ConvOp::forward : ConvOp::input_grad, isa);
}

void run(const Conv3dShape& shape, Direction direction, const Tensors& tensors, void* memory,
         const ExecContext& ctx) {
  if (by_winograd(shape, direction, ctx.isa))
    return winograd_run(shape, direction, tensors, memory, ctx);
  if (strip_serves(shape, direction, ctx.isa))
    return strip_run(shape, direction, tensors, memory, ctx);
  if (grouped_serves(shape, direction, ctx.isa))
    return grouped_run(shape, direction, tensors, memory, ctx);
  const Conv3dShape s = with_flat_plane(shape);
  Workspace workspace(memory);
  Plan plan = make_plan(s, direction, tensors, ctx.isa, workspace);
  prepare(plan, s, direction, ctx);
  const GatherParams& p = plan.params;
  const Blocks blocks(p);
  const index_t frames = p.target.early_frames + p.target.late_frames;
  const index_t columns = p.narrow ? 1 : ceil_div(p.produce, gather_columns(ctx.isa));
  const index_t places = s.batch * frames * blocks.row_blocks * blocks.tile_blocks;
  const auto kernel = MF_PICK_SIMD(conv3d_gather, ctx.isa);
  // Columns of weights outermost: a block of weights is used by all pixels before the next one.
  parallel_items(p.groups * columns * places, ctx.num_threads, [&](index_t i, int) {
    GatherItem item;
    const auto next = [&i](index_t count) {
      const index_t value = i % count;
      i /= count;
      return value;
    };
    const index_t tile_block = next(blocks.tile_blocks), row_block = next(blocks.row_blocks);
    item.t = next(frames);
    item.n = next(s.batch);
    item.block = next(columns);
    item.group = i;
    item.row_begin = row_block * blocks.rows;
    item.row_end = item.row_begin + blocks.rows;
    if (item.row_end > p.target.height) item.row_end = p.target.height;
    item.tile_begin = tile_block * blocks.tiles;
    item.tile_end = item.tile_begin + blocks.tiles;
    if (item.tile_end > p.w.tiles) item.tile_end = p.w.tiles;
    kernel(p, item);
  });
}

std::size_t measure(const Conv3dShape& s, Direction direction, const ExecContext& ctx) {
  if (by_winograd(s, direction, ctx.isa)) return winograd_workspace(s, direction, ctx);
  if (strip_serves(s, direction, ctx.isa)) return strip_workspace(s, direction, ctx);
  if (grouped_serves(s, direction, ctx.isa)) return grouped_workspace(s, direction, ctx);
  Workspace workspace(nullptr);
  make_plan(with_flat_plane(s), direction, {}, ctx.isa, workspace);
  return workspace.bytes();
}

Packing packing_of(const Conv3dShape& s, bool forward, const void* weight, int isa) {
  const Direction direction = forward ? Direction::forward : Direction::input_grad;
  if (by_winograd(s, direction, isa))
    return {weight_view(s, direction, weight), winograd_packing(isa)};
  if (strip_serves(s, direction, isa)) return strip_packing(s, direction, weight, isa);
  return gather_packing(s, direction, weight, isa);
}

}  // namespace

Conv3dPacking causal_conv3d_packing(const Conv3dShape& shape, bool forward,
                                    const ExecContext& ctx) {
  if (!forward && folds_border(shape, ctx)) return {0, 0};
  const Direction direction = forward ? Direction::forward : Direction::input_grad;
  if (!by_winograd(shape, direction, ctx.isa) && grouped_serves(shape, direction, ctx.isa))
    return {0, 0};
  const Packing p = packing_of(shape, forward, nullptr, ctx.isa);
  index_t kind = (p.layout.block * 64 + p.layout.lanes) * 4096 + p.weight.joined;
  for (const bool part : {p.layout.pairs, p.layout.taps_inside, p.layout.type == DType::bf16,
                          forward, p.weight.mirrored})
    kind = kind * 2 + part;
  return {static_cast<std::size_t>(packed_bytes(p)), kind};
}

void causal_conv3d_pack(const Conv3dShape& shape, bool forward, const void* weight, void* packed,
                        const ExecContext& ctx) {
  const Packing p = packing_of(shape, forward, weight, ctx.isa);
  pack_weights(p.weight, p.layout, packed, ctx.num_threads);
}

std::size_t causal_conv3d_forward_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  return measure(shape, Direction::forward, ctx);
}

std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  if (folds_border(shape, ctx)) return folded_input_grad_workspace(shape, ctx);
  return measure(shape, Direction::input_grad, ctx);
}

void causal_conv3d_forward(const Conv3dForwardParams& p, const ExecContext& ctx) {
  run(p.shape, Direction::forward, {p.history, p.x, p.weight, p.bias, nullptr, p.y, p.residual},
      p.workspace, ctx);
}

void causal_conv3d_input_grad(const Conv3dInputGradParams& p, const ExecContext& ctx) {
  if (folds_border(p.shape, ctx)) return folded_input_grad(p, ctx);
  run(p.shape, Direction::input_grad, {nullptr, p.dy, p.weight, nullptr, p.dhistory, p.dx},
      p.workspace, ctx);
}

}  // namespace magvit_fast::cpu
