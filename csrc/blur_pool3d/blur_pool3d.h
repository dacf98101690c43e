// blur_pool3d: separable low-pass filter with stride and zero padding, and its transpose.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

constexpr int kBlurMaxTaps = 8;

struct BlurAxis {
  index_t source, result;  // lengths in the tensor that is read and in the one that is written
  index_t stride, before;  // of the forward filter: output o reads inputs o * stride - before + tap
};

// Tensors lie channels-last: [B, T, H, W, C].
struct BlurPool3dParams {
  const void* from;
  void* to;
  index_t batch, channels;
  BlurAxis axis[3];          // t, h, w
  float taps[kBlurMaxTaps];  // sum 1, the same on every axis
  int count;                 // of taps
  bool transpose;            // from = gradient of the output, to = gradient of the input
  DType dtype;

  MF_HOST_DEVICE index_t rows() const { return batch * axis[0].result * axis[1].result; }
};

// What one position of the result reads along one axis.
struct BlurReads {
  index_t source[kBlurMaxTaps];
  float weight[kBlurMaxTaps];
  int count = 0;

  MF_HOST_DEVICE BlurReads(const BlurPool3dParams& p, int which, index_t position) {
    const BlurAxis& axis = p.axis[which];
    for (int k = 0; k < p.count; ++k) {
      index_t s = position * axis.stride - axis.before + k;
      if (p.transpose) {  // the output that reads `position` through tap k, if there is one
        const index_t scaled = position + axis.before - k;
        if (scaled < 0 || scaled % axis.stride != 0) continue;
        s = scaled / axis.stride;
      }
      if (s < 0 || s >= axis.source) continue;
      source[count] = s;
      weight[count++] = p.taps[k];
    }
  }
};

namespace cpu {
void blur_pool3d_filter(const BlurPool3dParams& params, const ExecContext& ctx);
}
namespace cuda {
void blur_pool3d_filter(const BlurPool3dParams& params, const ExecContext& ctx);
}

// Rows [begin, end) of the result ([B, T, H] flattened); one thread's share.
MF_DECLARE_SIMD(void, blur_pool3d_rows,
                (const BlurPool3dParams& params, index_t begin, index_t end))

}  // namespace magvit_fast
