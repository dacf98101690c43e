// causal_conv3d on the CPU: forward pass and input gradient as work for the strip engine.
// Previous hop: cpu.cpp.
// Next hop: strip.simd.cpp, after cpu_pack.cpp.
//
// The input gradient at stride 1 under zero padding is a forward pass from dy to dx with its taps
// in reverse, so the engine knows one direction only.
#include "causal_conv3d/cpu_strip.h"

#include <algorithm>
#include <utility>

#include "causal_conv3d/strip.h"
#include "causal_conv3d/workspace.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kMostFolded = 8;               // channels
constexpr index_t kMostPanelBytes = 256 * 1024;  // weights of a block of columns: L2
constexpr index_t kCopiedPixels = 128;           // of an item; rows around them are copied, too
constexpr index_t kReadPixels = 96;              // of an item that reads in place
constexpr index_t kLeastItems = 32;              // or time is cut, though the cuts share frames
constexpr index_t kTurnedPixels = 256;           // of an item with turned strips
constexpr index_t kMostTurned = 256;             // channels
constexpr index_t kMostColumns = 256;            // of a strip

bool unpadded(const AxisMap& a) { return a.front <= 0 && last_position(a) < a.source; }

// The work seen as a forward pass.
struct Pass {
  AxisMap t, h, w;
  index_t reduce, produce;
  bool mirrored;
  DType work_type;
  StripRun run;

  Pass(const Conv3dShape& s, Direction direction, int isa)
      : t(s.t), h(s.h), w(s.w), reduce(s.in_channels), produce(s.out_channels), mirrored(false) {
    if (direction == Direction::input_grad) {
      std::swap(reduce, produce);
      t = reversed(t), h = reversed(h), w = reversed(w);
      mirrored = true;
    }
    work_type = s.dtype == DType::bf16 && multiplies_bf16(isa) ? DType::bf16 : DType::f32;
    const bool odd = work_type == DType::bf16 && reduce % 2;
    const bool plane = h.kernel * w.kernel > 1;
    const bool narrow = produce <= kNarrow && reduce > kMostFolded;
    run = narrow                                    ? StripRun::pixels
          : w.dilation > 1 && w.kernel > 1          ? StripRun::channels
          : reduce <= kMostFolded && (plane || odd) ? StripRun::frame
                                                    : StripRun::row;
  }

  index_t across() const {  // taps of a run
    return run == StripRun::frame ? h.kernel * w.kernel : run == StripRun::row ? w.kernel : 1;
  }
  index_t taps() const { return t.kernel * h.kernel * w.kernel; }
  index_t run_length() const {
    return round_up(reduce * across(), index_t{work_type == DType::bf16 ? 2 : 1});
  }
};

// Whether every target meets at most one source a tap.
bool reversible(const AxisMap& a) {
  return a.stride == 1 && (a.mode == PadMode::zeros || unpadded(a));
}

AxisMap with_zeros(AxisMap a) {
  if (unpadded(a)) a.mode = PadMode::zeros;
  return a;
}

Conv3dShape plain(const Conv3dShape& shape) {
  Conv3dShape s = with_flat_plane(shape);
  s.t = with_zeros(s.t), s.h = with_zeros(s.h), s.w = with_zeros(s.w);
  return s;
}

// Tables and memory, in the workspace; with an empty workspace only its size.
struct Plan {
  StripParams params{};
  void* packed = nullptr;  // unless the caller has packed them
  char* memory;
  index_t memory_size;  // of a thread
};

StripAxis take_axis(const AxisMap& a, Workspace& workspace) {
  return {workspace.take<std::int32_t>(padded_positions(a)), a.kernel, a.stride, a.dilation};
}

void fill(const AxisMap& a, const StripAxis& axis) {
  auto* table = const_cast<std::int32_t*>(axis.source);
  for (index_t q = 0; q < padded_positions(a); ++q)
    table[q] = static_cast<std::int32_t>(source_at(a, q - a.front));
}

// Parts of nearly equal size, at most `most`.
index_t part(index_t count, index_t most) { return ceil_div(count, ceil_div(count, most)); }

