// causal_conv3d on the CPU: forward pass and input gradient by Winograd's algorithm.
// Previous hop: cpu.cpp.
// Next hop: winograd_*.simd.cpp, after cpu_winograd_plan.cpp and cpu_pack.cpp.
//
// Two ways to spread the work, with the same sums in the same order:
//   apart     a thread takes a group of tiles through all three steps, in memory of its own that
//             stays in its caches. All weights are transformed first: few of them by every thread
//             for itself, many of them once for all
//   together  wide layers on small frames: the threads share one group of tiles after another, and
//             a part of the weights is transformed right before its use, so that they are never
//             all in memory (8 times the weights themselves). The widest layers do so in panels: a
//             thread keeps the sums of its columns and transforms the sources itself, a chain of
//             channels at a time, since that is little beside their products
//
// Cores that share no L3 cache need five times as long for a line that another core has written: a
// layer of 32 channels took 3.1 ms together, 1.4 where the cores were near. So what a thread reads
// it has made itself, as long as that is cheap.
#include "causal_conv3d/cpu_winograd.h"

#include "causal_conv3d/cpu_winograd_plan.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kOwnWeights = 1 << 20;  // bytes of transformed weights that a thread makes itself
constexpr index_t kApartWeights = 24 << 20;  // bytes of transformed weights kept for all threads
constexpr index_t kApartSources = 4 << 20;   // bytes of a thread's transformed sources
constexpr index_t kApartRows = 12;           // of a set of weights and a group of tiles, at least
// Transformed sources of all threads: what the L3 cache holds well beside the weights, and more
// where a set of weights would serve too few rows to be worth its making.
constexpr index_t kTogetherSources = 8 << 20, kMostTogetherSources = 16 << 20;
constexpr index_t kTogetherRows = 32;
constexpr index_t kPanelColumns =
    512;  // of the result a further thread, so that each has all sources
constexpr index_t kTogetherVectors = 2;  // of a panel: 0.3 MB of weights a set with AVX-512

struct Plan : WinogradBase {
  WeightView view;
  PackLayout pack;
  bool together;
  bool in_panels;                 // together: a thread has sources of its own, a chain at a time
  bool own_weights;               // apart: a thread's own, for one group of channels after another
  index_t panels, panel_columns;  // what a thread works on: blocks, or less of them
  index_t parts;                  // together: of the rows of points, where threads are many
  float* packed = nullptr;        // unless the caller has packed them
  float *sources = nullptr, *weights = nullptr, *sums = nullptr;  // of thread 0
  index_t source_size, weight_size, sum_size;                     // floats
  index_t* made = nullptr;  // own_weights: the group of channels whose weights a thread holds
  TimeSegment* segments = nullptr;  // apart, in_panels

  Plan(const Conv3dShape& s, Direction direction, const Tensors& tensors, const ExecContext& ctx,
       Workspace& workspace);
  WinogradColumns columns(index_t panel) const;
  // Of a group of channels: a convolution in groups is one a group, over parts of the same tensors.
  WinogradParams of_channels(index_t group) const;

 private:
  void choose(index_t channel_groups, const ExecContext& ctx);
  void take(const ExecContext& ctx, Workspace& workspace);
  index_t lanes;
};

Plan::Plan(const Conv3dShape& s, Direction direction, const Tensors& tensors,
           const ExecContext& ctx, Workspace& workspace)
    : WinogradBase(s, direction, tensors, ctx.isa, workspace),
      view(weight_view(s, direction, tensors.weight)),
      pack(winograd_packing(ctx.isa)),
      lanes(gather_lanes(ctx.isa)) {
  choose(s.groups, ctx);
  if (!s.packed) packed = workspace.take<float>(packed_size(view, pack));
  params.packed = s.packed ? static_cast<const float*>(tensors.weight) : packed;
  take(ctx, workspace);
}

WinogradColumns Plan::columns(index_t panel) const {
  const index_t first = panel * panel_columns;
  const index_t channels = least(panel_columns, params.produce - first);
  return {first, channels, round_up(channels, lanes)};
}

