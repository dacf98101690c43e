// causal_conv3d: Winograd's algorithm for 3x3 planes at stride 1, over time where it pays.
// Previous hop: cpu_winograd.cpp, which makes the tables.
// Next hop: winograd_*.simd.cpp; winograd_time.h is the plan along the time axis.
//
// The plane is cut into tiles of m x m results, m = 2 or 4, each read from (m + 2) x (m + 2)
// sources. At every one of the (m + 2)^2 points the transformed sources ("rows", one a tile and
// product of the time plan) times the transformed weights are a matrix product; the results of the
// points, transformed back, are the tile. 36 multiplications a tile take the place of 144.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "causal_conv3d/winograd_time.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct WinogradParams {
  index_t m;  // results of a tile along height and width
  SplitTensor source, target;
  SplitTensor residual;  // like target; added to the results, or late is null
  // Source row and column of every tile, or -1 for a zero: [tile_rows][m + 2], [tile_columns][m +
  // 2].
  const std::int32_t *rows, *columns;
  index_t tile_rows, tile_columns;
  index_t reduce, produce;  // channels of a source and of a target
  const float* packed;      // [block][reduce][KT][9][columns of the block]
  bool mirrored;            // the plane's taps in reverse: the input gradient
  index_t kernel_t;
  TimeSets sets;
  const void* bias;  // [produce], of type `target_type`, or null
  DType source_type, target_type;
};

// Where the transformed tensors of one group of tiles lie, in floats from the start of each.
//   sources [point][row = product * tiles + tile][reduce, in whole vectors]
//   weights [point][set][reduce][columns of the block]
//   sums    [point][row = sum * tiles + tile][columns of the block]
struct WinogradLayout {
  index_t tiles;  // of the group
  index_t source_point, source_row;
  index_t sum_point;
  index_t weight_point, weight_set;
};

// Tiles [first, first + count) of all batch * tile_rows * tile_columns; a group of one time
// segment.
struct WinogradTiles {
  index_t first, count;
};

// Channels of the target, all in one block of params.packed.
struct WinogradColumns {
  index_t first, channels;
  index_t width;  // in whole vectors
};

// Products that are added up before they join the sums: results do not depend on the cutting.
constexpr index_t kWinogradChain = 64;

constexpr index_t winograd_points(index_t m) { return (m + 2) * (m + 2); }

// The tiles [tile_begin, tile_end) of the group: their transformed sources.
MF_DECLARE_SIMD(void, winograd_sources,
                (const WinogradParams& params, const TimeSegment& segment,
                 const WinogradLayout& layout, const WinogradTiles& tiles, index_t tile_begin,
                 index_t tile_end, float* sources))

// One set of weights at the points of rows [row_begin, row_end) of the (m + 2) x (m + 2) square,
// for the channels [begin, end) of the sum; `weights` starts at the first point, set and channel.
MF_DECLARE_SIMD(void, winograd_weights,
                (const WinogradParams& params, const WinogradLayout& layout,
                 const WinogradColumns& columns, index_t set, index_t row_begin, index_t row_end,
                 index_t begin, index_t end, float* weights))

// The segment's products with the sets [set_begin, set_end) at the points of rows [row_begin,
// row_end), of the channels [begin, end) of the sum; `weights` starts at the first of all three.
MF_DECLARE_SIMD(void, winograd_products,
                (const WinogradParams& params, const TimeSegment& segment,
                 const WinogradLayout& layout, const WinogradColumns& columns, index_t set_begin,
                 index_t set_end, index_t row_begin, index_t row_end, index_t begin, index_t end,
                 const float* sources, const float* weights, float* sums))

// The tiles [tile_begin, tile_end) of the group: their results in these columns.
MF_DECLARE_SIMD(void, winograd_results,
                (const WinogradParams& params, const TimeSegment& segment,
                 const WinogradLayout& layout, const WinogradTiles& tiles,
                 const WinogradColumns& columns, index_t tile_begin, index_t tile_end,
                 const float* sums))

// --- the weight gradient, the transpose of all this
// -----------------------------------------------------------

// Tiles [tile_begin, tile_end) of the gradient of y (params.target): a block of columns of the
// sums.
MF_DECLARE_SIMD(void, winograd_sums,
                (const WinogradParams& params, const TimeSegment& segment,
                 const WinogradLayout& layout, const WinogradTiles& tiles, index_t block,
                 index_t tile_begin, index_t tile_end, float* sums))

// Adds what the group of tiles gives to the weights of a block of columns and the channels [begin,
// end) of the sum, in the form of params.packed. `weights` is memory of the thread: the points of a
// set, of layout.weight_point floats.
MF_DECLARE_SIMD(void, winograd_add_weights,
                (const WinogradParams& params, const TimeSegment& segment,
                 const WinogradLayout& layout, index_t block, index_t begin, index_t end,
                 const float* sources, const float* sums, float* weights, float* packed))

// The taps of the channels [begin, end) of x, [channel][tap][column], to dweight [out channel][in
// channel][tap] of type `target_type`.
MF_DECLARE_SIMD(void, winograd_unpack,
                (const WinogradParams& params, const WinogradColumns& columns, index_t begin,
                 index_t end, const float* taps, void* dweight))

}  // namespace magvit_fast
