// causal_conv3d on the CPU: sums over slices of the pixels, added up by the threads that made them.
// Previous hop: cpu_weight_grad.cpp, cpu_grouped_weight_grad.cpp, cpu_point_grad.cpp.
// Next hop: none.
//
// Slices are the leaves of a binary tree that depends on their number alone, and so do results. Two
// neighbors become one in the thread that made the later of them, where at least its own half is
// still in the cache: no second parallel region, in which one thread would read what the other made
// (between cores without a common L3 cache a line costs as much as hundreds of additions).
#pragma once

#include <atomic>
#include <new>

#include "causal_conv3d/weight_grad.h"
#include "causal_conv3d/workspace.h"

namespace magvit_fast::cpu {
namespace {

class SliceTree {
 public:
  SliceTree() = default;
  SliceTree(index_t items, index_t slices, int isa, Workspace& workspace)
      : add_(MF_PICK_SIMD(conv3d_add_sums, isa)),
        slices_(slices),
        half_(workspace.take<Half>(items * slices)) {
    if (workspace.measuring()) return;
    for (index_t i = 0; i < items * slices; ++i) new (half_ + i) Half(false);
  }

  // Called once for every slice of an item, when its sums [slice][size] stand in `sums`. The last
  // call of an item is told that those of the first slice are now the sums of all.
  bool add(index_t item, index_t slice, float* sums, index_t size) const {
    for (index_t step = 1; step < slices_; step *= 2) {
      const index_t left = slice / (2 * step) * 2 * step, right = left + step;
      slice = left;
      if (right >= slices_) continue;
      if (!half_[item * slices_ + right].exchange(true, std::memory_order_acq_rel)) return false;
      add_(sums + left * size, sums + right * size, size);
    }
    return true;
  }

 private:
  using Half = std::atomic<bool>;  // whether one of a pair is there, at the place of the right one

  void (*add_)(float*, const float*, index_t) = nullptr;
  index_t slices_ = 1;
  Half* half_ = nullptr;
};

}  // namespace
}  // namespace magvit_fast::cpu
