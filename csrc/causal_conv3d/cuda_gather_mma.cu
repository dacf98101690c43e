// causal_conv3d on tensor cores: forward and input gradient as one gathered matrix product.
// Previous hop: cuda.cu.
// Next hop: mma.sync through common/cuda/ptx.cuh.
//
// Grid: one block of 8 warps for a tile of 128 rows (pixels) x kColumns channels of one group;
// column tiles run fastest, so that blocks which gather the same pixels run together.
//
// Main loop: for every (tap, copy) that the tile's rows reach, for every 32 channels, 128 x 32
// gathered elements and 32 x kColumns weights move to shared memory (cp.async, kStages deep) and
// are multiplied. Forward weights lie [Cout][tap][Cin], the sum's index innermost; the input
// gradient sums over Cout and reads the same array transposed by the matrix load, so one packing
// serves both. A tile of one frame skips the taps that read padding: frame 0 of a causal 3x3x3
// kernel costs a third.
//
// FLOPs: 2 x rows x columns x taps reached x channels. Traffic per step: (128 + kColumns) x 64
// bytes from L2. Registers (nvcc 13.0, sm_90a): 128, two blocks a multiprocessor; none
// spilled (sm_80: 44 bytes at kColumns = 128). Limits: 16-bit types; channels of a group in eights;
// 2^31 - 1 tiles; coordinates along an axis below 2^30, offsets in int64.
#include "causal_conv3d/gather.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/tile.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kDepth = 32, kStages = 4;
constexpr int kDepthChunks = kDepth / 8;

// Eight warps over a tile: 32 columns each, mma_rows blocks of 16 rows.
template <int kColumns>
struct WarpGrid {
  static constexpr int across = kColumns / 32, down = 8 / across;
  static constexpr int mma_rows = kRows / down / 16;
};

template <int kColumns>
struct Stage {
  static constexpr int left_bytes = kRows * kDepth * 2;
  static constexpr int bytes = left_bytes + kColumns * kDepth * 2;
};

// A thread's share of the weights of a step, 32 sum channels x kColumns columns in the layout that
// the matrix load wants. What all steps share is worked out once.
template <class T, bool kForward, int kColumns>
struct WeightLoads {
  static constexpr int chunks = kForward ? kDepthChunks : kColumns / 8;  // of one row of the tile
  static constexpr int rows = kForward ? kColumns : kDepth, apart = kThreads / chunks;
  static constexpr int count = rows > apart ? rows / apart : 1;

  const T* from;     // tap 0, channel 0 of the sum, at this thread's first row and chunk
  index_t row_step;  // to its next row
  int row, chunk;
  int columns;  // from this thread's first column on

  __device__ __forceinline__ WeightLoads(const GatherProblem& p, int group, int first_column) {
    const int in = p.shape.group_in(), out = p.shape.group_out();
    row = static_cast<int>(threadIdx.x) / chunks;
    chunk = static_cast<int>(threadIdx.x) % chunks;
    const int cout = kForward ? first_column + row : row;
    const int cin = kForward ? chunk * 8 : first_column + chunk * 8;
    const index_t of_one = static_cast<index_t>(p.shape.taps()) * in;
    from =
        static_cast<const T*>(p.weight) + (static_cast<index_t>(group) * out + cout) * of_one + cin;
    row_step = apart * of_one;
    columns = kForward ? out - cout : in - cin;
  }
  // `at`: of the step's tap and first sum channel; `left`: sum channels from there on.
  __device__ __forceinline__ void load(const GatherProblem& p, T* tile, index_t at,
                                       int left) const {
    if (rows < apart && row >= rows) return;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const bool inside = kForward ? i * apart < columns && chunk * 8 < left
                                   : row + i * apart < left && columns > 0;
      const void* here = p.weight;
      if (inside) here = from + at + i * row_step;
      copy_async_16(tile + chunk_at<chunks>(row + i * apart, chunk) * 8, here, inside);
    }
  }
};

