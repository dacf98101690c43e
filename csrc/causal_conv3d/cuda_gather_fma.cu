// causal_conv3d on float32 units: forward and input gradient for float32, and for any channel
// count. Previous hop: cuda.cu. Next hop: none.
//
// The product of cuda_gather_mma.cu with plain multiply-adds: true float32 (no TF32), 16-bit types
// widened. Grid: one block of 256 threads for 128 rows x 16 * kWide channels; a thread owns rows
// {ty, ty + 16, ...} and columns {tx, tx + 16, ...}. One step: kDepth channels of one (tap, copy);
// the next step's elements wait in registers while the present one is multiplied, two stages of
// shared memory, one barrier a step. kVector = 4 moves float4 (channels of a group in fours), 1
// takes any count. Thin layers (3 channels) use kDepth = 4, so that little of a step is padding.
//
// Registers (nvcc 13.0, sm_90a): up to 255, nothing spilled; one block a multiprocessor at 128
// columns.
#include "causal_conv3d/gather.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kTall = kRows / 16;

template <class T, int kVector>
struct Elements {
  float value[kVector];
  __device__ __forceinline__ void load(const T* p, bool valid) {
    if constexpr (kVector == 4) {
      const float4 v = valid ? *reinterpret_cast<const float4*>(p) : make_float4(0, 0, 0, 0);
      value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
    } else {
      value[0] = valid ? static_cast<float>(*p) : 0.0f;
    }
  }
};

template <class T, bool kForward, int kWide, int kDepth, int kVector>
__global__ void __launch_bounds__(kThreads) gather_fma_kernel(GatherProblem p, int column_tiles) {
  constexpr int kColumns = 16 * kWide, kPad = 4;
  constexpr int kAhead = kThreads / kRows;  // threads on one row
  constexpr int kLeftUnits = kDepth / kVector / kAhead;
  // Weights run innermost along Cin: the sum's index forward, the columns in the input gradient.
  constexpr int kWeightAlong = (kForward ? kDepth : kColumns) / kVector;
  constexpr int kWeightAll = kDepth * kColumns / kVector;
  constexpr int kWeightUnits = (kWeightAll + kThreads - 1) / kThreads;
  static_assert(kLeftUnits * kAhead * kVector == kDepth);
  __shared__ GemmRow rows[kRows];
  __shared__ T* results[kRows];
  __shared__ float left_tile[2][kDepth][kRows + kPad];
  __shared__ float weight_tile[2][kDepth][kColumns + kPad];

  const GemmShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int in = s.group_in();
  const int out = s.group_out();
  const int taps = s.taps();
  const int depth = kForward ? in : out, columns = kForward ? out : in;
  const TilePlace place = tile_place(blockIdx.x, s.groups, column_tiles, kRows, kColumns);
  if (thread < kRows) note_rows<T, kForward>(p, place.first_row, thread, rows, results);
  __syncthreads();
  EntryWalk<kForward> walk = vote_walk<kForward>(p, rows[thread % kRows]);
  const int chunks = ceil_div(depth, kDepth);
  const int steps = walk.size(p.axes) * chunks;

  // This thread gathers of row thread % 128 the channels (thread / 128 + 2 i) * kVector: one
  // address a tap, and what its neighbors leave of a sector comes from the first-level cache.
  const int my_row = thread % kRows, my_channel = thread / kRows * kVector;
  const T* source = nullptr;
  Elements<T, kVector> left[kLeftUnits], weights[kWeightUnits];
  int chunk = 0;
  const auto fetch_step = [&] {
    const int channel = chunk * kDepth;
    if (chunk == 0)
      source = left_pixel<T, kForward>(p, walk, rows[my_row], place.group * depth + my_channel);
    for (int i = 0; i < kLeftUnits; ++i) {
      const int ahead = channel + i * kAhead * kVector;
      left[i].load(source + ahead, source != nullptr && ahead + my_channel < depth);
    }
    const int tap = tap_of(p, walk);
    for (int i = 0; i < kWeightUnits; ++i) {
      const int unit = thread + i * kThreads;
      const int along = unit % kWeightAlong * kVector, across = unit / kWeightAlong;
      const int cout = kForward ? place.first_column + across : channel + across;
      const int cin = kForward ? channel + along : place.first_column + along;
      const index_t offset =
          ((static_cast<index_t>(place.group) * out + cout) * taps + tap) * in + cin;
      weights[i].load(static_cast<const T*>(p.weight) + offset,
                      unit < kWeightAll && cout < out && cin < in);
    }
    if (++chunk == chunks) {
      chunk = 0;
      walk.next(p.axes);
    }
  };
  const auto keep_step = [&](int stage) {
    for (int i = 0; i < kLeftUnits; ++i)
      for (int v = 0; v < kVector; ++v)
        left_tile[stage][my_channel + i * kAhead * kVector + v][my_row] = left[i].value[v];
    for (int i = 0; i < kWeightUnits; ++i) {
      const int unit = thread + i * kThreads;
      if (unit >= kWeightAll) continue;
      const int along = unit % kWeightAlong * kVector, across = unit / kWeightAlong;
      for (int v = 0; v < kVector; ++v) {
        if (kForward)
          weight_tile[stage][along + v][across] = weights[i].value[v];
        else
          weight_tile[stage][across][along + v] = weights[i].value[v];
      }
    }
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
    fetch_step();
    keep_step(0);
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    const bool more = step + 1 < steps;
    if (more) fetch_step();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kTall], b[kWide];
#pragma unroll
      for (int i = 0; i < kTall; ++i) a[i] = left_tile[stage][k][ty + i * 16];
#pragma unroll
      for (int j = 0; j < kWide; ++j) b[j] = weight_tile[stage][k][tx + j * 16];
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

  for (int i = 0; i < kTall; ++i) {
    T* result = results[ty + i * 16];
    if (result == nullptr) continue;
    for (int j = 0; j < kWide; ++j) {
      const int column = place.first_column + tx + j * 16;
      if (column >= columns) continue;
      const int channel = place.group * columns + column;
      float value = sum[i][j];
      if (kForward && p.bias != nullptr)
        value += static_cast<float>(static_cast<const T*>(p.bias)[channel]);
      if (kForward && p.residual != nullptr) value += residual_at(p, result + channel);
      result[channel] = static_cast<T>(value);
    }
  }
}