WinogradParams Plan::of_channels(index_t group) const {
  WinogradParams p = params;
  shift_channels(p, group);
  p.packed += group * packed_size(view, pack) / view.groups;
  return p;
}

// Whether products with several sets of weights are added to one sum.
bool sets_share_sums(const TimeSegment& segment) {
  for (index_t i = 0; i < segment.runs; ++i)
    if (segment.run[i].add) return true;
  return false;
}

bool sets_share_sums(TimePlanner planner) {
  TimeSegment segment;
  for (index_t i = 0; i < planner.segments(); ++i) {
    planner.plan(i, segment);
    if (sets_share_sums(segment)) return true;
  }
  return false;
}

// Apart or together, and how many tiles make a group.
void Plan::choose(index_t channel_groups, const ExecContext& ctx) {
  const index_t tile_bytes = points * planner.most_products() * layout.source_row * 4;
  const index_t all_weights =
      points * params.sets.count * params.reduce * round_up(params.produce, lanes) * 4;
  own_weights = all_weights <= kOwnWeights;
  index_t most = kApartSources / tile_bytes;
  // Groups for all threads, as long as a set of weights is worth its reading.
  const index_t parallel = planner.segments() * (own_weights ? channel_groups : 1);
  const index_t shared_out = ceil_div(tiles, ceil_div(2 * index_t{ctx.num_threads}, parallel));
  const index_t fewest = ceil_div(kApartRows * params.sets.count, planner.most_products());
  most = least(most, shared_out);
  if (most < fewest) most = fewest;
  together = all_weights > kApartWeights || ceil_div(tiles, most) * parallel < 2 * ctx.num_threads;
  if (together) {
    own_weights = false;
    const index_t wanted = ceil_div(kTogetherRows * params.sets.count, planner.most_products());
    most = kTogetherSources / tile_bytes;
    if (most < wanted) most = least(wanted, kMostTogetherSources / tile_bytes);
  }
  if (most < 4) most = 4;
  panel_columns = together ? least(kTogetherVectors * lanes, block_columns) : block_columns;
  panels = ceil_div(params.produce, panel_columns);
  parts = least(params.m + 2, ceil_div(index_t{ctx.num_threads}, panels));
  in_panels = together && params.produce >= kPanelColumns * (ctx.num_threads - 1) &&
              !sets_share_sums(planner);
  if (in_panels) layout.source_row = least(layout.source_row, kWinogradChain);
  const index_t count = ceil_div(tiles, most);
  cut(together ? count : round_up(count, index_t{2}));
}

void Plan::take(const ExecContext& ctx, Workspace& workspace) {
  const index_t channels = together ? least(params.reduce, kWinogradChain) : params.reduce;
  layout.sum_point = planner.most_sums() * layout.tiles * panel_columns + kWinogradPad;
  layout.weight_set = channels * panel_columns + kWinogradPad;
  layout.weight_point = (together ? 1 : params.sets.count) * layout.weight_set;
  source_size = points * layout.source_point;
  sum_size = points * layout.sum_point;
  weight_size = points * layout.weight_point;
  const index_t threads = ctx.num_threads;
  sources = workspace.take<float>(source_size * (together && !in_panels ? 1 : threads));
  sums =
      workspace.take<float>(sum_size * (in_panels || (together && parts > 1) ? panels : threads));
  weights = workspace.take<float>(weight_size * (together      ? threads
                                                 : own_weights ? panels * threads
                                                               : panels));
  if (together && !in_panels) return;
  made = workspace.take<index_t>(threads);
  segments = workspace.take<TimeSegment>(planner.segments());
  if (workspace.measuring()) return;
  for (index_t i = 0; i < threads; ++i) made[i] = -1;
  for (index_t i = 0; i < planner.segments(); ++i) planner.plan(i, segments[i]);
}

// Item i of panels * sets: a panel's weights of a set.
void make_weights(const Plan& plan, const WinogradParams& p, index_t i, float* weights, int isa) {
  const auto transform = MF_PICK_SIMD(winograd_weights, isa);
  const index_t panel = i / p.sets.count, set = i % p.sets.count;
  transform(p, plan.layout, plan.columns(panel), set, 0, p.m + 2, 0, p.reduce,
            weights + panel * plan.weight_size + set * plan.layout.weight_set);
}