Plan make_plan(const Conv3dShape& s, Direction direction, const Tensors& tensors,
               const ExecContext& ctx, Workspace& workspace) {
  const bool forward = direction == Direction::forward;
  const Pass pass(s, direction, ctx.isa);
  Plan plan;
  StripParams& p = plan.params;
  p.source = forward ? source_side(s, tensors.early_source, tensors.late_source)
                     : output_side(s, tensors.late_source);
  p.target = forward ? output_side(s, tensors.late_target)
                     : source_side(s, tensors.early_target, tensors.late_target);
  p.residual = output_side(s, tensors.residual);
  p.bias = tensors.bias;
  p.reduce = pass.reduce, p.produce = pass.produce;
  p.t = take_axis(pass.t, workspace);
  p.h = take_axis(pass.h, workspace);
  p.w = take_axis(pass.w, workspace);
  p.run = pass.run;
  p.mirrored = pass.mirrored;
  p.source_type = p.target_type = s.dtype;
  p.work_type = pass.work_type;
  const bool turned = p.run == StripRun::pixels;
  p.copied =
      p.run == StripRun::frame || turned || p.source_type != p.work_type || !unpadded(pass.w);

  const index_t width = p.target.width, height = p.target.height;
  const index_t pixels = turned ? kTurnedPixels : p.copied ? kCopiedPixels : kReadPixels;
  p.columns = part(width, turned ? kTurnedColumns : p.copied ? kMostColumns : pixels);
  p.rows = part(height, std::max(pixels / p.columns, index_t{1}));
  p.run_length = pass.run_length();
  const index_t bytes = dtype_bytes(p.work_type);
  if (p.copied)
    p.strip_length = round_up(strip_span(p.w, p.columns) * p.reduce + kStripSlack, index_t{32});
  if (turned) {
    const index_t pair = p.work_type == DType::bf16 ? 2 : 1;
    p.strip_columns =
        round_up(p.columns, gather_columns(ctx.isa)) + (p.w.kernel - 1) * p.w.dilation;
    p.strip_length = ceil_div(p.reduce, pair) * p.strip_columns * pair;
  }
  if (p.run == StripRun::frame) p.fold_length = round_up(p.run_length + 32 / bytes, index_t{4});
  plan.memory_size = round_up(strip_memory(p) * bytes, index_t{64});
  plan.memory = workspace.take<char>(plan.memory_size * ctx.num_threads);
  if (!s.packed) {
    const StripPacking packing = strip_packing(s, direction, tensors.weight, ctx.isa);
    plan.packed = workspace.take<char>(packed_size(packing.weight, packing.layout) * bytes);
  }
  p.packed = s.packed ? tensors.weight : plan.packed;
  if (workspace.measuring()) return plan;
  fill(pass.t, p.t), fill(pass.h, p.h), fill(pass.w, p.w);
  return plan;
}

}  // namespace

StripPacking strip_packing(const Conv3dShape& s, Direction direction, const void* weight, int isa) {
  const Pass pass(plain(s), direction, isa);
  StripPacking packing{weight_view(s, direction, weight), {}};
  WeightView& view = packing.weight;
  view.joined = pass.across();
  view.mirrored = pass.mirrored;
  view.reduce *= view.joined;
  view.taps /= view.joined;
  const bool turned = pass.run == StripRun::pixels;
  packing.layout = {gather_columns(isa), turned ? 1 : gather_lanes(isa),
                    pass.work_type == DType::bf16, pass.work_type};
  return packing;
}

bool strip_serves(const Conv3dShape& shape, Direction direction, int isa) {
  if (shape.groups > 1) return false;
  const Conv3dShape s = plain(shape);
  if (direction == Direction::input_grad)
    for (const AxisMap& a : {s.t, s.h, s.w})
      if (!reversible(a)) return false;
  const Pass pass(s, direction, isa);
  if (pass.taps() > kMostStripRuns) return false;
  if (pass.run == StripRun::pixels)
    return pass.work_type == DType::bf16 && pass.w.stride == 1 && pass.reduce <= kMostTurned;
  if (pass.work_type == DType::bf16 && pass.run != StripRun::frame && pass.reduce % 2) return false;
  const index_t columns = std::min(pass.produce, gather_columns(isa));
  return pass.taps() * pass.reduce * columns * dtype_bytes(pass.work_type) <= kMostPanelBytes;
}

std::size_t strip_workspace(const Conv3dShape& shape, Direction direction, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  make_plan(plain(shape), direction, {}, ctx, workspace);
  return workspace.bytes();
}

void strip_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors, void* memory,
               const ExecContext& ctx) {
  const Conv3dShape s = plain(shape);
  Workspace workspace(memory);
  const Plan plan = make_plan(s, direction, tensors, ctx, workspace);
  if (plan.packed) {
    const StripPacking packing = strip_packing(s, direction, tensors.weight, ctx.isa);
    pack_weights(packing.weight, packing.layout, plan.packed, ctx.num_threads);
  }
  const StripParams& p = plan.params;
  const index_t across = ceil_div(p.target.width, p.columns);
  const index_t down = ceil_div(p.target.height, p.rows);
  const index_t frames = p.target.early_frames + p.target.late_frames;
  const index_t apart = s.batch * down * across;
  const index_t cuts = p.copied ? std::min(ceil_div(kLeastItems, apart), frames) : frames;
  const auto kernel = p.run == StripRun::pixels ? MF_PICK_SIMD(conv3d_strip_turned, ctx.isa)
                                                : MF_PICK_SIMD(conv3d_strip, ctx.isa);
  // Neighbors in one thread: what they read and write may still be in its cache from the op before.
  // Cuts of time are neighbors, too: the first frames see less.
  const auto run = [&](index_t begin, index_t end, int thread) {
    for (index_t i = begin; i < end; ++i) {
      const index_t cut = p.copied ? i % cuts : i / (down * across) % cuts;
      const index_t place = p.copied ? i / cuts % (down * across) : i % (down * across);
      const index_t n = i / cuts / (down * across);
      const index_t column = place % across * p.columns, row = place / across * p.rows;
      kernel(p,
             {n, frames * cut / cuts, frames * (cut + 1) / cuts, row,
              std::min(row + p.rows, p.target.height), column,
              std::min(column + p.columns, p.target.width)},
             plan.memory + thread * plan.memory_size);
    }
  };
  parallel_ranges(apart * cuts, ctx.num_threads, run);
}

}  // namespace magvit_fast::cpu
