// depth_to_space3d: channels unfolded into time, height and width, and back.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

// deep [B, f_t f_h f_w C, T, H, W] <-> wide [B, C, T f_t - dropped, H f_h, W f_w]; the channels of
// deep are (f_t, f_h, f_w, C) with C fastest. Both lie channels-last, or both channels-first.
struct DepthToSpace3dParams {
  const void* from;  // deep, or wide where `to_depth`
  void* to;
  index_t batch, channels, frames, height, width;  // C of wide; T, H, W of deep
  index_t factor[3];
  index_t dropped;    // leading frames that wide lacks; to_depth writes zeros for them
  int element_bytes;  // 1, 2, 4 or 8
  bool channels_last;
  bool to_depth;

  MF_HOST_DEVICE index_t wide_frames() const { return frames * factor[0] - dropped; }
  // A row of wide, dropped frames included: W f_w positions, of all channels where channels-last.
  MF_HOST_DEVICE index_t rows() const {
    return batch * (channels_last ? 1 : channels) * frames * factor[0] * height * factor[1];
  }
};

// Where a row of wide begins, and the element of deep that its first one comes from; in elements.
// Along the row, position w f_w + k is `step` w + k `part` elements further in deep.
struct DepthToSpace3dRow {
  index_t wide, deep, step, part;
  bool dropped;

  MF_HOST_DEVICE DepthToSpace3dRow(const DepthToSpace3dParams& p, index_t row) {
    const index_t tall = p.height * p.factor[1], broad = p.width * p.factor[2];
    const index_t all_frames = p.frames * p.factor[0];
    const index_t y = row % tall, t = row / tall % all_frames;
    const index_t plane = row / tall / all_frames;  // batch, and channel where channels-first
    const index_t i = t % p.factor[0], j = y % p.factor[1];
    const index_t offset = (i * p.factor[1] + j) * p.factor[2];  // channels of deep / C
    const index_t depth = p.factor[0] * p.factor[1] * p.factor[2] * p.channels;
    dropped = t < p.dropped;
    wide = ((plane * p.wide_frames() + t - p.dropped) * tall + y) * broad;
    if (p.channels_last) {
      const index_t cell =
          ((plane * p.frames + t / p.factor[0]) * p.height + y / p.factor[1]) * p.width;
      wide *= p.channels;
      deep = cell * depth + offset * p.channels;
      step = depth;
      part = p.channels;
    } else {
      const index_t b = plane / p.channels, c = plane % p.channels;
      const index_t channel = b * depth + offset * p.channels + c;
      deep = ((channel * p.frames + t / p.factor[0]) * p.height + y / p.factor[1]) * p.width;
      step = 1;
      part = p.channels * p.frames * p.height * p.width;
    }
  }
};

namespace cpu {
void depth_to_space3d_permute(const DepthToSpace3dParams& params, const ExecContext& ctx);
}
namespace cuda {
void depth_to_space3d_permute(const DepthToSpace3dParams& params, const ExecContext& ctx);
}

// Rows [begin, end); one thread's share.
MF_DECLARE_SIMD(void, depth_to_space3d_rows,
                (const DepthToSpace3dParams& params, index_t begin, index_t end))

}  // namespace magvit_fast
