// causal_conv3d on the CPU: weights in the order in which the engine reads them, and widened
// sources. Previous hop: cpu.cpp. Next hop: cpu_pack.cpp.
#pragma once

#include "common/dtype.h"
#include "common/shape.h"

namespace magvit_fast::cpu {

// A weight tensor seen as [groups][reduce][columns][taps], strides in elements, taps contiguous.
struct WeightView {
  const void* data;
  DType dtype;
  index_t groups, reduce, columns, taps;
  index_t group_stride, reduce_stride, column_stride;
};

// Elements of the packed form: columns are padded to whole vectors, channels to pairs if `pairs`.
index_t packed_size(const WeightView& w, index_t lanes, bool pairs);

// [groups][block of `block` columns][taps][reduce][columns], as float32, or with `pairs` as
// bfloat16 [reduce / 2][columns][2]. The last block has only as many columns as whole vectors need.
void pack_weights(const WeightView& w, void* packed, index_t block, index_t lanes, bool pairs,
                  int num_threads);

// float32 copy of `count` 16-bit values.
void widen(const void* from, DType dtype, float* to, index_t count, int num_threads);

}  // namespace magvit_fast::cpu
