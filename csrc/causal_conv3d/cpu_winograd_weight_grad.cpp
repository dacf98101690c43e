// causal_conv3d on the CPU: the weight gradient by Winograd's algorithm.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: winograd_weight_grad.simd.cpp and winograd_transform.simd.cpp.
//
// Threads exchange no transformed tensors: cores that share no cache read each other's memory five
// times slower than near ones. An item of work owns a rectangle of the weights of a slice, makes
// what it needs of both sides in memory of its thread and adds up its groups of tiles:
//   slices      of the groups of tiles, by the shape alone, each with weights of its own, which are
//               added in their order at the end. Nothing is made twice
//   rectangles  where weights are too large for many slices, or threads are many: a range of
//               channels of x is transformed anew for every range of columns, and the reverse
// Groups of tiles, too, are cut by the shape alone, so results do not depend on threads.
#include <cstring>

#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kPartChannels = 32;    // a set of their weights stays in the L2 cache
constexpr index_t kUnpackChannels = 16;  // a vector of columns of these stays in the L1 cache
// A group's transformed tensors, of all channels of x and a block of columns: in the L2 cache where
// that holds enough tiles, else in the L3 cache.
constexpr index_t kNearBytes = 1 << 20, kGroupBytes = 12 << 20;
// Rows that each set of weights should serve in a group, as its way back to the taps takes as long
// as the products of four; more than twice these would gain little.
constexpr index_t kSetRows = 24;
constexpr index_t kLeastTiles = 4;
constexpr index_t kMostSlices = 8;
// Of all slices' weights: an eighth of both tensors, or what is little beside any.
constexpr index_t kShareOfTensors = 8, kSliceBytes = 1 << 20;

struct Plan : WinogradBase {
  index_t conv_groups, width;        // width: columns of all blocks
  index_t slices, rounds;            // rounds: groups of tiles of all segments
  index_t channels, channel_ranges;  // of x: of an item, and how many ranges
  index_t block_count, block_ranges;
  index_t source_size, sum_size, weight_size, packed_size;  // floats
  TimeSegment* segments;
  float *packed, *sources, *sums, *weights;

  Plan(const Conv3dShape& s, const Tensors& tensors, const ExecContext& ctx, Workspace& workspace);
  index_t items() const { return slices * conv_groups * channel_ranges * block_ranges; }
  WinogradTiles tiles_of(index_t round, WinogradLayout& of_group) const;
  WinogradParams params_of(index_t conv_group, index_t first_channel, index_t count) const;
  WinogradColumns columns(index_t block) const;

 private:
  void cut_tiles(const Conv3dShape& s);
  void cut_weights(const ExecContext& ctx);
  index_t lanes;
};

Plan::Plan(const Conv3dShape& s, const Tensors& tensors, const ExecContext& ctx,
           Workspace& workspace)
    : WinogradBase(s, Direction::forward, tensors, ctx.isa, workspace),
      conv_groups(s.groups),
      lanes(gather_lanes(ctx.isa)) {
  width = round_up(params.produce, lanes);
  packed_size = params.reduce * params.kernel_t * 9 * width;
  block_columns = least(block_columns, width);
  cut_tiles(s);
  cut_weights(ctx);
  layout.source_row = round_up(channels, lanes);
  layout.source_point = planner.most_products() * layout.tiles * layout.source_row + kWinogradPad;
  layout.sum_point = planner.most_sums() * layout.tiles * block_columns + kWinogradPad;
  layout.weight_point = least(kPartChannels, channels) * block_columns + kWinogradPad;
  source_size = points * layout.source_point;
  sum_size = points * layout.sum_point;
  weight_size = points * layout.weight_point;
  segments = workspace.take<TimeSegment>(planner.segments());
  for (index_t i = 0; !workspace.measuring() && i < planner.segments(); ++i)
    planner.plan(i, segments[i]);
  const index_t threads = least(ctx.num_threads, items());
  packed = workspace.take<float>(packed_size * conv_groups * slices);
  sources = workspace.take<float>(source_size * threads);
  sums = workspace.take<float>(sum_size * threads);
  weights = workspace.take<float>(weight_size * threads);
}

