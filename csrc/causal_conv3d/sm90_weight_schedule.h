// causal_conv3d for sm_90a: makes the plan of a weight gradient. Host only.
// Previous hop: sm90_weight.cu; bindings.cpp shows plan and walk to the tests.
// Next hop: sm90_weight_plan.h.
#pragma once

#include "causal_conv3d/sm90_schedule.h"
#include "causal_conv3d/sm90_weight_plan.h"

namespace magvit_fast {

// What the forward kernel takes, with at most 16 taps of time and frames in x itself.
inline bool can_run_sm90_weight(const GemmShape& s) {
  return can_run_sm90(s) && s.t.kernel <= kGradTimeTaps && s.frames > 0;
}

// The taps of one column kw: those that read the same view, one row further down from one to the
// next, in runs of at most three and of about the same length.
inline void sm90_add_runs(Sm90WeightPlan& p, const GemmShape& s, int kw) {
  const Sm90AxisTap w = sm90_axis_tap(s.w, true, kw, 0);
  for (int remainder = 0; remainder < s.h.stride; ++remainder) {
    int kh[kSm90Taps], shift[kSm90Taps], count = 0;
    for (int k = 0; k < s.h.kernel; ++k) {
      const Sm90AxisTap h = sm90_axis_tap(s.h, true, k, 0);
      if (h.view == remainder) kh[count] = k, shift[count++] = h.shift;
    }
    const bool adjacent = count > 1 && shift[1] - shift[0] == 1;
    for (int first = 0, left = adjacent ? ceil_div(count, kGradRun) : count; first < count;
         --left) {
      const int taps = ceil_div(count - first, left);
      for (int i = 0; i < taps; ++i) {
        p.run_of[kh[first + i] * s.w.kernel + kw] = static_cast<std::int8_t>(p.runs);
        p.place_of[kh[first + i] * s.w.kernel + kw] = static_cast<std::int8_t>(i);
      }
      p.run[p.runs++] = {static_cast<std::int16_t>(shift[first]),
                         static_cast<std::int16_t>(w.shift),
                         static_cast<std::int16_t>(remainder * s.w.stride + w.view),
                         static_cast<std::int16_t>(taps),
                         static_cast<std::int16_t>(kh[first] * s.w.kernel + kw),
                         static_cast<std::int16_t>(taps > 1 ? (kh[1] - kh[0]) * s.w.kernel : 0)};
      p.longest_run = taps > p.longest_run ? taps : p.longest_run;
      first += taps;
    }
  }
}

// The plan of a problem that can_run_sm90_weight; a function of the shape alone.
inline Sm90WeightPlan sm90_weight_plan(const GemmShape& s) {
  Sm90WeightPlan p{};
  p.batch = s.batch;
  p.in_channels = s.in_channels;
  p.out_channels = s.out_channels;
  p.history_frames = s.history_frames;
  p.plane_taps = s.h.kernel * s.w.kernel;
  p.t = s.t;
  p.boxes_w = ceil_div(s.w.out, kGradBox);
  p.boxes_h = ceil_div(s.h.out, kGradBox);
  p.tiles_in = ceil_div(s.in_channels, kGradTile);
  p.tiles_out = ceil_div(s.out_channels, kGradTile);
  p.views = s.h.stride * s.w.stride;
  for (int kw = 0; kw < s.w.kernel; ++kw) sm90_add_runs(p, s, kw);
  index_t steps = 0;
  for (int kt = 0; kt < s.t.kernel; ++kt) {
    for (int t = 0; t < s.t.out; ++t)  // what reads a frame is one stretch of frames
      if (source_index(s.t, t, kt) >= 0 && p.frames[kt]++ == 0) p.first_frame[kt] = t;
    steps += index_t{p.batch} * p.frames[kt] * p.boxes_h * p.boxes_w;
    check(steps < (index_t{1} << 30), "causal_conv3d: more than 2^30 steps of a weight gradient");
    p.steps_before[kt + 1] = static_cast<int>(steps);
  }
  const index_t groups = index_t{p.runs} * p.tiles_out * p.tiles_in;
  check(groups * steps < (index_t{1} << 30) && groups * s.t.kernel < (index_t{1} << 30),
        "causal_conv3d: more than 2^30 steps of a weight gradient");
  p.tiles = static_cast<int>(groups * s.t.kernel);
  p.steps = static_cast<int>(groups * steps);
  constexpr int kLeastSteps = 8;  // of a block, as every piece costs the writing of its sums
  const int most = p.steps / kLeastSteps;
  p.blocks = most < 1 ? 1 : most < kGradBlocks ? most : kGradBlocks;
  return p;
}

inline std::size_t sm90_weight_workspace(const Sm90WeightPlan& p) {
  return static_cast<std::size_t>(sm90_weight_slots(p) * p.slot_floats()) * sizeof(float);
}

}  // namespace magvit_fast
