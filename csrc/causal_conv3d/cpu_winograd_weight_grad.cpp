// causal_conv3d on the CPU: the weight gradient by Winograd's algorithm.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: winograd_weight_grad.simd.cpp and winograd_transform.simd.cpp.
//
// The threads share one group of tiles after another: both sides are transformed, then an item adds
// what the group gives to the taps of its channels; with the last group they are the result. Groups
// come in a fixed order, so results do not depend on threads.
#include <cstring>

#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kItemChannels = 32;      // a set at all points and the taps stay in the L2 cache
constexpr index_t kUnpackChannels = 16;    // a vector of columns of these stays in the L1 cache
constexpr index_t kGroupBytes = 16 << 20;  // of both transformed sides: they stay in the L3 cache

struct Plan : WinogradBase {
  index_t channels;  // of x in an item
  index_t weight_size, sum_size;
  float *packed, *sources, *sums, *weights;

  Plan(const Conv3dShape& s, const Tensors& tensors, const ExecContext& ctx, Workspace& workspace)
      : WinogradBase(s, Direction::forward, tensors, ctx.isa, workspace) {
    const index_t columns = blocks * block_columns;
    const index_t tile_bytes =
        points * 4 * (planner.most_products() * layout.source_row + planner.most_sums() * columns);
    const index_t most = kGroupBytes / tile_bytes;
    cut(ceil_div(tiles, most < 4 ? 4 : most));
    channels = kItemChannels;  // or as many as leave work for all threads
    while (channels > 16 && blocks * ceil_div(params.reduce, channels) < 2 * ctx.num_threads)
      channels /= 2;
    layout.weight_point = channels * block_columns + kWinogradPad;
    weight_size = points * layout.weight_point;
    sum_size = points * layout.sum_point;
    packed = workspace.take<float>(params.reduce * params.kernel_t * 9 * columns);
    sources = workspace.take<float>(points * layout.source_point);
    sums = workspace.take<float>(sum_size * blocks);
    weights = workspace.take<float>(weight_size * ctx.num_threads);
  }
};

Tensors tensors_of(const Conv3dWeightGradParams& p) {
  return {p.history, p.x, nullptr, nullptr, nullptr, const_cast<void*>(p.dy)};
}

// The channels [begin, end) of x in a block of columns, and their taps in the form of
// params.packed.
struct Part {
  WinogradColumns columns;
  index_t begin, end;
  float* taps;

  Part(const Plan& plan, index_t i, index_t lanes) {
    const WinogradParams& p = plan.params;
    const index_t parts = ceil_div(p.reduce, plan.channels);
    const index_t first = i / parts * plan.block_columns;
    const index_t channels = least(plan.block_columns, p.produce - first);
    columns = {first, channels, round_up(channels, lanes)};
    begin = i % parts * plan.channels;
    end = least(begin + plan.channels, p.reduce);
    taps = plan.packed + (first * p.reduce + begin * columns.width) * p.kernel_t * 9;
  }
};

void run(const Plan& plan, void* dweight, const ExecContext& ctx) {
  const WinogradParams& p = plan.params;
  const auto to_sources = MF_PICK_SIMD(winograd_sources, ctx.isa);
  const auto to_sums = MF_PICK_SIMD(winograd_sums, ctx.isa);
  const auto add = MF_PICK_SIMD(winograd_add_weights, ctx.isa);
  const auto unpack = MF_PICK_SIMD(winograd_unpack, ctx.isa);
  const index_t parts = ceil_div(p.reduce, plan.channels), taps = p.kernel_t * 9;
  const index_t lanes = gather_lanes(ctx.isa);
  TimeSegment segment;
  TimePlanner planner = plan.planner;
  const index_t rounds = planner.segments() * plan.groups;
  for (index_t round = 0; round < rounds; ++round) {
    if (round % plan.groups == 0) planner.plan(round / plan.groups, segment);
    WinogradLayout layout;
    const WinogradTiles tiles = plan.group(round % plan.groups, layout);
    parallel_items(tiles.count * (1 + plan.blocks), ctx.num_threads, [&](index_t i, int) {
      const index_t tile = i % tiles.count, block = i / tiles.count - 1;
      if (block < 0)
        to_sources(p, segment, layout, tiles, tile, tile + 1, plan.sources);
      else
        to_sums(p, segment, layout, tiles, block, tile, tile + 1,
                plan.sums + block * plan.sum_size);
    });
    parallel_items(plan.blocks * parts, ctx.num_threads, [&](index_t i, int thread) {
      const Part part(plan, i, lanes);
      const index_t size = (part.end - part.begin) * taps * part.columns.width;
      if (round == 0) std::memset(part.taps, 0, sizeof(float) * static_cast<std::size_t>(size));
      add(p, segment, layout, i / parts, part.begin, part.end, plan.sources,
          plan.sums + i / parts * plan.sum_size, plan.weights + thread * plan.weight_size,
          plan.packed);
      if (round + 1 == rounds) unpack(p, part.columns, part.begin, part.end, part.taps, dweight);
    });
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
    const index_t weights = plan.params.produce * plan.params.reduce * plan.params.kernel_t * 9;
    run(plan, static_cast<char*>(params.dweight) + g * weights * dtype_bytes(params.shape.dtype),
        ctx);
    plan.next_channels();
  }
}

}  // namespace magvit_fast::cpu
