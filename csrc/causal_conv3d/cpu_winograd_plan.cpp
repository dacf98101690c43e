// causal_conv3d on the CPU: what Winograd's algorithm needs in all three ops, and where it pays.
// Previous hop: cpu.cpp, cpu_winograd.cpp, cpu_winograd_weight_grad.cpp.
// Next hop: cpu_winograd_time.cpp.
#include "causal_conv3d/cpu_winograd_plan.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kLeastChannels = 16;
constexpr index_t kLeastPaired = 32;  // of a group in bfloat16; below, grouped.simd.cpp is faster

bool strict(const Conv3dShape& s) { return s.strict && s.dtype == DType::f32; }
index_t tile_size(const Conv3dShape& s) { return strict(s) ? 2 : 4; }
index_t time_share(const Conv3dShape& s) { return strict(s) ? 2 : 4; }

void fill_axis(const AxisMap& a, Direction direction, index_t m, std::int32_t* table,
               index_t tiles) {
  for (index_t i = 0; i < tiles * (m + 2); ++i) {
    const index_t position = i / (m + 2) * m + i % (m + 2);  // of target 0's window
    index_t source = -1;
    if (direction == Direction::input_grad)
      source = output_at(a, position, a.kernel - 1);
    else if (position < a.out + a.kernel - 1)
      source = source_at(a, position - a.front);
    table[i] = static_cast<std::int32_t>(source);
  }
}

bool can_serve(const Conv3dShape& s, ConvOp op) {
  const auto plane = [](const AxisMap& a) {
    return a.kernel == 3 && a.stride == 1 && a.dilation == 1;
  };
  if (!plane(s.h) || !plane(s.w)) return false;
  if (s.t.stride != 1 || s.t.dilation != 1 || s.t.kernel > kMaxTimeTaps) return false;
  const index_t back = last_position(s.t) - (s.t.source - 1);
  if (s.t.front >= s.t.kernel || back >= s.t.kernel) return false;
  const index_t least_channels = least(s.in_channels, s.out_channels) / s.groups;
  if (least_channels < kLeastChannels) return false;
  // cpu_fold.cpp serves one line of copies a side.
  const auto folds = [](const AxisMap& a) {
    return a.mode == PadMode::zeros || (a.front <= 1 && last_position(a) <= a.source);
  };
  return op != ConvOp::input_grad || (folds(s.h) && folds(s.w));
}

// Estimated cycles a vector against those of the direct sum; measured on Zen 4: 1.5 a product, 24 a
// transformed vector of sources or sums, 8 of weights. The direct weight gradient adds up and
// reorders 60 cycles a vector of weights, which on small planes is most of it.
bool pays(const Conv3dShape& s, ConvOp op, int isa) {
  const bool forward = op != ConvOp::input_grad;
  const TimePlanner planner(s.t, forward ? Direction::forward : Direction::input_grad,
                            time_share(s));
  const index_t height = forward ? s.h.out : s.h.source, width = forward ? s.w.out : s.w.source;
  const index_t m = tile_size(s), in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const double tiles = static_cast<double>(s.batch * ceil_div(height, m) * ceil_div(width, m));
  const double points = static_cast<double>(winograd_points(m));
  const double rows = static_cast<double>(planner.products());
  const double matrix = static_cast<double>(in * out);
  const double products = 1.5 * points * tiles * rows * matrix;
  const double transforms = 24.0 * points * tiles * rows * static_cast<double>(in + out);
  const double weights = 8.0 * points * static_cast<double>(planner.sets().count) * matrix;
  const bool pairs = s.dtype == DType::bf16 && multiplies_bf16(isa);
  if (pairs && s.groups > 1 && least(in, out) < kLeastPaired) return false;
  const double rate = (pairs ? 0.55 : 1.05) * matrix;
  const double frames = static_cast<double>(s.batch * planner.products_apart());
  const double apart =
      op == ConvOp::weight_grad ? 60.0 * 9.0 * static_cast<double>(s.t.kernel) * matrix : 0.0;
  const double direct = rate * 9.0 * static_cast<double>(height * width) * frames + apart;
  const index_t border = forward ? 0
                                 : (s.h.mode == PadMode::zeros ? 0 : 2 * width) +
                                       (s.w.mode == PadMode::zeros ? 0 : 2 * height);
  const double lines = rate * 3.0 * static_cast<double>(border) * frames;
  return products + transforms + weights + lines < direct;
}

}  // namespace

