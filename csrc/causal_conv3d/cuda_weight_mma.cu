// causal_conv3d on tensor cores: the weight gradient, a sum over pixels split over blocks.
// Previous hop: cuda.cu, which afterwards adds up the parts in their order.
// Next hop: mma.sync through common/cuda/ptx.cuh.
//
// Grid: x = (group, tap, tile of Cout, tile of Cin), y = part of the pixels (gemm_rows.h,
// weight_split). A block sums dy[pixel, 128 channels of Cout] x x[source(pixel, tap), kColumns
// channels of Cin] over its pixels, 32 a step; both operands lie pixel by pixel, so both pass
// through the transposed matrix load. FLOPs: 2 x pixels x Cout x Cin a tap. Traffic per step: (128
// + kColumns) x 64 bytes; the parts are written once as float32 and read once by the sum. Limits:
// 16-bit types, channels of a group in eights, 2^31 - 1 tiles, 65535 parts.
//
// Instructions a warp issues in a step of 128 x 128 (counted in the machine code of sm_90a), 32 of
// them products: v0, every pixel of x looked up from its coordinates, about 365; v1, frame and row
// looked up where they change, about 200, and 95 more at such a change.
#include "causal_conv3d/cuda_kernels.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/tile.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kDepth = 32, kStages = 4;

template <int kColumns>
struct WarpGrid {
  static constexpr int across = kColumns / 32, down = 8 / across;
  static constexpr int mma_rows = kRows / down / 16;
};

template <int kColumns>
constexpr int kStageBytes = kDepth * (kRows + kColumns) * 2;

struct WeightPlace {
  int group, tap, first_out, first_in;
};

__device__ __forceinline__ WeightPlace weight_place(index_t block, int taps, int out_tiles,
                                                    int in_tiles, int columns) {
  const int in_tile = static_cast<int>(block % in_tiles);
  block /= in_tiles;
  const int out_tile = static_cast<int>(block % out_tiles);
  block /= out_tiles;
  return {static_cast<int>(block / taps), static_cast<int>(block % taps), out_tile * kRows,
          in_tile * columns};
}

// The source pixels that successive pixels of dy read through one tap. Frame and row are looked up
// where they change, not at every step.
template <class T>
struct SourceWalk {
  PixelWalk at;  // in dy
  const T* row;  // of the source, at this thread's channels; null: padding

