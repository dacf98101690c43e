// causal_conv3d for sm_90a: makes the plan of a problem. Host only.
// Previous hop: sm90_gather.cu; bindings.cpp shows plan and walk to the tests.
// Next hop: sm90_plan.h.
#pragma once

#include <array>

#include "causal_conv3d/sm90_plan.h"

namespace magvit_fast {

// The plane is padded with zeros, which the copy engine supplies, or not at all.
inline bool sm90_plane_axis(const AxisMap32& a) {
  return a.mode == PadMode::zeros || (a.front <= 0 && last_position(a) < a.source);
}

// 16-bit types; one group; 64 channels and more on both sides, in eights (16 bytes); the plane
// padded with zeros, at most two pairs of remainders a side, 64 taps; time as it likes.
inline bool can_run_sm90(const GemmShape& s) {
  return s.dtype != DType::f32 && s.groups == 1 && s.in_channels >= kSm90Depth &&
         s.out_channels >= kSm90Depth && s.in_channels % 8 == 0 && s.out_channels % 8 == 0 &&
         sm90_plane_axis(s.h) && sm90_plane_axis(s.w) && s.h.stride * s.w.stride <= kSm90Classes &&
         s.h.kernel * s.w.kernel <= kSm90Taps && s.h.source >= s.h.stride &&
         s.w.source >= s.w.stride && s.h.source < (1 << 14) && s.w.source < (1 << 14) &&
         s.h.dilation * s.h.kernel < (1 << 14) && s.w.dilation * s.w.kernel < (1 << 14);
}

// value = stride * quotient + remainder, remainder >= 0.
struct FloorDivision {
  int quotient, remainder;
};
inline FloorDivision floor_division(int value, int stride) {
  const int quotient = value >= 0 ? value / stride : -((stride - 1 - value) / stride);
  return {quotient, value - quotient * stride};
}

// Forward: target o reads o * stride + k * dilation - front = stride * (o + quotient) + remainder.
// Input gradient: source s = s' * stride + remainder is read by the target s' + quotient, if any.
struct Sm90AxisTap {
  bool any;
  int shift, view;
};
inline Sm90AxisTap sm90_axis_tap(const AxisMap32& a, bool forward, int k, int remainder) {
  if (forward) {
    const FloorDivision d = floor_division(k * a.dilation - a.front, a.stride);
    return {true, d.quotient, d.remainder};
  }
  const FloorDivision d = floor_division(remainder + a.front - k * a.dilation, a.stride);
  return {d.remainder == 0, d.quotient, 0};
}

// Shape of a tile: the fewest tiles over a plane of width x height and `batch` clips, then the
// smallest halo.
inline void sm90_choose_box(Sm90Plan& p, int pixels, int width, int height) {
  index_t fewest = -1;
  int least_halo = 0;
  for (int w = 1; w <= pixels; w *= 2)
    for (int h = 1; w * h <= pixels; h *= 2) {
      const int n = pixels / (w * h);
      const index_t tiles =
          index_t{ceil_div(width, w)} * ceil_div(height, h) * ceil_div(p.batch, n);
      const int halo = (w + 2) * (h + 2) * n;
      if (fewest >= 0 && (tiles > fewest || (tiles == fewest && halo >= least_halo))) continue;
      fewest = tiles, least_halo = halo;
      p.box_w = w, p.box_h = h, p.box_n = n;
    }
}

// Tiles, and their order: frame by frame of a clip, whose neighbors in time share what L2 holds;
// or, where there are few, all of a frame number first, so that the long tiles (those that skip no
// tap) come first and the short ones fill up what they leave.
inline void sm90_cut(Sm90Plan& p, int multiprocessors) {
  p.tiles_c = ceil_div(p.produce, kSm90Channels);
  p.tiles_n = ceil_div(p.batch, p.box_n);
  index_t tiles = 0;
  for (int i = 0; i < p.classes; ++i) {
    Sm90Class& cls = p.cls[i];
    cls.tiles_h = ceil_div(cls.height, p.box_h);
    cls.tiles_w = ceil_div(cls.width, p.box_w);
    cls.first_tile = static_cast<int>(tiles);
    tiles += index_t{p.tiles_c} * cls.tiles_h * cls.tiles_w * p.tiles_n * p.frames;
    check(tiles < (index_t{1} << 30), "causal_conv3d: more than 2^30 tiles");
  }
  p.tiles = static_cast<int>(tiles);
  p.frames_outermost = p.tiles < 8 * multiprocessors;
}

// The longest that one block works, in steps of 256 pixels; exact where tiles are few.
inline double sm90_makespan(const Sm90Plan& p, int multiprocessors) {
  constexpr int kMost = 1024;
  // A step of 128 pixels costs more than half: shared memory gives 12 KB for the products that take
  // 10 KB in a step of 256.
  const double step = p.pixels() == 256 ? 1.0 : 0.6;
  const int blocks = multiprocessors < kMost ? multiprocessors : kMost;
  std::array<double, kMost> load{};
  const double chunks = ceil_div(p.reduce, kSm90Depth);
  double total = 0.0;
  int index = 0;
  for (int c = 0; c < p.classes; ++c) {
    const int next = c + 1 < p.classes ? p.cls[c + 1].first_tile : p.tiles;
    const int per_frame = (next - p.cls[c].first_tile) / p.frames;
    for (int i = 0; i < p.frames; ++i) {
      const int t = p.late_first ? p.frames - 1 - i : i;
      const double work = step * (1.0 + sm90_frames_read(p, t) * p.cls[c].taps * chunks);
      total += work * per_frame;
      if (!p.frames_outermost) continue;
      for (int k = 0; k < per_frame; ++k, ++index) {
        const int wave = index / blocks, place = index % blocks;
        load[static_cast<std::size_t>(wave % 2 ? blocks - 1 - place : place)] += work;
      }
    }
  }
  double longest = total / blocks;
  for (const double one : load) longest = one > longest ? one : longest;
  return longest;
}

// The plan of a problem that can_run_sm90, for a device of so many multiprocessors. The order of
// summation, so the result to the last bit, depends on neither the device nor the tiles.
inline Sm90Plan sm90_plan(const GemmShape& s, bool forward, int multiprocessors) {
  Sm90Plan p{};
  p.forward = forward;
  p.batch = s.batch;
  p.frames = forward ? s.t.out : s.t.source;
  p.history_frames = s.history_frames;
  p.reduce = forward ? s.in_channels : s.out_channels;
  p.produce = forward ? s.out_channels : s.in_channels;
  p.plane_taps = s.h.kernel * s.w.kernel;
  p.t = s.t;
  p.t_entries = forward ? entry_axis<true>(s.t) : entry_axis<false>(s.t);
  p.late_first = forward;  // causal: the last frames read most, and are read least
  const int remainders = s.h.stride * s.w.stride;
  p.views = forward ? remainders : 1;
  p.classes = forward ? 1 : remainders;
  int taps = 0;
  for (int i = 0; i < p.classes; ++i) {
    const int rh = i / s.w.stride, rw = i % s.w.stride;  // forward: 0, 0
    Sm90Class& cls = p.cls[i];
    cls.height = forward ? s.h.out : ceil_div(s.h.source - rh, s.h.stride);
    cls.width = forward ? s.w.out : ceil_div(s.w.source - rw, s.w.stride);
    cls.first_tap = taps;
    for (int kh = 0; kh < s.h.kernel; ++kh)
      for (int kw = 0; kw < s.w.kernel; ++kw) {
        const Sm90AxisTap h = sm90_axis_tap(s.h, forward, kh, rh);
        const Sm90AxisTap w = sm90_axis_tap(s.w, forward, kw, rw);
        if (!h.any || !w.any) continue;
        p.taps[taps++] = {static_cast<std::int16_t>(h.shift), static_cast<std::int16_t>(w.shift),
                          static_cast<std::int16_t>(h.view * s.w.stride + w.view),
                          static_cast<std::int16_t>(kh * s.w.kernel + kw)};
      }
    cls.taps = taps - cls.first_tap;
  }
  Sm90Plan best = p;
  double least = -1.0;
  for (const int pixels : {256, 128}) {
    sm90_choose_box(p, pixels, p.cls[0].width, p.cls[0].height);
    sm90_cut(p, multiprocessors);
    const double longest = sm90_makespan(p, multiprocessors);
    if (least >= 0.0 && longest >= least) continue;
    least = longest;
    best = p;
  }
  return best;
}

}  // namespace magvit_fast