void Plan::cut_tiles(const Conv3dShape& s) {
  const SplitTensor &x = params.source, &y = params.target;
  const index_t tensors = s.batch * dtype_bytes(s.dtype) *
                          ((x.early_frames + x.late_frames) * x.height * x.width * x.channels +
                           y.late_frames * y.height * y.width * y.channels);
  const index_t tile_bytes =
      points * 4 *
      (planner.most_products() * layout.source_row + planner.most_sums() * block_columns);
  const index_t enough = ceil_div(kSetRows * params.sets.count, planner.most_products());
  const index_t share = tensors / kShareOfTensors, room = share < kSliceBytes ? kSliceBytes : share;
  const index_t all_tiles = tiles * planner.segments();
  slices = 1;
  while (slices * conv_groups < kMostSlices && 2 * slices * conv_groups * packed_size * 4 <= room &&
         2 * slices * enough <= all_tiles)
    slices *= 2;
  index_t most = kNearBytes / tile_bytes;
  if (most < enough) most = least(kGroupBytes / tile_bytes, 2 * enough);
  if (most < kLeastTiles) most = kLeastTiles;
  // As many rounds in every slice.
  index_t step = slices;
  for (index_t n = planner.segments(); step > 1 && n % 2 == 0; n /= 2) step /= 2;
  groups = least(tiles, round_up(ceil_div(tiles, most), step));
  layout.tiles = ceil_div(tiles, groups);
  rounds = groups * planner.segments();
}

// The ranges of channels and columns that leave each thread the least to do, in cycles a vector
// (cpu_winograd_plan.cpp).
void Plan::cut_weights(const ExecContext& ctx) {
  double least_cost = 0;
  const index_t most = least(ceil_div(params.reduce, lanes), ctx.num_threads);
  for (index_t b = 1; b <= least(blocks, ctx.num_threads); ++b)
    for (index_t r = 1; r <= most; ++r) {
      const index_t in = round_up(ceil_div(params.reduce, r), lanes), of = ceil_div(blocks, b);
      const double out = static_cast<double>(least(of * block_columns, width));
      const index_t turns = ceil_div(slices * conv_groups * r * b, index_t{ctx.num_threads});
      const double cost = static_cast<double>(turns) * (1.5 * static_cast<double>(in) * out +
                                                        24.0 * (static_cast<double>(in) + out));
      if (b * r > 1 && cost >= least_cost) continue;
      least_cost = cost;
      channels = in, block_count = of;
    }
  channel_ranges = ceil_div(params.reduce, channels);
  block_ranges = ceil_div(blocks, block_count);
}

WinogradTiles Plan::tiles_of(index_t round, WinogradLayout& of_group) const {
  const index_t i = round % groups, first = tiles * i / groups;
  of_group = layout;
  of_group.tiles = tiles * (i + 1) / groups - first;
  return {first, of_group.tiles};
}

// As if the tensors had the channels of one group of the convolution, and x only these of them.
WinogradParams Plan::params_of(index_t conv_group, index_t first_channel, index_t count) const {
  WinogradParams p = params;
  shift_channels(p, conv_group);
  skip_source_channels(p, first_channel);
  p.reduce = count;
  return p;
}

WinogradColumns Plan::columns(index_t block) const {
  const index_t first = block * block_columns;
  const index_t count = least(block_columns, params.produce - first);
  return {first, count, round_up(count, lanes)};
}

Tensors tensors_of(const Conv3dWeightGradParams& p) {
  return {p.history, p.x, nullptr, nullptr, nullptr, const_cast<void*>(p.dy)};
}

// The channels of x [begin, end) of a group of the convolution: what an item owns of them.
struct Range {
  index_t conv_group, begin, end;
  float* packed;  // in the form of params.packed, of these channels

  Range(const Plan& plan, index_t slice, index_t group, index_t i) : conv_group(group) {
    const WinogradParams& p = plan.params;
    begin = i * plan.channels;
    end = least(begin + plan.channels, p.reduce);
    packed = plan.packed + (slice * plan.conv_groups + group) * plan.packed_size +
             begin * p.kernel_t * 9 * plan.width;
  }
  // The taps of a block of columns and the channel k of the range.
  float* taps(const Plan& plan, const WinogradColumns& columns, index_t k) const {
    return packed + (columns.first * (end - begin) + k * columns.width) * plan.params.kernel_t * 9;
  }
  std::size_t size(const Plan& plan, const WinogradColumns& columns, index_t count) const {
    return static_cast<std::size_t>(count * columns.width * plan.params.kernel_t * 9);
  }
};

// Taps of the channels [k, end) of a range, to the result.
void unpack(const Plan& plan, const Range& range, index_t block, index_t k, index_t end,
            void* dweight, int isa) {
  const WinogradParams& p = plan.params;
  const WinogradColumns columns = plan.columns(block);
  const index_t weights = p.produce * p.reduce * p.kernel_t * 9 * dtype_bytes(p.target_type);
  MF_PICK_SIMD(winograd_unpack, isa)
  (p, columns, range.begin + k, range.begin + end, range.taps(plan, columns, k),
   static_cast<char*>(dweight) + range.conv_group * weights);
}

