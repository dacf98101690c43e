// causal_conv3d as a matrix product whose left rows are gathered: which rows, which taps, which are
// worth visiting. Previous hop: gather_mma.cu and gather_fma.cu (forward and input gradient),
// weight_mma.cu, weight_fma.cu. Next hop: index_map.h. Host and device share it; the emulated
// kernels hold it in tests/cuda.
//
// Forward: a row is an output pixel, its left operand at tap k the source pixel that it reads
// there. Input gradient: a row is a source pixel; its left operands are the output pixels that read
// it, one for every tap k and every copy j of the pixel in the padding (an "entry" e = k * copies +
// j of an axis). Rows of the input gradient run class by class, a class being the remainders (t, h,
// w) modulo the strides: all rows of a class are read through the same taps, so a tile visits
// 1/stride of them.
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "common/check.h"

namespace magvit_fast {

// A pixel of the row side; n < 0: past the end. 16 bytes, so that shared memory moves it at once.
struct alignas(16) GemmRow {
  int n, t, h, w;
};

using AxisMap32 = AxisMapOf<int>;

// Conv3dShape with the coordinates in 32 bits, half the registers; offsets are made in 64 bits.
struct GemmShape {
  int batch, in_channels, out_channels, groups;
  int history_frames, frames;
  AxisMap32 t, h, w;
  DType dtype;

  MF_HOST_DEVICE int group_in() const { return in_channels / groups; }
  MF_HOST_DEVICE int group_out() const { return out_channels / groups; }
  MF_HOST_DEVICE int taps() const { return t.kernel * h.kernel * w.kernel; }
  MF_HOST_DEVICE index_t weights() const {
    return static_cast<index_t>(out_channels) * group_in() * taps();
  }
};

inline GemmShape gemm_shape(const Conv3dShape& s) {
  const auto narrow = [](index_t n) {
    check(n > -(index_t{1} << 30) && n < (index_t{1} << 30),
          "causal_conv3d: sizes, strides and pads must be below 2**30");
    return static_cast<int>(n);
  };
  const auto axis = [&](const AxisMap& a) {
    return AxisMap32{
        narrow(a.source), narrow(a.out), narrow(a.kernel), narrow(a.stride), narrow(a.dilation),
        narrow(a.front),  a.mode};
  };
  narrow(s.t.kernel * s.h.kernel * s.w.kernel * (s.in_channels / s.groups));  // columns of a tile
  return {narrow(s.batch),
          narrow(s.in_channels),
          narrow(s.out_channels),
          narrow(s.groups),
          narrow(s.history_frames),
          narrow(s.frames),
          axis(s.t),
          axis(s.h),
          axis(s.w),
          s.dtype};
}

// How the walk numbers an axis: e = tap * copies + copy.
struct EntryAxis {
  int entries, copies;
};

template <bool kForward>
MF_HOST_DEVICE inline EntryAxis entry_axis(const AxisMap32& a) {
  int copies = 1;
  if (!kForward && a.mode == PadMode::reflect) copies = 3;
  if (!kForward && a.mode == PadMode::replicate) {
    const int back = last_position(a) - (a.source - 1);
    copies = 1 + a.front + (back > 0 ? back : 0);
  }
  return {a.kernel * copies, copies};
}

// The coordinate of the left operand of a row at coordinate `at`, or -1 for none.
template <bool kForward>
MF_HOST_DEVICE inline int reach(const AxisMap32& a, int at, int tap, int copy) {
  if (kForward) return source_index(a, at, tap);
  if (copy >= copies(a, at)) return -1;
  return output_at(a, copy_position(a, at, copy), tap);
}

template <bool kForward>
MF_HOST_DEVICE inline index_t gemm_rows(const GemmShape& s) {
  const index_t batch = s.batch;
  if (kForward) return batch * s.t.out * s.h.out * s.w.out;
  return batch * round_up(s.t.source, s.t.stride) * round_up(s.h.source, s.h.stride) *
         round_up(s.w.source, s.w.stride);
}

template <bool kForward>
MF_HOST_DEVICE inline GemmRow gemm_row(const GemmShape& s, index_t m) {
  if (m >= gemm_rows<kForward>(s)) return {-1, 0, 0, 0};
  if (kForward) {
    const index_t w = m % s.w.out, mh = m / s.w.out;
    const index_t h = mh % s.h.out, mt = mh / s.h.out;
    return {static_cast<int>(mt / s.t.out), static_cast<int>(mt % s.t.out), static_cast<int>(h),
            static_cast<int>(w)};
  }
  const int per_t = ceil_div(s.t.source, s.t.stride), per_h = ceil_div(s.h.source, s.h.stride),
            per_w = ceil_div(s.w.source, s.w.stride);
  const index_t w = m % per_w, mh = m / per_w;
  const index_t h = mh % per_h, mt = mh / per_h;
  const index_t t = mt % per_t, mn = mt / per_t;
  const index_t n = mn % s.batch, remainders = mn / s.batch;
  const index_t rw = remainders % s.w.stride, rh = remainders / s.w.stride % s.h.stride,
                rt = remainders / s.w.stride / s.h.stride;
  const GemmRow row{static_cast<int>(n), static_cast<int>(t * s.t.stride + rt),
                    static_cast<int>(h * s.h.stride + rh), static_cast<int>(w * s.w.stride + rw)};
  const bool inside = row.t < s.t.source && row.h < s.h.source && row.w < s.w.source;
  return inside ? row : GemmRow{-1, 0, 0, 0};
}

// The walk of one tile over (entry of t, entry of h, entry of w), skipping the entries of an axis
// that none of the tile's rows reaches: taps that read only zero padding, foreign stride classes,
// copies.
template <bool kForward>
struct EntryWalk {
  static constexpr int kMaskBits = 64;  // entries beyond are always visited
  std::uint64_t active[3];
  int e[3];

