// causal_conv3d on the CPU: weights in the order of the engine, and widened sources.
// Previous hop: cpu.cpp.
// Next hop: cpu_pack.cpp.
#pragma once

#include "common/dtype.h"
#include "common/shape.h"

namespace magvit_fast::cpu {

// A weight tensor seen as [groups][reduce][columns][taps], strides in elements, taps contiguous.
// Of joined taps, `joined` neighbors at a time are part of `reduce`, outside its channels.
struct WeightView {
  const void* data;
  DType dtype;
  index_t groups, reduce, columns, taps;
  index_t group_stride, reduce_stride, column_stride;
  index_t joined = 1;
  bool mirrored = false;  // joined taps stand backwards

  index_t row(index_t k) const {  // offset of the k-th of `reduce`
    const index_t channels = reduce / joined, tap = k / channels;
    return k % channels * reduce_stride + (mirrored ? joined - 1 - tap : tap);
  }
};

// [groups][block of columns][taps][reduce][columns], the last block only as wide as whole `lanes`
// need; with `taps_inside` [groups][block of columns][reduce][taps][columns]; with `pairs` two
// neighbors of `reduce` stand side by side: [reduce / 2][columns][2].
struct PackLayout {
  index_t block, lanes;
  bool pairs;
  DType type;  // float32, or bfloat16 from bfloat16 weights
  bool taps_inside = false;
};

// Elements of the packed form, zeros of the padding included.
index_t packed_size(const WeightView& w, const PackLayout& layout);
void pack_weights(const WeightView& w, const PackLayout& layout, void* packed, int num_threads);

// float32 copy of `count` 16-bit values.
void widen(const void* from, DType dtype, float* to, index_t count, int num_threads);

}  // namespace magvit_fast::cpu