template <class T, bool kForward, int kWide, int kDepth, int kVector>
void launch_tiles(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int column_tiles =
      ceil_div(kForward ? p.shape.group_out() : p.shape.group_in(), 16 * kWide);
  const index_t row_tiles = ceil_div(gemm_rows<kForward>(p.shape), index_t{kRows});
  const unsigned blocks = grid_blocks(row_tiles * p.shape.groups * column_tiles,
                                      "causal_conv3d: more than 2^31 - 1 tiles");
  launch(guard, ctx, gather_fma_kernel<T, kForward, kWide, kDepth, kVector>, dim3(blocks), kThreads,
         0, p, column_tiles);
}

template <bool kForward>
void launch_product(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const int in = p.shape.group_in(), out = p.shape.group_out();
  const int columns = kForward ? out : in, depth = kForward ? in : out;
  with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float>) {
      const bool in_fours = in % 4 == 0 && (kForward || out % 4 == 0) && aligned_16(p.left) &&
                            aligned_16(p.left_history);
      if (in_fours && columns > 32) return launch_tiles<T, kForward, 8, 16, 4>(p, guard, ctx);
    }
    if (depth <= 4) return launch_tiles<T, kForward, 8, 4, 1>(p, guard, ctx);
    if (columns <= 32) return launch_tiles<T, kForward, 2, 16, 1>(p, guard, ctx);
    launch_tiles<T, kForward, 8, 16, 1>(p, guard, ctx);
  });
}

}  // namespace

void gather_fma_forward(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx) {
  launch_product<true>(p, guard, ctx);
}
void gather_fma_input_grad(const GatherProblem& p, const DeviceGuard& guard,
                           const ExecContext& ctx) {
  launch_product<false>(p, guard, ctx);
}

}  // namespace magvit_fast::cuda
