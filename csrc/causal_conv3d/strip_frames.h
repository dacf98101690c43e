// causal_conv3d: which source frames a thread holds copies of, while it walks through time.
// Previous hop: strip.simd.cpp, strip_turned.simd.cpp.
// Next hop: none.
#pragma once

#include "causal_conv3d/strip.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

class Frames {
 public:
  explicit Frames(const StripAxis& t) : t_(t) {
    for (index_t slot = 0; slot < t.kernel; ++slot) held_[slot] = -1;
  }

  // The source frames of target frame t; fill(slot, frame) for each that is in no slot.
  template <class Fill>
  void meet(index_t t, const Fill& fill) {
    look_at(t);
    for (index_t kt = 0; kt < t_.kernel; ++kt) {
      if (source_[kt] < 0) continue;
      index_t slot = 0;
      while (slot < t_.kernel && held_[slot] != source_[kt]) ++slot;
      if (slot == t_.kernel) {
        for (slot = 0; needed(held_[slot]);) ++slot;
        held_[slot] = source_[kt];
        fill(slot, source_[kt]);
      }
      slot_[kt] = slot;
    }
  }
  void look_at(index_t t) {
    for (index_t kt = 0; kt < t_.kernel; ++kt)
      source_[kt] = t_.source[t * t_.stride + kt * t_.dilation];
  }

  std::int32_t source(index_t kt) const { return source_[kt]; }  // or -1
  index_t slot(index_t kt) const { return slot_[kt]; }

 private:
  bool needed(std::int32_t frame) const {
    for (index_t kt = 0; kt < t_.kernel; ++kt)
      if (frame >= 0 && source_[kt] == frame) return true;
    return false;
  }

  const StripAxis& t_;
  std::int32_t source_[kMostStripRuns];  // of the present target frame and every tap
  index_t slot_[kMostStripRuns];         // where that frame is held
  std::int32_t held_[kMostStripRuns];    // frame of a slot, or -1
};

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
