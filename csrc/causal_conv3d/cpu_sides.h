// causal_conv3d on the CPU: the tensors of an op by their part in it, source or target.
// Previous hop: cpu.cpp, cpu_winograd.cpp, cpu_weight_grad.cpp.
// Next hop: none.
#pragma once

#include <algorithm>

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/cpu_pack.h"
#include "causal_conv3d/cpu_tables.h"
#include "causal_conv3d/gather.h"

namespace magvit_fast::cpu {

struct Tensors {  // null while measuring
  const void* early_source;
  const void* late_source;
  const void* weight;
  const void* bias;
  void* early_target;
  void* late_target;
  const void* residual = nullptr;  // added to late_target
};

// Rows and columns as one axis where the kernel is a single pixel of the plane: longer rows.
inline Conv3dShape with_flat_plane(Conv3dShape s) {
  const auto pointwise = [](const AxisMap& a) {
    return a.kernel == 1 && a.stride == 1 && a.front == 0 && a.out == a.source;
  };
  const index_t most = std::max(s.in_channels, s.out_channels) * s.h.source * s.w.source;
  if (!pointwise(s.h) || !pointwise(s.w) || most >= index_t{1} << 31) return s;
  s.w.source = s.w.out = s.h.source * s.w.source;
  s.h.source = s.h.out = 1;
  return s;
}

// A convolution at stride 1 under zero padding seen from its outputs: what reads which source, with
// taps in reverse.
inline AxisMap reversed(const AxisMap& a) {
  return {a.out, a.source, a.kernel, 1, a.dilation, (a.kernel - 1) * a.dilation - a.front, a.mode};
}

// Padded positions that the outputs of an axis meet.
inline index_t padded_positions(const AxisMap& a) {
  return (a.out - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
}

// The side of x and its history.
inline SplitTensor source_side(const Conv3dShape& s, const void* history, const void* x) {
  return {const_cast<void*>(history),
          const_cast<void*>(x),
          s.history_frames,
          s.frames,
          s.h.source,
          s.w.source,
          s.in_channels};
}

// The side of y.
inline SplitTensor output_side(const Conv3dShape& s, const void* y) {
  return {nullptr, const_cast<void*>(y), 0, s.t.out, s.h.out, s.w.out, s.out_channels};
}

// The weights as the matrices [reduce][columns] of the taps.
inline WeightView weight_view(const Conv3dShape& s, Direction direction, const void* weight) {
  const bool forward = direction == Direction::forward;
  const index_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  const index_t taps = s.t.kernel * s.h.kernel * s.w.kernel;
  return {weight,
          s.dtype,
          s.groups,
          forward ? in_group : out_group,
          forward ? out_group : in_group,
          taps,
          out_group * in_group * taps,
          forward ? taps : in_group * taps,
          forward ? in_group * taps : taps};
}

}  // namespace magvit_fast::cpu