  __device__ __forceinline__ void look_up(const WeightProblem& p, int kt, int kh, int channel) {
    const GemmShape& s = p.shape;
    const Gathered from =
        source_pixel(s, at.n, source_index(s.t, at.t, kt), source_index(s.h, at.h, kh), 0);
    const T* base = static_cast<const T*>(from.in_history ? p.history : p.x);
    row = from.pixel < 0 ? nullptr : base + from.pixel * s.in_channels + channel;
  }
  __device__ __forceinline__ void advance(const WeightProblem& p, int kt, int kh, int channel) {
    if (at.w + kDepth < p.shape.w.out) {
      at.w += kDepth;
    } else {
      at.advance(p.shape, kDepth);
      look_up(p, kt, kh, channel);
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    weight_mma_kernel(WeightProblem p, int out_tiles, int in_tiles) {
  using Warps = WarpGrid<kColumns>;
  constexpr int kOutChunks = kRows / 8, kInChunks = kColumns / 8;
  constexpr int kInUnits = kDepth * kInChunks;  // 16-byte pieces of a step's x tile
  constexpr int kInRows = (kInUnits + kThreads - 1) / kThreads;
  const GemmShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int in = s.group_in();
  const int out = s.group_out();
  const int taps = s.taps();
  const WeightPlace place = weight_place(blockIdx.x, taps, out_tiles, in_tiles, kColumns);
  const int kw = place.tap % s.w.kernel;
  const int kh = place.tap / s.w.kernel % s.h.kernel;
  const int kt = place.tap / s.w.kernel / s.h.kernel;

  const index_t pixels = gemm_rows<true>(s);
  const index_t begin = blockIdx.y * p.split.pixels_per_part;
  const index_t end =
      begin + p.split.pixels_per_part < pixels ? begin + p.split.pixels_per_part : pixels;
  const int full = static_cast<int>((end - begin) / kDepth);  // steps of all pixels
  const int rest = static_cast<int>((end - begin) % kDepth);
  const int steps = full + (rest > 0 ? 1 : 0);

  // dy: this thread copies chunk thread % 16 of pixels thread / 16 and + 16 of a step.
  const int dy_chunk = thread % kOutChunks, dy_pixel = thread / kOutChunks;
  const int dy_channel = place.first_out + dy_chunk * 8;
  // x: chunk thread % kInChunks of pixels thread / kInChunks (and + 16 where a step has two).
  const int x_chunk = thread % kInChunks, x_pixel = thread / kInChunks;
  const bool loads_x = thread < kInUnits && place.first_in + x_chunk * 8 < in;
  const int x_channel = place.group * in + place.first_in + x_chunk * 8;
  SourceWalk<T> walk[kInRows];
  for (int i = 0; i < kInRows; ++i) {
    walk[i].at.set(s, begin + x_pixel + i * (kThreads / kInChunks));
    walk[i].look_up(p, kt, kh, x_channel);
  }
  const T* dy = static_cast<const T*>(p.dy) + (begin + dy_pixel) * s.out_channels +
                place.group * out + dy_channel;

  unsigned char* stages = dynamic_shared();
  const auto load_step = [&](int step) {  // for every step in turn
    T* dy_tile = reinterpret_cast<T*>(stages + step % kStages * kStageBytes<kColumns>);
    T* x_tile = dy_tile + kDepth * kRows;
    const int here = step < full ? kDepth : rest;  // pixels
    for (int i = 0; i < 2; ++i) {
      const int row = dy_pixel + i * 16;
      const bool valid = row < here && dy_channel < out;
      copy_async_16(dy_tile + chunk_at<kOutChunks>(row, dy_chunk) * 8,
                    valid ? static_cast<const void*>(dy + i * 16 * s.out_channels) : p.dy, valid);
    }
    dy += kDepth * s.out_channels;
    for (int i = 0; i < kInRows; ++i) {
      const int row = x_pixel + i * (kThreads / kInChunks);
      if (thread < kInUnits) {
        const int w = source_index(s.w, walk[i].at.w, kw);
        const bool valid = loads_x && row < here && walk[i].row != nullptr && w >= 0;
        const void* from = p.x;
        if (valid) from = walk[i].row + static_cast<index_t>(w) * s.in_channels;
        copy_async_16(x_tile + chunk_at<kInChunks>(row, x_chunk) * 8, from, valid);
        walk[i].advance(p, kt, kh, x_channel);
      }
    }
  };

  float sum[Warps::mma_rows][4][4] = {};
  const int warp = thread / 32, lane = thread % 32;
  const int warp_row = warp / Warps::across * Warps::mma_rows * 16,
            warp_column = warp % Warps::across * 32;
  const LaneAddress by_rows = rows_first(lane), by_chunks = chunks_first(lane);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_step(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load_step(step + kStages - 1);
    copy_async_commit();
    const T* dy_tile = reinterpret_cast<const T*>(stages + step % kStages * kStageBytes<kColumns>);
    const T* x_tile = dy_tile + kDepth * kRows;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrix_transposed(
            b[j],
            x_tile +
                chunk_at<kInChunks>(k + by_rows.row, warp_column / 8 + j * 2 + by_rows.chunk) * 8);
#pragma unroll
      for (int i = 0; i < Warps::mma_rows; ++i) {
        std::uint32_t a[4];
        load_matrix_transposed(
            a, dy_tile +
                   chunk_at<kOutChunks>(k + by_chunks.row, warp_row / 8 + i * 2 + by_chunks.chunk) *
                       8);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_accumulate<T>(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  copy_async_wait<0>();

  float* part = p.partial + static_cast<index_t>(blockIdx.y) * s.out_channels * taps * in;
  for (int i = 0; i < Warps::mma_rows; ++i)
    for (int half = 0; half < 2; ++half) {
      const int row = place.first_out + warp_row + i * 16 + half * 8 + lane / 4;
      if (row >= out) continue;
      const index_t cout = static_cast<index_t>(place.group) * out + row;
      for (int j = 0; j < 4; ++j) {
        const int column = place.first_in + warp_column + j * 8 + lane % 4 * 2;
        if (column < in)  // channels come in eights: the pair is inside or outside as one
          store_pair(part + (cout * taps + place.tap) * in + column, sum[i][j][half * 2],
                     sum[i][j][half * 2 + 1]);
      }
    }
}

int columns_for(const GemmShape& s) {
  const int in = s.group_in();
  return in <= 32 ? 32 : in <= 64 ? 64 : 128;
}

template <class T, int kColumns>
void launch_tiles(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int out_tiles = ceil_div(p.shape.group_out(), kRows);
  const int in_tiles = ceil_div(p.shape.group_in(), kColumns);
  const unsigned tiles =
      grid_blocks(weight_tiles_mma(p.shape).count, "causal_conv3d: more than 2^31 - 1 tiles");
  launch(guard, ctx, weight_mma_kernel<T, kColumns>,
         dim3(tiles, static_cast<unsigned>(p.split.parts)), kThreads,
         kStages * kStageBytes<kColumns>, p, out_tiles, in_tiles);
}

}  // namespace

WeightTiles weight_tiles_mma(const GemmShape& s) {
  const int columns = columns_for(s);
  return {kRows, columns,
          index_t{s.groups} * s.taps() * ceil_div(s.group_out(), kRows) *
              ceil_div(s.group_in(), columns)};
}

void weight_mma(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  with_half_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    switch (columns_for(p.shape)) {
      case 32:
        return launch_tiles<T, 32>(p, guard, ctx);
      case 64:
        return launch_tiles<T, 64>(p, guard, ctx);
      default:
        return launch_tiles<T, 128>(p, guard, ctx);
    }
  });
}

}  // namespace magvit_fast::cuda
