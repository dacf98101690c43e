// What a tensor map is made from: a strided tensor of 16-bit elements and a box of it.
// Previous hop: launchers of kernels for sm_90a.
// Next hop: tensor_map.h.
#pragma once

#include "common/dtype.h"
#include "common/shape.h"

namespace magvit_fast::cuda {

// Innermost dimension first: channels (stride 1), width, height, frames, clips. base and every
// stride but the first are multiples of 16 bytes; a box has at most 64 channels (128 bytes) and 256
// elements along an axis.
struct TensorView {
  static constexpr int kRank = 5;
  const void* base;
  index_t size[kRank];
  index_t stride[kRank];  // in elements
  int box[kRank];
  DType dtype;
};

}  // namespace magvit_fast::cuda
