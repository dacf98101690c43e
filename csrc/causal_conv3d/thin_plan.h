// causal_conv3d for layers with a few channels on one side (images): the thin tensor written out.
// Previous hop: cuda.cu and the cuda_thin_*.cu. Next hop: index_map.h and gemm_rows.h.
// Host and device share it; the emulated kernels hold it in tests/cuda.
//
// The thin tensor (x of the first layer, dy of the last) is copied once into cells, all padding and
// history resolved: [N, cells of t, of h, of w, quads, 4 channels], zeros in the channels that fill
// up a quad. A tap is then an offset that is the same for every row:
//
//   sources (x): row = output o, cell = o * stride + k * dilation, which holds source_at(cell -
//            front)
//   results (dy): row = padded position p, cell = p - first + (kernel - 1 - k) * dilation, which
//            holds the output that reads p through tap k: zeros between outputs where there are
//            strides
#pragma once

#include "causal_conv3d/gemm_rows.h"

namespace magvit_fast {

constexpr int kThinChannels = 8, kThinWide = 16;  // most of the thin side, least of the other
constexpr int kThinQuad = 4;                      // channels of a quad: 8 bytes

struct ThinAxis {
  int rows, first;  // rows first .. first + rows - 1
  int cells;
  int step, tap_first, tap_step;

  MF_HOST_DEVICE int cell(int row, int tap) const {
    return (row - first) * step + tap_first + tap * tap_step;
  }
};

struct ThinPlan {
  bool of_sources;
  int batch, channels, cell_quads;  // channels of the thin tensor, quads of a cell
  ThinAxis t, h, w;

  MF_HOST_DEVICE index_t quads() const {  // of all cells
    return static_cast<index_t>(batch) * t.cells * h.cells * w.cells * cell_quads;
  }
  MF_HOST_DEVICE index_t rows() const {
    return static_cast<index_t>(batch) * t.rows * h.rows * w.rows;
  }
  // Where a row's first cell stands, in quads; a tap adds its offset.
  MF_HOST_DEVICE int base(int n, int row_t, int row_h, int row_w) const {
    return at(n, (row_t - t.first) * t.step, (row_h - h.first) * h.step,
              (row_w - w.first) * w.step);
  }
  MF_HOST_DEVICE int offset(int kt, int kh, int kw) const {
    return at(0, t.cell(t.first, kt), h.cell(h.first, kh), w.cell(w.first, kw));
  }

 private:
  MF_HOST_DEVICE int at(int n, int in_t, int in_h, int in_w) const {
    return (((n * t.cells + in_t) * h.cells + in_h) * w.cells + in_w) * cell_quads;
  }
};

MF_HOST_DEVICE inline ThinAxis thin_axis(const AxisMap32& a, bool of_sources) {
  const int reach = (a.kernel - 1) * a.dilation;
  if (of_sources) return {a.out, 0, (a.out - 1) * a.stride + reach + 1, a.stride, 0, a.dilation};
  int first = 0, last = a.source - 1;
  if (a.mode != PadMode::zeros) {  // what the padding repeats is read there, too
    if (a.front > 0) first = -a.front;
    if (last_position(a) > last) last = last_position(a);
  }
  return {last - first + 1, first, last - first + 1 + reach, 1, reach, -a.dilation};
}

MF_HOST_DEVICE inline ThinPlan thin_plan(const GemmShape& s, bool of_sources) {
  const int channels = of_sources ? s.in_channels : s.out_channels;
  return {of_sources,
          s.batch,
          channels,
          ceil_div(channels, kThinQuad),
          thin_axis(s.t, of_sources),
          thin_axis(s.h, of_sources),
          thin_axis(s.w, of_sources)};
}

// The coordinate of the thin tensor that a cell holds, or -1 for zeros.
MF_HOST_DEVICE inline int thin_content(const AxisMap32& a, const ThinAxis& axis, bool of_sources,
                                       int cell) {
  if (of_sources) return source_at(a, cell - a.front);
  return output_at(a, cell + axis.first - axis.tap_first, 0);
}

// 16-bit types, one group, 1 to 8 channels on one side, 16 and more in eights on the other; rows
// and quads that 31 bits count.
inline bool thin_sizes(const GemmShape& s, bool of_sources) {
  const int thin = of_sources ? s.in_channels : s.out_channels;
  const int wide = of_sources ? s.out_channels : s.in_channels;
  return s.dtype != DType::f32 && s.groups == 1 && thin <= kThinChannels && wide >= kThinWide &&
         wide % 8 == 0;
}
inline bool has_thin_cells(const GemmShape& s, bool of_sources) {
  constexpr index_t kMost = index_t{1} << 31;
  if (!thin_sizes(s, of_sources) ||
      (!of_sources && (s.t.front < 0 || s.h.front < 0 || s.w.front < 0)))
    return false;
  const ThinPlan plan = thin_plan(s, of_sources);
  const auto small = [](const ThinAxis& axis) { return axis.cells < (1 << 20); };
  return small(plan.t) && small(plan.h) && small(plan.w) &&
         index_t{plan.t.cells} * plan.h.cells < kMost / plan.w.cells && plan.quads() < kMost &&
         plan.rows() < kMost && gemm_rows<true>(s) < kMost;
}

}  // namespace magvit_fast
