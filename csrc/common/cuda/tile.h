// Layout of operand tiles in shared memory and the lanes' share of a matrix load. Host and device.
// Previous hop: tensor-core kernels.
// Next hop: none; the emulated matrix load of the tests refuses bank conflicts.
#pragma once

#include "common/shape.h"

namespace magvit_fast::cuda {

// A tile is rows of kChunks 16-byte chunks (8 elements of 16 bits), chunks permuted within the row
// so that the 8 rows of one 8x8 matrix lie in 8 different groups of 4 banks.
template <int kChunks>
MF_HOST_DEVICE constexpr int chunk_at(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0, "rows of 32, or of a multiple of 64 elements");
  return row * kChunks + (kChunks == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7));
}

// Which (row, 8-element chunk) lane l addresses in a four-matrix load of a 16x16 block.
struct LaneAddress {
  int row, chunk;
};
// Matrices in the order (rows 0-7, chunk 0), (rows 8-15, chunk 0), (0-7, 1), (8-15, 1).
MF_HOST_DEVICE constexpr LaneAddress rows_first(int lane) {
  return {(lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4};
}
// Matrices in the order (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1).
MF_HOST_DEVICE constexpr LaneAddress chunks_first(int lane) {
  return {(lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1};
}

}  // namespace magvit_fast::cuda