template <class T, bool kForward, int kColumns>
__device__ __forceinline__ void multiply_stage(const T* left, const T* weights, int warp_row,
                                               int warp_column,
                                               float (&sum)[WarpGrid<kColumns>::mma_rows][4][4]) {
  constexpr int kMmaRows = WarpGrid<kColumns>::mma_rows;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const LaneAddress by_rows = rows_first(lane), by_chunks = chunks_first(lane);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    std::uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = warp_column + j * 16;
      if constexpr (kForward) {
        load_matrix(
            b[j],
            weights + chunk_at<kDepthChunks>(column + by_chunks.row, k / 8 + by_chunks.chunk) * 8);
      } else {
        load_matrix_transposed(
            b[j],
            weights + chunk_at<kColumns / 8>(k + by_rows.row, column / 8 + by_rows.chunk) * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kMmaRows;
         ++i) {  // one block of rows at a time: four registers, not sixteen
      std::uint32_t a[4];
      load_matrix(
          a, left + chunk_at<kDepthChunks>(warp_row + i * 16 + by_rows.row, k / 8 + by_rows.chunk) *
                        8);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        multiply_accumulate<T>(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <class T, bool kForward, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    gather_mma_kernel(GatherProblem p, int column_tiles) {
  using Warps = WarpGrid<kColumns>;
  __shared__ GemmRow rows[kRows];
  __shared__ T* results[kRows];
  const GemmShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int in = s.group_in();
  const int out = s.group_out();
  const int depth = kForward ? in : out, columns = kForward ? out : in;
  const TilePlace place = tile_place(blockIdx.x, s.groups, column_tiles, kRows, kColumns);
  if (thread < kRows) note_rows<T, kForward>(p, place.first_row, thread, rows, results);
  __syncthreads();

  EntryWalk<kForward> walk = vote_walk<kForward>(p, rows[thread % kRows]);
  const int chunks = ceil_div(depth, kDepth);
  const int steps = walk.size(p.axes) * chunks;

  // This thread gathers chunk `thread % 4` of rows thread / 4 and thread / 4 + 64.
  const int my_chunk = thread % kDepthChunks, my_row = thread / kDepthChunks;
  const int left_channel = place.group * depth + my_chunk * 8;
  const T* source[2] = {nullptr, nullptr};
  const WeightLoads<T, kForward, kColumns> weight_loads(p, place.group, place.first_column);
  index_t weights_at = 0;
  int chunk = 0;  // of the present entry, next to be loaded
  unsigned char* stages = dynamic_shared();
  const auto load_step = [&](int stage) {
    T* left = reinterpret_cast<T*>(stages + stage * Stage<kColumns>::bytes);
    T* weights = left + kRows * kDepth;
    if (chunk == 0) {
      for (int i = 0; i < 2; ++i)
        source[i] = left_pixel<T, kForward>(p, walk, rows[my_row + i * 64], left_channel);
      weights_at = static_cast<index_t>(tap_of(p, walk)) * in;
    }
    const int channel = chunk * kDepth;
    for (int i = 0; i < 2; ++i) {
      const bool valid = source[i] != nullptr && channel + my_chunk * 8 < depth;
      copy_async_16(left + chunk_at<kDepthChunks>(my_row + i * 64, my_chunk) * 8,
                    valid ? source[i] + channel : p.weight, valid);
    }
    weight_loads.load(p, weights, weights_at, depth - channel);
    weights_at += kForward ? kDepth : static_cast<index_t>(kDepth) * s.taps() * in;
    if (++chunk == chunks) {
      chunk = 0;
      walk.next(p.axes);
    }
  };

  float sum[Warps::mma_rows][4][4] = {};
  const int warp = thread / 32;
  const int warp_row = warp / Warps::across * Warps::mma_rows * 16,
            warp_column = warp % Warps::across * 32;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_step(step);
    copy_async_commit();  // also when empty: the count of groups is what is waited for
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the step's tiles are whole, and the stage loaded next is read by nobody
    if (step + kStages - 1 < steps) load_step((step + kStages - 1) % kStages);
    copy_async_commit();
    const T* left = reinterpret_cast<const T*>(stages + step % kStages * Stage<kColumns>::bytes);
    multiply_stage<T, kForward, kColumns>(left, left + kRows * kDepth, warp_row, warp_column, sum);
  }
  copy_async_wait<0>();

  const int lane = thread % 32;
  const bool in_pairs = columns % 2 == 0;  // then every row starts at an even element, too
  for (int i = 0; i < Warps::mma_rows; ++i)
    for (int half = 0; half < 2; ++half) {
      T* result = results[warp_row + i * 16 + half * 8 + lane / 4];
      if (result == nullptr) continue;
      for (int j = 0; j < 4; ++j) {
        const int column = place.first_column + warp_column + j * 8 + lane % 4 * 2;
        if (column >= columns) continue;
        const int channel = place.group * columns + column;
        float first = sum[i][j][half * 2], second = sum[i][j][half * 2 + 1];
        if (kForward && p.bias != nullptr) {
          const T* bias = static_cast<const T*>(p.bias) + channel;
          first += static_cast<float>(bias[0]);
          if (column + 1 < columns) second += static_cast<float>(bias[1]);
        }
        if (kForward && p.residual != nullptr) {
          first += residual_at(p, result + channel);
          if (column + 1 < columns) second += residual_at(p, result + channel + 1);
        }
        if (in_pairs) {
          store_pair(result + channel, first, second);
        } else {
          result[channel] = static_cast<T>(first);
          if (column + 1 < columns) result[channel + 1] = static_cast<T>(second);
        }
      }
    }
}

template <class T, bool kForward, int kColumns>
void launch_tiles(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int column_tiles = ceil_div(kForward ? p.shape.group_out() : p.shape.group_in(), kColumns);
  const index_t row_tiles = ceil_div(gemm_rows<kForward>(p.shape), index_t{kRows});
  const unsigned blocks = grid_blocks(row_tiles * p.shape.groups * column_tiles,
                                      "causal_conv3d: more than 2^31 - 1 tiles");
  launch(guard, ctx, gather_mma_kernel<T, kForward, kColumns>, dim3(blocks), kThreads,
         kStages * Stage<kColumns>::bytes, p, column_tiles);
}

template <bool kForward>
void launch_product(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int columns = kForward ? p.shape.group_out() : p.shape.group_in();
  with_half_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (columns <= 32) return launch_tiles<T, kForward, 32>(p, guard, ctx);
    if (columns <= 64) return launch_tiles<T, kForward, 64>(p, guard, ctx);
    launch_tiles<T, kForward, 128>(p, guard, ctx);
  });
}

}  // namespace

void gather_mma_forward(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  launch_product<true>(p, guard, ctx);
}
void gather_mma_input_grad(const GatherProblem& p, const DeviceGuard& guard,
                           const ExecContext& ctx) {
  launch_product<false>(p, guard, ctx);
}

}  // namespace magvit_fast::cuda
