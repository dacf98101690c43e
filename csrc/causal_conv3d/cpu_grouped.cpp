// causal_conv3d on the CPU: forward pass and input gradient of groups of few channels.
// Previous hop: cpu.cpp.
// Next hop: grouped.simd.cpp, after cpu_tables.cpp.
#include "causal_conv3d/cpu_grouped.h"

#include <cstring>

#include "causal_conv3d/workspace.h"
#include "common/check.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kItemPixels = 256;  // of an item's rows, about
constexpr index_t kMostReduced = 64;  // channels of a group's sum, if broadcast one by one

// How groups are laid in vectors.
struct Arrangement {
  GroupLanes lanes;
  bool pairs;
  bool permutes;  // at this level

  Arrangement(const Conv3dShape& s, Direction direction, int isa) : permutes(isa > 0) {
    const index_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
    const bool forward = direction == Direction::forward;
    lanes.groups = s.groups;
    lanes.reduce = forward ? in : out;
    lanes.produce = forward ? out : in;
    pairs = s.dtype == DType::bf16 && multiplies_bf16(isa) && lanes.reduce % 2 == 0;
    lanes.units = pairs ? lanes.reduce / 2 : lanes.reduce;
    lanes.width = gather_lanes(isa);
    lanes.together = groups_together(in, out, s.groups, lanes.width);
    lanes.split = 1;
    if (lanes.together >= 2) {
      lanes.source = in * out == 1 ? GroupSource::pixel : GroupSource::spread;
      return;
    }
    lanes.source = GroupSource::broadcast;
    lanes.together = 1;
    lanes.split = ceil_div(lanes.produce, lanes.width);
  }

  bool serves(DType dtype) const {
    if (lanes.groups == 1) return false;
    if (lanes.source == GroupSource::pixel) return true;
    if (!permutes) return false;
    if (lanes.source == GroupSource::spread) return true;
    // Fewer results waste lanes, more fill the tile of the gather engine.
    return (dtype == DType::f32 || pairs) && lanes.produce > 4 && lanes.split <= kMostSplit &&
           lanes.reduce <= kMostReduced;
  }
};

struct Plan {
  GroupedParams params{};
  std::int32_t* slots = nullptr;
  void *packed = nullptr, *zeros = nullptr;
  index_t zero_count;
  index_t item_rows;
  GroupedRow* rows = nullptr;  // of thread 0
};

Plan make_plan(const Conv3dShape& s, Direction direction, const Tensors& tensors,
               const ExecContext& ctx, Workspace& workspace) {
  Plan plan;
  const bool forward = direction == Direction::forward;
  GroupedParams& p = plan.params;
  p.source = forward ? source_side(s, tensors.early_source, tensors.late_source)
                     : output_side(s, tensors.late_source);
  p.target = forward ? output_side(s, tensors.late_target)
                     : source_side(s, tensors.early_target, tensors.late_target);
  p.residual = output_side(s, tensors.residual);
  const Arrangement arrangement(s, direction, ctx.isa);
  p.lanes = arrangement.lanes;
  p.pairs = arrangement.pairs;
  p.bias = tensors.bias;
  p.type = s.dtype;
  p.kernel_t = s.t.kernel, p.kernel_h = s.h.kernel, p.kernel_w = s.w.kernel;
  check(p.source.width * p.source.channels < (index_t{1} << 31),
        "causal_conv3d: a row of x or of the result has more than 2^31 elements");
  p.t = gather_axis(s.t, direction, workspace);
  p.h = gather_axis(s.h, direction, workspace);
  // Classes of fewer columns would be tiles too small to share weights.
  const bool by_dilation = p.target.width >= kTilePixels * s.w.dilation;
  p.w = gather_width(s.w, direction, p.source.channels, workspace, by_dilation);
  const index_t taps = p.kernel_t * p.kernel_h * p.kernel_w;
  p.slots = plan.slots = workspace.take<std::int32_t>(p.w.width * (1 + p.w.slots));
  p.packed = plan.packed =
      workspace.take<float>(p.lanes.vectors() * taps * p.lanes.units * p.lanes.width);
  plan.zero_count = std::max(gather_columns(ctx.isa), p.lanes.reduce);
  p.zeros = plan.zeros = workspace.take<float>(plan.zero_count);
  plan.item_rows = std::min(p.target.height, ceil_div(kItemPixels, p.target.width));
  p.max_rows = plan.item_rows * most_sources(s.t, direction) * most_sources(s.h, direction);
  plan.rows = workspace.take<GroupedRow>(p.max_rows * ctx.num_threads);
  return plan;
}

// Whether every slot reads one column behind the one before it.
bool follows(const WidthGather& w, const std::int32_t* slot, index_t first, index_t last) {
  for (int k = 0; k < 2; ++k)
    for (index_t i = first; i + 1 < last; ++i)
      if (w.offset[slot[k + 1] * w.width + i] != w.offset[slot[k] * w.width + i + 1]) return false;
  return true;
}

