// causal_conv3d on the CPU: forward pass and input gradient by Winograd's algorithm.
// Previous hop: cpu.cpp.
// Next hop: winograd_*.simd.cpp, after cpu_winograd_plan.cpp and cpu_pack.cpp.
//
// Two ways to spread the work, with the same sums in the same order:
//   apart     all weights are transformed once; then a thread takes a group of tiles through all
//             three steps, in memory of its own that stays in its caches
//   together  wide layers on small frames: the threads share one group of tiles after another, and
//             a part of the weights is transformed right before its use, so that they are never
//             all in memory (8 times the weights themselves)
#include "causal_conv3d/cpu_winograd.h"

#include "causal_conv3d/cpu_winograd_plan.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kApartWeights = 24 << 20;  // bytes of transformed weights kept for all threads
constexpr index_t kApartSources = 4 << 20;   // bytes of a thread's transformed sources
constexpr index_t kTogetherSources = 16 << 20;

struct Plan : WinogradBase {
  WeightView view;
  PackLayout pack;
  bool together;
  index_t wave;             // blocks of columns in work at once
  float* packed = nullptr;  // unless the caller has packed them
  float *sources = nullptr, *weights = nullptr, *sums = nullptr;  // of thread 0
  index_t source_size, weight_size, sum_size;                     // floats

  Plan(const Conv3dShape& s, Direction direction, const Tensors& tensors, const ExecContext& ctx,
       Workspace& workspace);

 private:
  void choose(const ExecContext& ctx);
  void take(const ExecContext& ctx, Workspace& workspace);
};

Plan::Plan(const Conv3dShape& s, Direction direction, const Tensors& tensors,
           const ExecContext& ctx, Workspace& workspace)
    : WinogradBase(s, direction, tensors, ctx.isa, workspace),
      view(weight_view(s, direction, tensors.weight)),
      pack(winograd_packing(ctx.isa)) {
  choose(ctx);
  if (!s.packed) packed = workspace.take<float>(packed_size(view, pack));
  params.packed = s.packed ? static_cast<const float*>(tensors.weight) : packed;
  take(ctx, workspace);
}

// Apart or together, and how many tiles make a group.
void Plan::choose(const ExecContext& ctx) {
  const index_t lanes = gather_lanes(ctx.isa);
  const index_t tile_bytes = points * planner.most_products() * layout.source_row * 4;
  const index_t all_weights =
      points * params.sets.count * params.reduce * round_up(params.produce, lanes) * 4;
  const index_t apart =
      least(tiles, kApartSources / tile_bytes < 4 ? 4 : kApartSources / tile_bytes);
  together = all_weights > kApartWeights ||
             ceil_div(tiles, apart) * planner.segments() < 2 * ctx.num_threads;
  index_t most = together ? kTogetherSources / tile_bytes : apart;
  if (most < 4) most = 4;
  index_t count = ceil_div(tiles, most);
  if (!together) count = round_up(count, index_t{2});
  cut(count);
  wave = together ? least(blocks,
                          ctx.num_threads < 2 ? 1 : ceil_div(index_t{ctx.num_threads}, index_t{2}))
                  : 1;
}

void Plan::take(const ExecContext& ctx, Workspace& workspace) {
  const index_t channels = together ? least(params.reduce, kWinogradChain) : params.reduce;
  layout.weight_set = channels * block_columns + kWinogradPad;
  layout.weight_point = params.sets.count * layout.weight_set;
  source_size = points * layout.source_point;
  sum_size = points * layout.sum_point;
  if (together) {
    weight_size = (params.m + 2) * layout.weight_point;  // a row of points
    sources = workspace.take<float>(source_size);
    sums = workspace.take<float>(sum_size * wave);
    weights = workspace.take<float>(weight_size * ctx.num_threads);
  } else {
    weight_size = points * layout.weight_point;  // of a block
    weights = workspace.take<float>(weight_size * blocks);
    sources = workspace.take<float>(source_size * ctx.num_threads);
    sums = workspace.take<float>(sum_size * ctx.num_threads);
  }
}