WinogradBase::WinogradBase(const Conv3dShape& s, Direction direction, const Tensors& tensors,
                           int isa, Workspace& workspace)
    : planner(s.t, direction, time_share(s)) {
  const bool forward = direction == Direction::forward;
  WinogradParams& p = params;
  p.m = tile_size(s);
  points = winograd_points(p.m);
  p.source = forward ? source_side(s, tensors.early_source, tensors.late_source)
                     : output_side(s, tensors.late_source);
  p.target = forward ? output_side(s, tensors.late_target)
                     : source_side(s, tensors.early_target, tensors.late_target);
  p.reduce = p.source.channels / s.groups;
  p.produce = p.target.channels / s.groups;
  p.mirrored = !forward;
  p.kernel_t = s.t.kernel;
  p.sets = planner.sets();
  p.bias = tensors.bias;
  p.residual = output_side(s, tensors.residual);
  p.source_type = p.target_type = s.dtype;
  p.tile_rows = ceil_div(p.target.height, p.m);
  p.tile_columns = ceil_div(p.target.width, p.m);
  tiles = s.batch * p.tile_rows * p.tile_columns;
  block_columns = gather_columns(isa);
  blocks = ceil_div(p.produce, block_columns);
  layout.source_row = round_up(p.reduce, gather_lanes(isa));

  auto* rows = workspace.take<std::int32_t>(p.tile_rows * (p.m + 2));
  auto* columns = workspace.take<std::int32_t>(p.tile_columns * (p.m + 2));
  if (!workspace.measuring()) {
    fill_axis(s.h, direction, p.m, rows, p.tile_rows);
    fill_axis(s.w, direction, p.m, columns, p.tile_columns);
  }
  p.rows = rows;
  p.columns = columns;
}

void WinogradBase::cut(index_t count) {
  layout.tiles = ceil_div(tiles, count);
  groups = ceil_div(tiles, layout.tiles);
  layout.source_point = planner.most_products() * layout.tiles * layout.source_row + kWinogradPad;
  layout.sum_point = planner.most_sums() * layout.tiles * block_columns + kWinogradPad;
}

WinogradTiles WinogradBase::group(index_t i, WinogradLayout& of_group) const {
  const index_t first = i * layout.tiles;
  of_group = layout;
  of_group.tiles = least(layout.tiles, tiles - first);
  return {first, of_group.tiles};
}

void shift_channels(WinogradParams& p, index_t groups) {
  const auto shift = [groups](auto& address, index_t bytes) {
    if (address) address = const_cast<char*>(static_cast<const char*>(address)) + groups * bytes;
  };
  const index_t sources = p.reduce * dtype_bytes(p.source_type);
  const index_t targets = p.produce * dtype_bytes(p.target_type);
  shift(p.source.early, sources), shift(p.source.late, sources);
  shift(p.target.early, targets), shift(p.target.late, targets);
  shift(p.residual.late, targets), shift(p.bias, targets);
}

void skip_source_channels(WinogradParams& p, index_t channels) {
  for (void** side : {&p.source.early, &p.source.late})
    if (*side) *side = static_cast<char*>(*side) + channels * dtype_bytes(p.source_type);
}

PackLayout winograd_packing(int isa) {
  return {2 * gather_lanes(isa), gather_lanes(isa), false, DType::f32, true};
}

bool winograd_serves(const Conv3dShape& s, ConvOp op, int isa) {
  return can_serve(s, op) && pays(s, op, isa);
}

}  // namespace magvit_fast::cpu
