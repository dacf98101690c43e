// causal_conv3d on CUDA: a plane whose padding is not zeros, written out for the kernel of sm_90a.
// Previous hop: cuda.cu.
// Next hop: cuda_plane.cu; index_map.h.
#pragma once

#include "causal_conv3d/cuda_kernels.h"
#include "causal_conv3d/sm90_schedule.h"

namespace magvit_fast::cuda {

// The same axis over a source that holds its padding, from the first position to the last that a
// tap touches.
inline AxisMap32 padded_axis(AxisMap32 a) {
  a.source = last_position(a) + a.front + 1;
  a.front = 0;
  a.mode = PadMode::zeros;
  return a;
}

// s where the kernel of sm_90a takes its plane as it is, else s over padded planes.
inline GemmShape on_padded_planes(GemmShape s) {
  if (sm90_plane_axis(s.h) && sm90_plane_axis(s.w)) return s;
  s.h = padded_axis(s.h);
  s.w = padded_axis(s.w);
  return s;
}
inline bool pads_planes(const GemmShape& s) {
  return !(sm90_plane_axis(s.h) && sm90_plane_axis(s.w));
}

// Bytes of `frames` padded frames of every clip, of Cin channels of 16 bits.
inline index_t padded_bytes(const GemmShape& s, int frames) {
  const GemmShape wide = on_padded_planes(s);
  return index_t{s.batch} * frames * wide.h.source * wide.w.source * s.in_channels * 2;
}

// [N, frames, H, W, Cin] to the same with padding; back: every element gets the sum of what stands
// at its positions. Channels in eights, addresses multiples of 16.
void pad_planes(const GemmShape& s, const void* from, int frames, void* to,
                const DeviceGuard& guard, const ExecContext& ctx);
void fold_planes(const GemmShape& s, const void* from, int frames, void* to,
                 const DeviceGuard& guard, const ExecContext& ctx);

}  // namespace magvit_fast::cuda
