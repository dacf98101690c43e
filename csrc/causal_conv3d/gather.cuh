// causal_conv3d on CUDA: what the gathering kernels do before their main loop.
// Previous hop: cuda_gather_mma.cu, cuda_gather_fma.cu.
// Next hop: gemm_rows.h.
#pragma once

#include "causal_conv3d/cuda_kernels.h"
#include "common/cuda/convert.cuh"

namespace magvit_fast::cuda {

// Threads 0..kRows-1 note the tile's rows and where their results go (null: nowhere).
template <class T, bool kForward>
__device__ __forceinline__ void note_rows(const GatherProblem& p, index_t first_row, int row,
                                          GemmRow* rows, T** results) {
  const GemmRow at = gemm_row<kForward>(p.shape, first_row + row);
  rows[row] = at;
  T* result = nullptr;
  if (at.n >= 0) {
    if (kForward) {
      result = static_cast<T*>(p.out) +
               output_pixel(p.shape, at.n, at.t, at.h, at.w) * p.shape.out_channels;
    } else {
      const Gathered to = source_pixel(p.shape, at.n, at.t, at.h, at.w);
      T* base = static_cast<T*>(to.in_history ? p.out_history : p.out);
      if (base != nullptr) result = base + to.pixel * p.shape.in_channels;
    }
  }
  results[row] = result;
}

// What is added to the result at this address (forward: results lie in `out` alone).
template <class T>
__device__ __forceinline__ float residual_at(const GatherProblem& p, const T* result) {
  return static_cast<float>(
      static_cast<const T*>(p.residual)[result - static_cast<const T*>(p.out)]);
}

// All threads of the block: which entries of each axis any row reaches.
template <bool kForward>
__device__ __forceinline__ EntryWalk<kForward> vote_walk(const GatherProblem& p,
                                                         const GemmRow& row) {
  EntryWalk<kForward> walk;
  for (int i = 0; i < 3; ++i) {
    const AxisMap32& map = i == 0 ? p.shape.t : i == 1 ? p.shape.h : p.shape.w;
    const int at = i == 0 ? row.t : i == 1 ? row.h : row.w;
    const EntryAxis axis = p.axes[i];
    walk.active[i] = 0;
    const int voted = axis.entries < walk.kMaskBits ? axis.entries : walk.kMaskBits;
    for (int entry = 0; entry < voted; ++entry) {
      const bool reached =
          row.n >= 0 && reach<kForward>(map, at, entry / axis.copies, entry % axis.copies) >= 0;
      if (__syncthreads_or(reached)) walk.active[i] |= std::uint64_t{1} << entry;
    }
  }
  walk.begin(p.axes);
  return walk;
}

// The left operand's channels of a row under the walk's present entry, or null for zeros.
template <class T, bool kForward>
__device__ __forceinline__ const T* left_pixel(const GatherProblem& p,
                                               const EntryWalk<kForward>& walk, const GemmRow& row,
                                               int channel) {
  const Gathered from = gather<kForward>(p.shape, p.axes, walk, row);
  if (from.pixel < 0) return nullptr;
  const int channels = kForward ? p.shape.in_channels : p.shape.out_channels;
  const void* base = from.in_history ? p.left_history : p.left;
  return static_cast<const T*>(base) + from.pixel * channels + channel;
}

template <bool kForward>
__device__ __forceinline__ int tap_of(const GatherProblem& p, const EntryWalk<kForward>& walk) {
  return (walk.tap(p.axes, 0) * p.shape.h.kernel + walk.tap(p.axes, 1)) * p.shape.w.kernel +
         walk.tap(p.axes, 2);
}

// Which part of the product a block makes: neighbors in the grid share the gathered rows.
struct TilePlace {
  index_t first_row;
  int group, first_column;
};
__device__ __forceinline__ TilePlace tile_place(index_t block, int groups, int column_tiles,
                                                int tile_rows, int tile_columns) {
  const index_t column_tile = block % column_tiles, rest = block / column_tiles;
  return {rest / groups * tile_rows, static_cast<int>(rest % groups),
          static_cast<int>(column_tile) * tile_columns};
}

}  // namespace magvit_fast::cuda
