// causal_conv3d: groups of few channels, several of them side by side in a vector.
// Previous hop: cpu_grouped.cpp, cpu_grouped_weight_grad.cpp.
// Next hop: grouped.simd.cpp, grouped_weight_grad.simd.cpp.
//
// Lane l of vector v is channel v * together * produce + l of the side that is produced. A group's
// sum has `units` terms a tap: channels, or pairs of them where bfloat16 is multiplied so. Term k
// of all lanes is one vector of weights times one of sources, in which every group's k-th unit
// stands at the lanes of its group: a permutation of the pixel's own channels, and for depthwise
// convolutions the pixel itself.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct GroupLanes {
  index_t groups, reduce, produce;  // channels of a group: of its sums, and of its results
  index_t together;                 // groups in a vector
  index_t units;                    // of a group's sum
  bool spread;                      // the sources must be permuted

  index_t vectors() const { return ceil_div(groups, together); }
  index_t count(index_t vector) const {  // groups of a vector
    const index_t left = groups - vector * together;
    return left < together ? left : together;
  }
};

// Groups that fit a vector side by side with their sources and their results.
constexpr index_t groups_together(index_t reduce, index_t produce, index_t groups, int isa) {
  const index_t widest = reduce > produce ? reduce : produce;
  const index_t fit = gather_lanes(isa) / widest;
  return fit < groups ? fit : groups;
}

// Vectors of a pixel whose sums stay in registers.
constexpr index_t grouped_vectors(bool spread, int isa) {
  return isa >= 2 ? (spread ? 2 : 4) : (spread ? 1 : 2);
}
constexpr index_t kMaxUnits = 8;  // two groups in a vector of 16 lanes

// A source row and the weights of its (kt, kh).
struct GroupedRow {
  const void* pixels;
  const void* weights;
};

struct GroupedParams {
  SplitTensor source, target;
  SplitTensor residual;  // like target; added to the results, or late is null
  GroupLanes lanes;
  bool pairs;          // bfloat16 products: units are two channels
  const void* packed;  // [vector][KT][KH][KW][unit][lane] of float32 (pairs: of two bfloat16)
  const void* bias;    // [target channels], of type `type`, or null
  const void* zeros;   // a source pixel of zeros
  index_t kernel_t, kernel_h, kernel_w;
  AxisGather t, h;
  WidthGather w;
  // [tiles][1 + slots]: how many slots have a source for some pixel of the tile, and which. Instead
  // of three, kWindow: each reads one column behind the one before.
  const std::int32_t* slots;
  index_t max_rows;  // most (frame, row) pairs of a target row
  DType type;        // of sources and targets
};
constexpr std::int32_t kWindow = -1;

// One unit of work: some vectors of the pixels of some rows of a frame.
struct GroupedItem {
  index_t vector_begin, vector_end, n, t;
  index_t row_begin, row_end;
};

// `rows` is memory of the thread for params.max_rows.
MF_DECLARE_SIMD(void, conv3d_grouped,
                (const GroupedParams& params, const GroupedItem& item, GroupedRow* rows))

struct GroupedGradParams {
  SplitTensor source, output;  // history and x; dy
  GroupLanes lanes;            // vectors run along the channels of dy
  index_t kernel_t, kernel_h, kernel_w, stride_w, dilation_w;
  const std::int32_t *t_source, *h_source, *w_source;  // as in weight_grad.h
  DType type;
};

// One unit of work: the gradients of some vectors, summed over some of the rows of dy.
struct GroupedGradItem {
  index_t vector_begin, vector_end;
  index_t row_begin, row_end;  // of batch * frames * height
};

// sums: [vector of the item][tap][unit][lane].
MF_DECLARE_SIMD(void, conv3d_grouped_weight_grad,
                (const GroupedGradParams& params, const GroupedGradItem& item, float* sums))

}  // namespace magvit_fast
