// causal_conv3d for sm_90a: the tensor maps of its activations.
// Previous hop: sm90_gather.cu, sm90_weight.cu.
// Next hop: common/cuda/tensor_map.h.
#pragma once

#include "causal_conv3d/gemm_rows.h"
#include "common/cuda/tensor_map.h"

namespace magvit_fast::cuda {

// The views of a tensor [N, frames, H, W, C] by the remainders of h and w modulo the strides.
inline TensorMap view_of(const void* base, int channels, const GemmShape& s, int h, int w,
                         int frames, int stride_h, int stride_w, int remainder, const int (&box)[5],
                         const char* op) {
  const index_t c = channels, row = w * c, frame = h * row;
  const int rh = remainder / stride_w, rw = remainder % stride_w;
  TensorView view{static_cast<const char*>(base) + (rh * row + rw * c) * 2,
                  {c, ceil_div(w - rw, stride_w), ceil_div(h - rh, stride_h), frames, s.batch},
                  {1, c * stride_w, row * stride_h, frame, frame * frames},
                  {box[0], box[1], box[2], box[3], box[4]},
                  s.dtype};
  return tensor_map(view, op);
}

}  // namespace magvit_fast::cuda
