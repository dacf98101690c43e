// causal_conv3d on float32 units: the weight gradient for float32, and for any channel count.
// Previous hop: cuda.cu, which afterwards adds up the parts in their order.
// Next hop: none.
//
// Grid: x = (group, tile of Cout, tile of 128 columns), y = part of the pixels; a column is one
// (tap, input channel), so thin inputs fill their tiles, too. A thread stays with one column and
// one output channel when loading, and owns kTall x 8 sums. One step: kDepth pixels,
// double-buffered as in cuda_gather_fma.cu. kTall = 1 (16 channels of Cout a tile) is for thin
// outputs.
//
// Registers (nvcc 13.0, sm_90a): up to 255, nothing spilled; one block a multiprocessor at 128
// rows.
#include "causal_conv3d/cuda_kernels.h"
#include "common/cuda/convert.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 128, kWide = kColumns / 16, kDepth = 8;
constexpr int kTallRows = 128, kThinRows = 16;

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    weight_fma_kernel(WeightProblem p, int out_tiles, int column_tiles) {
  constexpr int kTall = kRows / 16;
  constexpr int kRowStep = kThreads / kRows;  // pixels between this thread's elements of dy
  constexpr int kRowUnits = kRowStep < kDepth ? kDepth / kRowStep : 1;
  constexpr int kColumnUnits = kDepth * kColumns / kThreads;
  __shared__ float dy_tile[2][kDepth][kRows];
  __shared__ float x_tile[2][kDepth][kColumns];
  const GemmShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int in = s.group_in();
  const int out = s.group_out();
  const int taps = s.taps();
  index_t block = blockIdx.x;
  const int first_column = static_cast<int>(block % column_tiles) * kColumns;
  block /= column_tiles;
  const int first_row = static_cast<int>(block % out_tiles) * kRows;
  const int group = static_cast<int>(block / out_tiles);

  const index_t pixels = gemm_rows<true>(s);
  const index_t begin = blockIdx.y * p.split.pixels_per_part;
  const index_t end =
      begin + p.split.pixels_per_part < pixels ? begin + p.split.pixels_per_part : pixels;
  const int steps = static_cast<int>(ceil_div(end - begin, static_cast<index_t>(kDepth)));

  const int my_row = thread % kRows, row_pixel = thread / kRows;
  const int my_column = thread % kColumns, column_pixel = thread / kColumns;
  const int column = first_column + my_column;
  const bool has_row = first_row + my_row < out && row_pixel < kDepth;
  const bool has_column = column < taps * in;
  const int tap = column / in, channel = column % in;
  const int kw = tap % s.w.kernel;
  const int kh = tap / s.w.kernel % s.h.kernel;
  const int kt = tap / s.w.kernel / s.h.kernel;
  PixelWalk at[kColumnUnits];
  for (int i = 0; i < kColumnUnits; ++i)
    at[i].set(s, begin + column_pixel + i * (kThreads / kColumns));

  float dy[kRowUnits], x[kColumnUnits];
  const auto fetch_step = [&](int step) {
    const index_t first = begin + static_cast<index_t>(step) * kDepth;
    for (int i = 0; i < kRowUnits; ++i) {
      const index_t pixel = first + row_pixel + i * kRowStep;
      const index_t offset =
          pixel * s.out_channels + static_cast<index_t>(group) * out + first_row + my_row;
      dy[i] =
          has_row && pixel < end ? static_cast<float>(static_cast<const T*>(p.dy)[offset]) : 0.0f;
    }
    for (int i = 0; i < kColumnUnits; ++i) {
      Gathered from{-1, false};
      if (has_column && first + column_pixel + i * (kThreads / kColumns) < end)
        from = source_pixel(s, at[i].n, source_index(s.t, at[i].t, kt),
                            source_index(s.h, at[i].h, kh), source_index(s.w, at[i].w, kw));
      const T* base = static_cast<const T*>(from.in_history ? p.history : p.x);
      const index_t offset =
          from.pixel * s.in_channels + static_cast<index_t>(group) * in + channel;
      x[i] = from.pixel >= 0 ? static_cast<float>(base[offset]) : 0.0f;
      at[i].advance(s, kDepth);
    }
  };
  const auto keep_step = [&](int stage) {
    for (int i = 0; i < kRowUnits; ++i)
      if (row_pixel < kDepth) dy_tile[stage][row_pixel + i * kRowStep][my_row] = dy[i];
    for (int i = 0; i < kColumnUnits; ++i)
      x_tile[stage][column_pixel + i * (kThreads / kColumns)][my_column] = x[i];
  };

  // Sums of two levels: 64 products, then their sums. One long chain of float32 additions would err
  // several times as much as the blocked sums of other libraries.
  float sum[kTall][kWide] = {}, part[kTall][kWide] = {};
  const auto add_part = [&] {
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum[i][j] += part[i][j], part[i][j] = 0.0f;
  };
  const int tx = thread % 16, ty = thread / 16;
  if (steps > 0) {
    fetch_step(0);
    keep_step(0);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    const bool more = step + 1 < steps;
    if (more) fetch_step(step + 1);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kTall], b[kWide];
#pragma unroll
      for (int i = 0; i < kTall; ++i) a[i] = dy_tile[stage][k][ty + i * 16];
#pragma unroll
      for (int j = 0; j < kWide; ++j) b[j] = x_tile[stage][k][tx + j * 16];
#pragma unroll
      for (int i = 0; i < kTall; ++i)
#pragma unroll
        for (int j = 0; j < kWide; ++j) part[i][j] = fmaf(a[i], b[j], part[i][j]);
    }
    if (step % (64 / kDepth) == 64 / kDepth - 1) add_part();
    if (more) keep_step(stage ^ 1);
    __syncthreads();
  }
  add_part();

  float* result = p.partial + static_cast<index_t>(blockIdx.y) * s.out_channels * taps * in;
  for (int i = 0; i < kTall; ++i) {
    const int row = first_row + ty + i * 16;
    if (row >= out) continue;
    const index_t cout = static_cast<index_t>(group) * out + row;
    for (int j = 0; j < kWide; ++j) {
      const int at_column = first_column + tx + j * 16;
      if (at_column < taps * in) result[cout * taps * in + at_column] = sum[i][j];
    }
  }
}

int rows_for(const GemmShape& s) { return s.group_out() <= kThinRows ? kThinRows : kTallRows; }

template <class T, int kRows>
void launch_tiles(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int out_tiles = ceil_div(p.shape.group_out(), kRows);
  const int column_tiles = ceil_div(p.shape.group_in() * p.shape.taps(), kColumns);
  const unsigned tiles =
      grid_blocks(weight_tiles_fma(p.shape).count, "causal_conv3d: more than 2^31 - 1 tiles");
  launch(guard, ctx, weight_fma_kernel<T, kRows>, dim3(tiles, static_cast<unsigned>(p.split.parts)),
         kThreads, 0, p, out_tiles, column_tiles);
}

}  // namespace

WeightTiles weight_tiles_fma(const GemmShape& s) {
  const int rows = rows_for(s);
  return {rows, kColumns,
          index_t{s.groups} * ceil_div(s.group_out(), rows) *
              ceil_div(s.group_in() * s.taps(), kColumns)};
}

void weight_fma(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (rows_for(p.shape) == kThinRows) return launch_tiles<T, kThinRows>(p, guard, ctx);
    launch_tiles<T, kTallRows>(p, guard, ctx);
  });
}

}  // namespace magvit_fast::cuda
