// causal_conv3d: how the frames of a convolution are made of products, few of them.
// Previous hop: cpu_winograd.cpp; winograd_*.simd.cpp read the plan.
// Next hop: cpu_winograd_time.cpp.
//
// A product is a sum of source frames times a set of weights (a sum of the taps in time). A target
// frame is a sum of sums of products:
//   one frame        the distinct frames it sees; what padding repeats is added up in the weights,
//                    what padding leaves zero is no product at all
//   2 frames, F(2,3) 4 products instead of 6, error of the direct sum
//   4 frames, F(4,3) 6 products instead of 12 (3 frames: 5 instead of 9)
// The segment's frames are cut so that the number of products is least.
#pragma once

#include <cstdint>

#include "common/shape.h"

namespace magvit_fast {

constexpr index_t kMaxTimeTaps = 4;
constexpr index_t kSegmentTargets = 16;     // frames of a segment but for what is left over
constexpr index_t kMaxSegmentTargets = 24;  // the most
constexpr index_t kMaxGroupProducts = 8;    // of targets that share their products
constexpr index_t kMaxGroupTargets = 4;
constexpr index_t kMaxSegmentProducts = kMaxSegmentTargets * kMaxGroupProducts;

struct TimeSets {
  index_t count;
  float taps[32][kMaxTimeTaps];  // factors of the taps in time
};

struct TimeProduct {
  std::int32_t set;
  std::int32_t row;    // of its frames among the transformed sources of the segment
  std::int32_t sum;    // of the group that it is added to
  std::int32_t terms;  // frames
  std::int32_t frame[5];
  float factor[5];
};

// Targets that share products.
struct TimeGroup {
  index_t first_target, targets, products, sums;
  TimeProduct product[kMaxGroupProducts];
  std::int32_t sum_row[kMaxGroupProducts];            // of each sum among those of the segment
  float target[kMaxGroupTargets][kMaxGroupProducts];  // factors of the sums
};

// Rows of sources [source, source + count) times a set of weights are the rows of sums [sum, ...).
struct TimeRun {
  std::int32_t set, source, sum, count;
  bool add;  // the sums hold other products already
};

struct TimeSegment {
  index_t first_target, targets;
  index_t products, sums;  // rows
  index_t groups, runs;
  TimeGroup group[kMaxSegmentTargets];
  TimeRun run[kMaxSegmentProducts];
};

}  // namespace magvit_fast
