// causal_conv3d on the CPU: plans the products along time (winograd_time.h says what they are).
// Previous hop: cpu_winograd.cpp.
// Next hop: cpu_winograd_time.cpp.
#pragma once

#include "causal_conv3d/cpu_tables.h"
#include "causal_conv3d/winograd_time.h"

namespace magvit_fast::cpu {

class TimePlanner {
 public:
  // most: how many targets may share products; 1, 2 or 4. Sets of weights are collected on the way.
  TimePlanner(const AxisMap& axis, Direction direction, index_t most);

  index_t segments() const { return segments_; }
  const TimeSets& sets() const { return sets_; }
  // Products of all targets, and how many there would be without sharing.
  index_t products() const { return products_; }
  index_t products_apart() const { return products_apart_; }
  index_t most_products() const { return most_products_; }  // rows of any segment
  index_t most_sums() const { return most_sums_; }
  void plan(index_t segment, TimeSegment& out);

 private:
  struct Seen {  // the distinct frames of a target and the taps through which it sees them
    index_t count;
    std::int32_t frame[2 * kMaxTimeTaps];
    float taps[2 * kMaxTimeTaps][kMaxTimeTaps];
  };

  Seen seen(index_t target) const;
  index_t frame_at(index_t target, index_t offset) const;
  bool regular(index_t target) const;
  bool shared_product(index_t first, index_t order, index_t point, TimeProduct& product);
  index_t shared_cost(index_t first, index_t count);
  std::int32_t find_set(const float* taps);
  void add_group(index_t first, index_t count, TimeSegment& out);
  void arrange(TimeSegment& out) const;

  AxisMap axis_;
  Direction direction_;
  index_t most_, targets_, segments_, first_length_;
  index_t products_ = 0, products_apart_ = 0, most_products_ = 0, most_sums_ = 0;
  TimeSets sets_{};
};

}  // namespace magvit_fast::cpu