void list_slots(const WidthGather& w, std::int32_t* slots) {
  for (index_t tile = 0; tile < w.tiles; ++tile, slots += 1 + w.slots) {
    const index_t first = w.tile_first[tile], last = w.tile_first[tile + 1];
    std::int32_t count = 0;
    for (index_t s = 0; s < w.slots; ++s)
      for (index_t i = first; i < last; ++i)
        if (w.offset[s * w.width + i] >= 0) {
          slots[1 + count++] = static_cast<std::int32_t>(s);
          break;
        }
    slots[0] = count;
    if (count != 3) continue;
    if (!follows(w, slots + 1, first, last)) std::swap(slots[1], slots[3]);  // taps in reverse
    if (follows(w, slots + 1, first, last)) slots[0] = kWindow;
  }
}

// [vector][tap][unit][lane]; the two channels of a pair side by side.
template <class From, class To>
void pack(const WeightView& view, const GroupLanes& l, void* packed, int threads) {
  const index_t pair = l.reduce / l.units;
  parallel_ranges(l.vectors(), threads, [&](index_t begin, index_t end, int) {
    for (index_t v = begin; v < end; ++v) {
      To* to = static_cast<To*>(packed) + v * view.taps * l.units * l.width * pair;
      for (index_t i = 0; i < view.taps * l.units * l.width * pair; ++i) to[i] = To{};
      for (index_t i = 0; i < l.lanes(v); ++i) {
        const index_t channel = l.channel(v) + i;
        const From* from = static_cast<const From*>(view.data) +
                           channel / l.produce * view.group_stride +
                           channel % l.produce * view.column_stride;
        for (index_t k = 0; k < l.reduce; ++k)
          for (index_t tap = 0; tap < view.taps; ++tap) {
            const From weight = from[k * view.reduce_stride + tap];
            To& place = to[((tap * l.units + k / pair) * l.width + i) * pair + k % pair];
            if constexpr (std::is_same_v<From, To>)
              place = weight;
            else
              place = to_float(weight);
          }
      }
    }
  });
}

void pack(const GroupedParams& p, const WeightView& view, void* packed, int threads) {
  if (p.pairs) return pack<bf16_t, bf16_t>(view, p.lanes, packed, threads);
  switch (p.type) {
    case DType::f32:
      return pack<float, float>(view, p.lanes, packed, threads);
    case DType::bf16:
      return pack<bf16_t, float>(view, p.lanes, packed, threads);
    case DType::f16:
      return pack<f16_t, float>(view, p.lanes, packed, threads);
  }
}

}  // namespace

bool grouped_serves(const Conv3dShape& s, Direction direction, int isa) {
  return Arrangement(s, direction, isa).serves(s.dtype);
}

std::size_t grouped_workspace(const Conv3dShape& shape, Direction direction,
                              const ExecContext& ctx) {
  Workspace workspace(nullptr);
  make_plan(with_flat_plane(shape), direction, {}, ctx, workspace);
  return workspace.bytes();
}

void grouped_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors,
                 void* memory, const ExecContext& ctx) {
  const Conv3dShape s = with_flat_plane(shape);
  Workspace workspace(memory);
  const Plan plan = make_plan(s, direction, tensors, ctx, workspace);
  const GroupedParams& p = plan.params;
  list_slots(p.w, plan.slots);
  std::memset(plan.zeros, 0, sizeof(float) * static_cast<std::size_t>(plan.zero_count));
  pack(p, weight_view(s, direction, tensors.weight), plan.packed, ctx.num_threads);

  const index_t height = p.target.height, frames = p.target.early_frames + p.target.late_frames;
  const index_t rows = plan.item_rows;
  const index_t row_blocks = ceil_div(height, rows);
  const index_t vectors = p.lanes.vectors();
  const index_t step = p.lanes.source == GroupSource::broadcast
                           ? p.lanes.split
                           : grouped_vectors(p.lanes.source, ctx.isa);
  const index_t chunks = ceil_div(vectors, step);
  const auto kernel = MF_PICK_SIMD(conv3d_grouped, ctx.isa);
  parallel_items(s.batch * frames * row_blocks * chunks, ctx.num_threads,
                 [&](index_t i, int thread) {
                   GroupedItem item;
                   item.vector_begin = i % chunks * step;
                   item.vector_end = std::min(item.vector_begin + step, vectors);
                   i /= chunks;
                   item.row_begin = i % row_blocks * rows;
                   item.row_end = std::min(item.row_begin + rows, height);
                   i /= row_blocks;
                   item.t = i % frames;
                   item.n = i / frames;
                   kernel(p, item, plan.rows + thread * p.max_rows);
                 });
}

}  // namespace magvit_fast::cpu