// Item i of groups * segments: a group of tiles through all steps.
void run_tiles(const Plan& plan, const WinogradParams& p, index_t i, int thread,
               const float* weights, int isa) {
  const auto to_sources = MF_PICK_SIMD(winograd_sources, isa);
  const auto multiply = MF_PICK_SIMD(winograd_products, isa);
  const auto to_results = MF_PICK_SIMD(winograd_results, isa);
  const TimeSegment& segment = plan.segments[i / plan.groups];
  WinogradLayout layout;
  const WinogradTiles tiles = plan.group(i % plan.groups, layout);
  float* sources = plan.sources + thread * plan.source_size;
  float* sums = plan.sums + thread * plan.sum_size;
  to_sources(p, segment, layout, tiles, 0, tiles.count, sources);
  for (index_t panel = 0; panel < plan.panels; ++panel) {
    const WinogradColumns columns = plan.columns(panel);
    multiply(p, segment, layout, columns, 0, p.sets.count, 0, p.m + 2, 0, p.reduce, sources,
             weights + panel * plan.weight_size, sums);
    to_results(p, segment, layout, tiles, columns, 0, tiles.count, sums);
  }
}

// All groups of channels in one parallel region.
void run_apart_own(const Plan& plan, index_t channel_groups, const ExecContext& ctx) {
  const index_t items = plan.groups * plan.planner.segments();
  parallel_items(channel_groups * items, ctx.num_threads, [&](index_t i, int thread) {
    const index_t group = i / items;
    const WinogradParams p = plan.of_channels(group);
    float* weights = plan.weights + thread * plan.panels * plan.weight_size;
    if (plan.made[thread] != group) {
      for (index_t k = 0; k < plan.panels * p.sets.count; ++k)
        make_weights(plan, p, k, weights, ctx.isa);
      plan.made[thread] = group;
    }
    run_tiles(plan, p, i % items, thread, weights, ctx.isa);
  });
}

void run_apart_shared(const Plan& plan, const WinogradParams& p, const ExecContext& ctx) {
  parallel_items(plan.panels * p.sets.count, ctx.num_threads,
                 [&](index_t i, int) { make_weights(plan, p, i, plan.weights, ctx.isa); });
  parallel_items(
      plan.groups * plan.planner.segments(), ctx.num_threads,
      [&](index_t i, int thread) { run_tiles(plan, p, i, thread, plan.weights, ctx.isa); });
}

// All products of a panel and a part of the rows of points: every set's weights are made for a
// chain of channels, which stay in the L2 cache. Channels outermost, so that packed weights are
// read from memory once; but where sets share sums, sets outermost as in run_tiles: results must
// not depend on the number of threads.
void multiply_panel(const Plan& plan, const TimeSegment& segment, const WinogradLayout& layout,
                    const WinogradParams& p, index_t panel, index_t part, float* weights,
                    float* sums, int isa) {
  const auto transform = MF_PICK_SIMD(winograd_weights, isa);
  const auto multiply = MF_PICK_SIMD(winograd_products, isa);
  const WinogradColumns columns = plan.columns(panel);
  const index_t rows = p.m + 2;
  const index_t row_begin = rows * part / plan.parts, row_end = rows * (part + 1) / plan.parts;
  const index_t sets = p.sets.count, chains = ceil_div(p.reduce, kWinogradChain);
  const bool sets_first = sets_share_sums(segment);
  for (index_t i = 0; i < sets * chains; ++i) {
    const index_t set = sets_first ? i / chains : i % sets;
    const index_t begin = (sets_first ? i % chains : i / sets) * kWinogradChain;
    const index_t end = least(begin + kWinogradChain, p.reduce);
    transform(p, layout, columns, set, row_begin, row_end, begin, end, weights);
    multiply(p, segment, layout, columns, set, set + 1, row_begin, row_end, begin, end,
             plan.sources, weights, sums);
  }
}