void run_apart(Plan& plan, const ExecContext& ctx) {
  const WinogradParams& p = plan.params;
  const auto transform = MF_PICK_SIMD(winograd_weights, ctx.isa);
  const auto to_sources = MF_PICK_SIMD(winograd_sources, ctx.isa);
  const auto multiply = MF_PICK_SIMD(winograd_products, ctx.isa);
  const auto to_results = MF_PICK_SIMD(winograd_results, ctx.isa);
  constexpr index_t kChannels = 16;
  const index_t parts = ceil_div(p.reduce, kChannels);
  parallel_items(plan.blocks * parts, ctx.num_threads, [&](index_t i, int) {
    const index_t block = i / parts, begin = i % parts * kChannels;
    transform(p, plan.layout, block, 0, p.m + 2, 0, begin, least(begin + kChannels, p.reduce),
              plan.weights + block * plan.weight_size);
  });
  parallel_items(plan.groups * plan.planner.segments(), ctx.num_threads,
                 [&](index_t i, int thread) {
                   TimeSegment segment;
                   TimePlanner planner = plan.planner;
                   planner.plan(i % plan.planner.segments(), segment);
                   WinogradLayout layout;
                   const WinogradTiles tiles = plan.group(i / plan.planner.segments(), layout);
                   float* sources = plan.sources + thread * plan.source_size;
                   float* sums = plan.sums + thread * plan.sum_size;
                   to_sources(p, segment, layout, tiles, 0, tiles.count, sources);
                   for (index_t block = 0; block < plan.blocks; ++block) {
                     multiply(p, segment, layout, block, 0, plan.points, 0, p.reduce, sources,
                              plan.weights + block * plan.weight_size, sums);
                     to_results(p, segment, layout, tiles, block, 0, tiles.count, sums);
                   }
                 });
}

void run_together(Plan& plan, const ExecContext& ctx) {
  const WinogradParams& p = plan.params;
  const auto transform = MF_PICK_SIMD(winograd_weights, ctx.isa);
  const auto to_sources = MF_PICK_SIMD(winograd_sources, ctx.isa);
  const auto multiply = MF_PICK_SIMD(winograd_products, ctx.isa);
  const auto to_results = MF_PICK_SIMD(winograd_results, ctx.isa);
  const index_t rows = p.m + 2;
  TimeSegment segment;
  for (index_t s = 0; s < plan.planner.segments(); ++s) {
    plan.planner.plan(s, segment);
    for (index_t group = 0; group < plan.groups; ++group) {
      WinogradLayout layout;
      const WinogradTiles tiles = plan.group(group, layout);
      parallel_items(tiles.count, ctx.num_threads, [&](index_t i, int) {
        to_sources(p, segment, layout, tiles, i, i + 1, plan.sources);
      });
      for (index_t first = 0; first < plan.blocks; first += plan.wave) {
        const index_t wave = least(plan.wave, plan.blocks - first);
        parallel_items(wave * rows, ctx.num_threads, [&](index_t i, int thread) {
          const index_t row = i % rows;
          float* weights = plan.weights + thread * plan.weight_size;
          for (index_t begin = 0; begin < p.reduce; begin += kWinogradChain) {
            const index_t end = least(begin + kWinogradChain, p.reduce);
            transform(p, layout, first + i / rows, row, row + 1, begin, begin, end, weights);
            multiply(p, segment, layout, first + i / rows, row * rows, (row + 1) * rows, begin, end,
                     plan.sources, weights, plan.sums + i / rows * plan.sum_size);
          }
        });
        parallel_items(wave * tiles.count, ctx.num_threads, [&](index_t i, int) {
          const index_t block = i / tiles.count, tile = i % tiles.count;
          to_results(p, segment, layout, tiles, first + block, tile, tile + 1,
                     plan.sums + block * plan.sum_size);
        });
      }
    }
  }
}

}  // namespace

std::size_t winograd_workspace(const Conv3dShape& shape, Direction direction,
                               const ExecContext& ctx) {
  Workspace workspace(nullptr);
  Plan plan(shape, direction, {}, ctx, workspace);
  return workspace.bytes();
}

void winograd_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors,
                  void* memory, const ExecContext& ctx) {
  Workspace workspace(memory);
  Plan plan(shape, direction, tensors, ctx, workspace);
  if (plan.packed) pack_weights(plan.view, plan.pack, plan.packed, ctx.num_threads);
  for (index_t g = 0; g < shape.groups; ++g) {
    plan.together ? run_together(plan, ctx) : run_apart(plan, ctx);
    plan.next_channels();
    plan.params.packed += packed_size(plan.view, plan.pack) / shape.groups;
  }
}

}  // namespace magvit_fast::cpu
