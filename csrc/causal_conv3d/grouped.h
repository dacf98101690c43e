// causal_conv3d: groups of few channels, several of them side by side in a vector.
// Previous hop: cpu_grouped.cpp, cpu_grouped_weight_grad.cpp.
// Next hop: grouped.simd.cpp, grouped_weight_grad.simd.cpp.
//
// Vectors run along the channels of the side that is produced, and none holds parts of two groups
// but whole ones side by side. A group's sum has `units` terms a tap: channels, or pairs of them
// where bfloat16 is multiplied so. Term k of all lanes is one vector of weights times one of
// sources, in which every group's k-th unit stands at the lanes of its group.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

// How the vector of sources is made of the pixel's own channels.
enum class GroupSource {
  pixel,     // depthwise: it is the pixel
  tail,      // the same where channels end within the vector
  spread,    // by a permutation
  broadcast  // one group a vector: one unit for all lanes
};

struct GroupLanes {
  index_t groups, reduce, produce;  // channels of a group: of its sums, and of its results
  index_t units;                    // of a group's sum
  index_t together, split;          // groups of a vector; if that is one: vectors of a group
  index_t width;                    // lanes of a vector
  GroupSource source;

  index_t vectors() const { return ceil_div(groups, together) * split; }
  index_t group(index_t vector) const { return vector / split * together; }  // the first one
  index_t count(index_t vector) const {
    const index_t left = groups - group(vector);
    return left < together ? left : together;
  }
  index_t channel(index_t vector) const {  // of the results, the first one
    return group(vector) * produce + vector % split * width;
  }
  index_t lanes(index_t vector) const {  // that hold results
    const index_t left = count(vector) * produce - vector % split * width;
    return left < width ? left : width;
  }
};

// Groups that fit a vector side by side with their sources and their results.
constexpr index_t groups_together(index_t reduce, index_t produce, index_t groups, index_t width) {
  const index_t widest = reduce > produce ? reduce : produce;
  const index_t fit = width / widest;
  return fit < groups ? fit : groups;
}

// Vectors of a pixel whose sums stay in registers; broadcast are those of one group, at most
// kMostSplit.
constexpr index_t grouped_vectors(GroupSource source, int isa) {
  return isa >= 2 ? (source == GroupSource::pixel ? 4 : 2) : (source == GroupSource::pixel ? 2 : 1);
}
constexpr index_t kMostSplit = 2;
constexpr index_t kMaxUnits = 8;  // of a spread vector: two groups in 16 lanes

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
  index_t max_rows;  // most (frame, row) pairs of an item, added up over its rows
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
  index_t row_begin, row_end;  // of batch * frames * lines of grad_line_rows rows (weight_grad.h)
};

// sums: [vector of the item][tap][unit][lane].
MF_DECLARE_SIMD(void, conv3d_grouped_weight_grad,
                (const GroupedGradParams& params, const GroupedGradItem& item, float* sums))

}  // namespace magvit_fast