void run_together(const Plan& plan, const WinogradParams& p, const ExecContext& ctx) {
  const auto to_sources = MF_PICK_SIMD(winograd_sources, ctx.isa);
  const auto to_results = MF_PICK_SIMD(winograd_results, ctx.isa);
  const bool whole = plan.parts == 1;
  TimePlanner planner = plan.planner;
  TimeSegment segment;
  for (index_t s = 0; s < planner.segments(); ++s) {
    planner.plan(s, segment);
    for (index_t group = 0; group < plan.groups; ++group) {
      WinogradLayout layout;
      const WinogradTiles tiles = plan.group(group, layout);
      parallel_items(tiles.count, ctx.num_threads, [&](index_t i, int) {
        to_sources(p, segment, layout, tiles, i, i + 1, plan.sources);
      });
      parallel_items(plan.panels * plan.parts, ctx.num_threads, [&](index_t i, int thread) {
        const index_t panel = i / plan.parts;
        float* sums = plan.sums + (whole ? thread : panel) * plan.sum_size;
        multiply_panel(plan, segment, layout, p, panel, i % plan.parts,
                       plan.weights + thread * plan.weight_size, sums, ctx.isa);
        if (whole) to_results(p, segment, layout, tiles, plan.columns(panel), 0, tiles.count, sums);
      });
      if (whole) continue;
      parallel_items(plan.panels * tiles.count, ctx.num_threads, [&](index_t i, int) {
        const index_t panel = i / tiles.count, tile = i % tiles.count;
        to_results(p, segment, layout, tiles, plan.columns(panel), tile, tile + 1,
                   plan.sums + panel * plan.sum_size);
      });
    }
  }
}

// The panels [begin, end) of a group of tiles; chains and sets in the order of multiply_panel.
void run_panels(const Plan& plan, const WinogradParams& p, const TimeSegment& segment,
                index_t group, index_t begin, index_t end, int thread, int isa) {
  const auto to_sources = MF_PICK_SIMD(winograd_sources, isa);
  const auto transform = MF_PICK_SIMD(winograd_weights, isa);
  const auto multiply = MF_PICK_SIMD(winograd_products, isa);
  const auto to_results = MF_PICK_SIMD(winograd_results, isa);
  const index_t rows = p.m + 2;
  float* sources = plan.sources + thread * plan.source_size;
  float* weights = plan.weights + thread * plan.weight_size;
  WinogradLayout layout;
  const WinogradTiles tiles = plan.group(group, layout);
  for (index_t k = 0; k < p.reduce; k += kWinogradChain) {
    WinogradParams chain = p;
    chain.reduce = least(kWinogradChain, p.reduce - k);
    skip_source_channels(chain, k);
    to_sources(chain, segment, layout, tiles, 0, tiles.count, sources);
    for (index_t panel = begin; panel < end; ++panel)
      for (index_t set = 0; set < p.sets.count; ++set) {
        transform(p, layout, plan.columns(panel), set, 0, rows, k, k + chain.reduce, weights);
        multiply(p, segment, layout, plan.columns(panel), set, set + 1, 0, rows, k,
                 k + chain.reduce, sources - k, weights, plan.sums + panel * plan.sum_size);
      }
  }
  for (index_t panel = begin; panel < end; ++panel)
    to_results(p, segment, layout, tiles, plan.columns(panel), 0, tiles.count,
               plan.sums + panel * plan.sum_size);
}

void run_in_panels(const Plan& plan, const WinogradParams& p, const ExecContext& ctx) {
  parallel_ranges(plan.panels, ctx.num_threads, [&](index_t begin, index_t end, int thread) {
    for (index_t i = 0; i < plan.groups * plan.planner.segments(); ++i)
      run_panels(plan, p, plan.segments[i / plan.groups], i % plan.groups, begin, end, thread,
                 ctx.isa);
  });
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
  if (plan.own_weights) return run_apart_own(plan, shape.groups, ctx);
  for (index_t g = 0; g < shape.groups; ++g) {
    const WinogradParams p = plan.of_channels(g);
    const auto run = plan.in_panels  ? run_in_panels
                     : plan.together ? run_together
                                     : run_apart_shared;
    run(plan, p, ctx);
  }
}

}  // namespace magvit_fast::cpu
