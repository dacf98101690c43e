// causal_conv3d: the gather engine, one code for the forward pass and the input gradient.
// Previous hop: cpu.cpp, which makes the tables from index_map.h.
// Next hop: gather.simd.cpp.
//
// Every target pixel is a sum over (tap, source pixel) pairs of source row times packed weights.
// Forward: targets are outputs, sources are inputs. Input gradient: the other way round, with
// several sources for pixels that padding repeats. Because the axes are independent, the pairs are
// kept per axis: a list for each frame and each row, and for the width a few slots (one tap, one
// source or none for each column).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct TapSource {
  std::int32_t tap, source;
};

// Pairs of every target along time or height: taps[begin[i] .. begin[i + 1]), rising in tap.
struct AxisGather {
  const std::int32_t* begin;
  const TapSource* taps;
};

// The width: targets stand in an order in which neighbors share their taps (with strides, the input
// gradient splits into residue classes), cut into tiles of at most kTilePixels.
struct WidthGather {
  const std::int32_t* target;      // [width] column of the i-th in order
  const std::int32_t* offset;      // [slots][width] source column * source channels, or -1
  const std::int32_t* slot_tap;    // [slots]
  const std::int32_t* tile_first;  // [tiles + 1]
  index_t width, slots, tiles;
};

// A tensor [N, frames, H, W, C] whose first frames may live elsewhere (the history).
struct SplitTensor {
  void* early;  // [N, early_frames, H, W, C]
  void* late;   // [N, late_frames, H, W, C]
  index_t early_frames, late_frames, height, width, channels;
};

struct GatherParams {
  SplitTensor source, target;
  SplitTensor residual;  // like target; added to the results, or late is null
  // [groups][block][KT][KH][KW][reduce (pairs)][columns of the block], or with `narrow`
  // [groups][KT][KH][KW][produce][reduce in whole vectors]. With few channels KW is 1 and the
  // sources are those of cpu_join.h.
  const void* packed;
  bool narrow;
  const void* bias;                 // [target channels], of type `target_type`, or null
  const void* zeros;                // a source pixel of zeros
  index_t groups, reduce, produce;  // channels per group on the source and the target side
  index_t kernel_t, kernel_h, kernel_w;
  AxisGather t, h;
  WidthGather w;
  DType source_type, target_type;
};

// One unit of work: some columns of weights times a block of pixels of one frame.
struct GatherItem {
  index_t group, block, n, t;
  index_t row_begin, row_end, tile_begin, tile_end;
};

constexpr index_t kTilePixels = 6;     // register tile: 6 pixels x 4 vectors of channels
constexpr index_t kBlockPixels = 120;  // pixels that share one pass over a piece of the weights

// Results of a few channels (an image, the gradient of one) would leave most lanes empty: there the
// vectors run along the sum, and lanes are added up at the end.
constexpr index_t kNarrow = 4;
constexpr index_t kNarrowReduce = 1024;  // the most channels of a sum done so

// Columns of packed weights in a block, and whether bfloat16 is multiplied in pairs, per level.
constexpr index_t gather_columns(int isa) { return isa >= 2 ? 64 : isa == 1 ? 16 : 8; }
constexpr index_t gather_lanes(int isa) { return isa >= 2 ? 16 : isa == 1 ? 8 : 4; }
constexpr bool multiplies_bf16(int isa) { return isa >= 3; }
constexpr index_t narrow_lanes(int isa, bool bf16) { return gather_lanes(isa) * (bf16 ? 2 : 1); }

MF_DECLARE_SIMD(void, conv3d_gather, (const GatherParams& params, const GatherItem& item))

}  // namespace magvit_fast
