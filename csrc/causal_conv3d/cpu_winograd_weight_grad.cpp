// causal_conv3d on the CPU: the weight gradient by Winograd's algorithm.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: winograd_weight_grad.simd.cpp and winograd_transform.simd.cpp.
//
// The threads share one group of tiles after another: both sides are transformed, then an item adds
// what the group gives to the taps of its channels. Groups come in a fixed order, so results do not
// depend on threads.
#include <cstring>

#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kGroupBytes = 16 << 20;  // of both transformed sides: they stay in the L3 cache

struct Plan : WinogradBase {
  index_t channels;  // of x in an item
  index_t weight_size, sum_size, packed_size;
  float *packed, *sources, *sums, *weights;

  Plan(const Conv3dShape& s, const Tensors& tensors, const ExecContext& ctx, Workspace& workspace)
      : WinogradBase(s, Direction::forward, tensors, ctx.isa, workspace) {
    const index_t columns = blocks * block_columns;
    const index_t tile_bytes =
        points * 4 * (planner.most_products() * layout.source_row + planner.most_sums() * columns);
    const index_t most = kGroupBytes / tile_bytes;
    cut(ceil_div(tiles, most < 4 ? 4 : most));
    channels = 64;  // as many as leave work for all threads
    while (channels > 16 && blocks * ceil_div(params.reduce, channels) < 2 * ctx.num_threads)
      channels /= 2;
    layout.weight_set = channels * block_columns + kWinogradPad;
    layout.weight_point = params.sets.count * layout.weight_set;
    weight_size = (params.m + 2) * layout.weight_point;
    sum_size = points * layout.sum_point;
    packed_size = params.reduce * params.kernel_t * 9 * columns;
    packed = workspace.take<float>(packed_size);
    sources = workspace.take<float>(points * layout.source_point);
    sums = workspace.take<float>(sum_size * blocks);
    weights = workspace.take<float>(weight_size * ctx.num_threads);
  }
};

Tensors tensors_of(const Conv3dWeightGradParams& p) {
  return {p.history, p.x, nullptr, nullptr, nullptr, const_cast<void*>(p.dy)};
}

void add_group(const Plan& plan, const TimeSegment& segment, index_t group,
               const ExecContext& ctx) {
  const WinogradParams& p = plan.params;
  const auto to_sources = MF_PICK_SIMD(winograd_sources, ctx.isa);
  const auto to_sums = MF_PICK_SIMD(winograd_sums, ctx.isa);
  const auto add = MF_PICK_SIMD(winograd_add_weights, ctx.isa);
  WinogradLayout layout;
  const WinogradTiles tiles = plan.group(group, layout);
  parallel_items(tiles.count * (1 + plan.blocks), ctx.num_threads, [&](index_t i, int) {
    const index_t tile = i % tiles.count, block = i / tiles.count - 1;
    if (block < 0)
      to_sources(p, segment, layout, tiles, tile, tile + 1, plan.sources);
    else
      to_sums(p, segment, layout, tiles, block, tile, tile + 1, plan.sums + block * plan.sum_size);
  });
  const index_t parts = ceil_div(p.reduce, plan.channels);
  parallel_items(plan.blocks * parts, ctx.num_threads, [&](index_t i, int thread) {
    const index_t block = i / parts, begin = i % parts * plan.channels;
    add(p, segment, layout, block, begin, least(begin + plan.channels, p.reduce), plan.sources,
        plan.sums + block * plan.sum_size, plan.weights + thread * plan.weight_size, plan.packed);
  });
}

// [block][in channel][tap][column] to [out channel][in channel][tap] of a group of channels.
template <class T>
void unpack(const Plan& plan, index_t group, index_t lanes, T* dweight, int num_threads) {
  const WinogradParams& p = plan.params;
  const index_t taps = p.kernel_t * 9;
  dweight += group * p.produce * p.reduce * taps;
  parallel_items(plan.blocks * p.reduce, num_threads, [&](index_t i, int) {
    const index_t block = i / p.reduce, k = i % p.reduce, first = block * plan.block_columns;
    const index_t count = least(plan.block_columns, p.produce - first);
    const index_t columns = round_up(count, lanes);
    const float* from = plan.packed + (first * p.reduce + k * columns) * taps;
    for (index_t c = 0; c < count; ++c) {
      T* to = dweight + ((first + c) * p.reduce + k) * taps;
      for (index_t tap = 0; tap < taps; ++tap) to[tap] = from_float<T>(from[tap * columns + c]);
    }
  });
}

void run(const Plan& plan, index_t group, DType dtype, void* dweight, const ExecContext& ctx) {
  parallel_ranges(plan.packed_size, ctx.num_threads, [&](index_t begin, index_t end, int) {
    std::memset(plan.packed + begin, 0, sizeof(float) * static_cast<std::size_t>(end - begin));
  });
  TimeSegment segment;
  TimePlanner planner = plan.planner;
  for (index_t s = 0; s < planner.segments(); ++s) {
    planner.plan(s, segment);
    for (index_t g = 0; g < plan.groups; ++g) add_group(plan, segment, g, ctx);
  }
  const index_t lanes = gather_lanes(ctx.isa);
  switch (dtype) {
    case DType::f32:
      return unpack(plan, group, lanes, static_cast<float*>(dweight), ctx.num_threads);
    case DType::bf16:
      return unpack(plan, group, lanes, static_cast<bf16_t*>(dweight), ctx.num_threads);
    case DType::f16:
      return unpack(plan, group, lanes, static_cast<f16_t*>(dweight), ctx.num_threads);
  }
}

}  // namespace

std::size_t winograd_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  Plan plan(shape, {}, ctx, workspace);
  return workspace.bytes();
}

void winograd_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx) {
  Workspace workspace(params.workspace);
  Plan plan(params.shape, tensors_of(params), ctx, workspace);
  for (index_t g = 0; g < params.shape.groups; ++g) {
    run(plan, g, params.shape.dtype, params.dweight, ctx);
    plan.next_channels();
  }
}

}  // namespace magvit_fast::cpu
