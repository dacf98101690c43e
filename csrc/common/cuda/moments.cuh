// Moments of the parts of a tensor by channel, and their merger to the statistics of group norm.
// Previous hop: group_norm_silu (parts are slabs), causal_conv3d (parts are tiles).
// Next hop: reduce.cuh.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/group_stats.h"

namespace magvit_fast::cuda {

// Of one channel of one part: how many values, and their mean (pivot + mean: what is next to a
// large mean keeps its digits) and squared deviations from it.
struct alignas(16) Moments {
  float count, pivot, mean, squares;
};

// Moments [spans, parts_per_span, channels] -> statistics [spans, groups].
struct MomentsMerger {
  const Moments* parts;
  index_t parts_per_span;
  int channels, groups;
  float eps;
  GroupStats* stats;
};

namespace {

constexpr int kMergeThreads = 128;

// Threads stand in columns of channels of one group; the parts of a channel are dealt to its lanes.
struct GroupColumns {
  int columns, lanes, column, lane;
  __device__ __forceinline__ explicit GroupColumns(int size) {
    const int thread = static_cast<int>(threadIdx.x);
    columns = size < kMergeThreads ? size : kMergeThreads;
    lanes = kMergeThreads / columns;
    column = thread % columns;
    lane = thread / columns;
  }
};

// One block a group of a span. Sums in float64 about the mean of the first part, in an order that
// the shape alone decides: no division a part, and nothing cancels (float64 has 29 bits to spare).
__global__ void __launch_bounds__(kMergeThreads) merge_moments_kernel(MomentsMerger m) {
  __shared__ double scratch[kMergeThreads / kWarpSize];
  const int size = m.channels / m.groups;
  const index_t span = blockIdx.x / static_cast<unsigned>(m.groups);
  const Moments* parts = m.parts + span * m.parts_per_span * m.channels +
                         blockIdx.x % static_cast<unsigned>(m.groups) * static_cast<unsigned>(size);
  const double about = static_cast<double>(parts[0].pivot) + static_cast<double>(parts[0].mean);
  double count = 0.0, first = 0.0, second = 0.0;
  const GroupColumns at(size);
  for (int c = at.column; c < size && at.lane < at.lanes; c += at.columns)
    for (index_t part = at.lane; part < m.parts_per_span; part += at.lanes) {
      const Moments one = parts[part * m.channels + c];
      const double n = static_cast<double>(one.count);
      const double away = static_cast<double>(one.pivot) + static_cast<double>(one.mean) - about;
      count += n;
      first += n * away;
      second += static_cast<double>(one.squares) + n * away * away;
    }
  count = block_sum<kMergeThreads>(count, scratch);
  first = block_sum<kMergeThreads>(first, scratch);
  second = block_sum<kMergeThreads>(second, scratch);
  if (threadIdx.x != 0) return;
  const double shift = first / count, mean = about + shift;
  double variance = second / count - shift * shift;
  if (variance < 0.0) variance = 0.0;  // NaN stays
  const float rounded = static_cast<float>(mean);
  m.stats[blockIdx.x] = {rounded, static_cast<float>(mean - static_cast<double>(rounded)),
                         static_cast<float>(1.0 / sqrt(variance + static_cast<double>(m.eps)))};
}

}  // namespace

inline void merge_moments(const MomentsMerger& merger, index_t spans, const DeviceGuard& guard,
                          const ExecContext& ctx) {
  launch(guard, ctx, merge_moments_kernel,
         grid_blocks(spans * merger.groups, "group norm: too many groups for one grid"),
         kMergeThreads, 0, merger);
}

}  // namespace magvit_fast::cuda