  MF_HOST_DEVICE int following(const EntryAxis* axes, int i, int entry) const {
    do ++entry;  // the next visited one, or the number of entries
    while (entry < axes[i].entries && entry < kMaskBits && ((active[i] >> entry) & 1u) == 0);
    return entry;
  }
  MF_HOST_DEVICE int count(const EntryAxis* axes, int i) const {
    int total = 0;
    for (int entry = following(axes, i, -1); entry < axes[i].entries;
         entry = following(axes, i, entry))
      ++total;
    return total;
  }
  MF_HOST_DEVICE int size(const EntryAxis* axes) const {
    return count(axes, 0) * count(axes, 1) * count(axes, 2);
  }
  MF_HOST_DEVICE void begin(const EntryAxis* axes) {
    for (int i = 0; i < 3; ++i) e[i] = following(axes, i, -1);
  }
  MF_HOST_DEVICE void next(const EntryAxis* axes) {  // after the last one it starts again
    for (int i = 2; i >= 0; --i) {
      e[i] = following(axes, i, e[i]);
      if (e[i] < axes[i].entries) return;
      e[i] = following(axes, i, -1);
    }
  }
  MF_HOST_DEVICE int tap(const EntryAxis* axes, int i) const {
    return kForward ? e[i] : e[i] / axes[i].copies;
  }
  MF_HOST_DEVICE int copy(const EntryAxis* axes, int i) const {
    return kForward ? 0 : e[i] % axes[i].copies;
  }
};

// Where the walk's present entry lets a row read: its offset in pixels and in which tensor.
struct Gathered {
  index_t pixel;  // -1: nothing, a zero
  bool in_history;
};

MF_HOST_DEVICE inline Gathered source_pixel(const GemmShape& s, int n, int t, int h, int w) {
  if (t < 0 || h < 0 || w < 0) return {-1, false};
  const bool in_history = t < s.history_frames;
  const int frames = in_history ? s.history_frames : s.frames;
  const int frame = in_history ? t : t - s.history_frames;
  return {((static_cast<index_t>(n) * frames + frame) * s.h.source + h) * s.w.source + w,
          in_history};
}

MF_HOST_DEVICE inline index_t output_pixel(const GemmShape& s, int n, int t, int h, int w) {
  if (t < 0 || h < 0 || w < 0) return -1;
  return ((static_cast<index_t>(n) * s.t.out + t) * s.h.out + h) * s.w.out + w;
}

template <bool kForward>
MF_HOST_DEVICE inline Gathered gather(const GemmShape& s, const EntryAxis* axes,
                                      const EntryWalk<kForward>& walk, const GemmRow& row) {
  if (row.n < 0) return {-1, false};
  const int t = reach<kForward>(s.t, row.t, walk.tap(axes, 0), walk.copy(axes, 0));
  const int h = reach<kForward>(s.h, row.h, walk.tap(axes, 1), walk.copy(axes, 1));
  const int w = reach<kForward>(s.w, row.w, walk.tap(axes, 2), walk.copy(axes, 2));
  if (kForward) return source_pixel(s, row.n, t, h, w);
  return {output_pixel(s, row.n, t, h, w), false};
}

// A pixel of the output that steps through memory order without division.
struct PixelWalk {
  int n, t, h, w;
  MF_HOST_DEVICE void set(const GemmShape& s, index_t pixel) {
    const GemmRow row = gemm_row<true>(s, pixel);
    n = row.n, t = row.t, h = row.h, w = row.w;
  }
  MF_HOST_DEVICE void advance(const GemmShape& s, int pixels) {
    w += pixels;
    while (w >= s.w.out) {
      w -= s.w.out;
      if (++h < s.h.out) continue;
      h = 0;
      if (++t < s.t.out) continue;
      t = 0;
      ++n;
    }
  }
};

// The split of the weight gradient's sum over pixels: enough blocks to fill a device with two each
// on 132 multiprocessors, but parts of at least kLeastPixels. A function of the shape alone: the
// order of summation, so the result to the last bit, is the same on every device.
struct WeightSplit {
  index_t parts, pixels_per_part;
};

MF_HOST_DEVICE inline WeightSplit weight_split(index_t pixels, index_t tiles) {
  constexpr index_t kBlocks = 528, kLeastPixels = 256, kStep = 32;
  index_t parts = ceil_div(kBlocks, tiles < 1 ? index_t{1} : tiles);
  const index_t most = ceil_div(pixels, kLeastPixels);
  if (parts > most) parts = most;
  if (parts < 1) parts = 1;
  const index_t each = round_up(ceil_div(pixels, parts), kStep);
  return {each > 0 ? ceil_div(pixels, each) : 1, each > 0 ? each : kStep};
}

}  // namespace magvit_fast