class Item {
 public:
  Item(const Plan& plan, index_t i, int thread, const ExecContext& ctx)
      : plan_(plan),
        block_range_(i % plan.block_ranges),
        range_(range_of(plan, i / plan.block_ranges)),
        slice_(i / plan.block_ranges / plan.channel_ranges / plan.conv_groups),
        sources_(plan.sources + thread * plan.source_size),
        sums_(plan.sums + thread * plan.sum_size),
        weights_(plan.weights + thread * plan.weight_size),
        isa_(ctx.isa) {}

  void run(void* dweight) const {
    const WinogradParams p =
        plan_.params_of(range_.conv_group, range_.begin, range_.end - range_.begin);
    const auto to_sources = MF_PICK_SIMD(winograd_sources, isa_);
    const auto to_sums = MF_PICK_SIMD(winograd_sums, isa_);
    const index_t begin = plan_.rounds * slice_ / plan_.slices;
    const index_t end = plan_.rounds * (slice_ + 1) / plan_.slices;
    for (index_t round = begin; round < end; ++round) {
      const TimeSegment& segment = plan_.segments[round / plan_.groups];
      WinogradLayout layout;
      const WinogradTiles tiles = plan_.tiles_of(round, layout);
      to_sources(p, segment, layout, tiles, 0, tiles.count, sources_);
      const index_t first = block_range_ * plan_.block_count;
      for (index_t b = first; b < least(first + plan_.block_count, plan_.blocks); ++b) {
        to_sums(p, segment, layout, tiles, b, 0, tiles.count, sums_);
        add(p, segment, layout, b, round == begin,
            round + 1 == end && plan_.slices == 1 ? dweight : nullptr);
      }
    }
  }

 private:
  static Range range_of(const Plan& plan, index_t i) {
    const index_t group = i / plan.channel_ranges;
    return {plan, group / plan.conv_groups, group % plan.conv_groups, i % plan.channel_ranges};
  }

  // dweight: where the taps go after this group of tiles, or null.
  void add(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout,
           index_t block, bool first, void* dweight) const {
    const auto add_weights = MF_PICK_SIMD(winograd_add_weights, isa_);
    const WinogradColumns columns = plan_.columns(block);
    for (index_t k = 0; k < p.reduce; k += kPartChannels) {
      const index_t next = least(k + kPartChannels, p.reduce);
      if (first)
        std::memset(range_.taps(plan_, columns, k), 0,
                    sizeof(float) * range_.size(plan_, columns, next - k));
      add_weights(p, segment, layout, block, k, next, sources_, sums_, weights_, range_.packed);
      if (dweight) unpack(plan_, range_, block, k, next, dweight, isa_);
    }
  }

  const Plan& plan_;
  index_t block_range_;
  Range range_;
  index_t slice_;
  float *sources_, *sums_, *weights_;
  int isa_;
};

// All slices' taps, in their order.
void add_slices(const Plan& plan, void* dweight, const ExecContext& ctx) {
  const index_t parts = ceil_div(plan.channels, kUnpackChannels);
  const index_t ranges = plan.conv_groups * plan.channel_ranges;
  parallel_items(ranges * plan.blocks * parts, ctx.num_threads, [&](index_t i, int) {
    const index_t k = i % parts * kUnpackChannels, block = i / parts % plan.blocks;
    const index_t group = i / parts / plan.blocks / plan.channel_ranges;
    const Range range(plan, 0, group, i / parts / plan.blocks % plan.channel_ranges);
    const index_t next = least(k + kUnpackChannels, range.end - range.begin);
    if (k >= next) return;
    const WinogradColumns columns = plan.columns(block);
    const auto size = static_cast<index_t>(range.size(plan, columns, next - k));
    const index_t step = plan.packed_size * plan.conv_groups;
    float* to = range.taps(plan, columns, k);
    for (index_t slice = 1; slice < plan.slices; ++slice)
      for (index_t j = 0; j < size; ++j) to[j] += to[slice * step + j];
    unpack(plan, range, block, k, next, dweight, ctx.isa);
  });
}

}  // namespace

std::size_t winograd_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  Plan plan(shape, {}, ctx, workspace);
  return workspace.bytes();
}

void winograd_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx) {
  Workspace workspace(params.workspace);
  const Plan plan(params.shape, tensors_of(params), ctx, workspace);
  parallel_items(plan.items(), ctx.num_threads,
                 [&](index_t i, int thread) { Item(plan, i, thread, ctx).run(params.dweight); });
  if (plan.slices > 1) add_slices(plan, params.dweight, ctx);
}

}  // namespace magvit_fast::cpu
