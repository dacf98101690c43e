// causal_conv3d on tensor cores for few channels on one side: the weight gradient, one reading.
// Previous hop: cuda.cu, which afterwards adds up the parts in their order.
// Next hop: cuda_thin.cuh and thin_plan.h.
//
// UNVERIFIED on a device: compiled, and run on the emulator of the tests.
//
// A product of 128 wide channels x 112 columns (28 quads: 27 taps of 4 channels) summed over
// pixels. Where x is thin, the rows are output pixels, the wide tensor is dy; where dy is thin, the
// rows are padded positions and the wide tensor is x, read once for every position that holds it.
// The thin tensor comes from its cells (expand_kernel): 8 bytes a (pixel, tap), no map, no
// boundary.
//
// Grid: x = tiles of quads and of wide channels, y = part of the rows (gemm_rows.h, weight_split).
// A step is 64 rows: 16 KB of wide channels and 14 KB of quads come by cp.async, three steps in
// flight. Warps 0-3 multiply the even slices of 16 rows, 4-7 the odd ones, 32 channels x 112
// columns each, and add up through shared memory: a row's channels are read once, its quads by four
// warps.
//
// Floor, 3 -> 128 channels, 17x128x128, batch 8, bfloat16: 584 MB read, 0.136 ms at 4.3 TB/s.
// Shared memory 1.7 KB a pixel, 0.13 ms at 28.7 TB/s; products 64 GFLOP, 0.11 ms at mma.sync's 600
// TFLOP/s; instructions, counted in the machine code: at most 664 a warp and step (56 of them
// products), 0.2 ms; cells 9 us, parts and their sum 22 MB each way, 10 us. Predicted 0.22-0.30 ms;
// 1,129 instructions where rows are padded positions or there is a history. First step beyond: the
// walk of a warp's rows (a third of the instructions) once for eight steps. Registers (nvcc 13.0,
// sm_90a): 242, nothing spilled; one block a multiprocessor.
#include "causal_conv3d/cuda_thin.cuh"
#include "common/cuda/tile.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWide = 128, kQuads = 28, kColumns = kQuads * kThinQuad;
constexpr int kDepth = 64, kStages = 3, kSlices = 2;  // slices: groups of warps along the sum
constexpr int kChunks = 16;                           // of a row of either tile: 256 bytes
constexpr int kTileBytes = kDepth * kChunks * 16, kStageBytes = 2 * kTileBytes;
constexpr int kWarpRows = 2, kWarpColumns = kColumns / 8;  // product tiles of a warp
constexpr int kGroupThreads = kThreads / kSlices;
static_assert(kWide == kWarps / kSlices * kWarpRows * 16);
static_assert(kGroupThreads * kWarpRows * kWarpColumns * 4 * 4 <= kStages * kStageBytes);

struct ThinWeight {
  WeightProblem g;
  ThinPlan plan;
  const uint2* cells;
  const void* wide;  // dy where x is thin, else x
  int wide_channels;
  int quads;       // of a row: taps * cell_quads
  int quad_tiles;  // tiles of the grid's x: quads fastest
};

// Rows of the sum in their order, stepped through without division.
struct RowWalk {
  int n, t, h, w;
  __device__ __forceinline__ void set(const ThinPlan& p, unsigned row) {
    const auto width = static_cast<unsigned>(p.w.rows), height = static_cast<unsigned>(p.h.rows),
               frames = static_cast<unsigned>(p.t.rows);
    const unsigned line = row / width, frame = line / height;
    w = static_cast<int>(row % width), h = static_cast<int>(line % height);
    t = static_cast<int>(frame % frames), n = static_cast<int>(frame / frames);
  }
  __device__ __forceinline__ void advance(const ThinPlan& p, int rows) {
    w += rows;
    while (w >= p.w.rows) {
      w -= p.w.rows;
      if (++h < p.h.rows) continue;
      h = 0;
      if (++t < p.t.rows) continue;
      t = 0;
      ++n;
    }
  }
  __device__ __forceinline__ int base(const ThinPlan& p) const {
    return p.base(n, p.t.first + t, p.h.first + h, p.w.first + w);
  }
};

// The wide channels of a row, or null for zeros. kLinear: rows are the wide tensor's own pixels.
template <class T, bool kLinear>
__device__ __forceinline__ const T* wide_pixel(const ThinWeight& p, const RowWalk& at,
                                               index_t row) {
  const GemmShape& s = p.g.shape;
  if (kLinear) return static_cast<const T*>(p.wide) + row * p.wide_channels;
  const Gathered from =
      source_pixel(s, at.n, source_at(s.t, p.plan.t.first + at.t),
                   source_at(s.h, p.plan.h.first + at.h), source_at(s.w, p.plan.w.first + at.w));
  if (from.pixel < 0) return nullptr;
  return static_cast<const T*>(from.in_history ? p.g.history : p.wide) +
         from.pixel * p.wide_channels;
}

// What a thread copies at every step: quad `lane` of rows warp, warp + 8, ..; and chunk thread % 16
// of rows thread / 16, + 16, ..
template <class T, bool kLinear>
struct Loader {
  const ThinWeight& p;
  index_t next, end;  // rows: the first of the next step, past the last
  int offset, channel;
  bool has_quad, has_channel;
  RowWalk thin, wide;

  __device__ __forceinline__ Loader(const ThinWeight& problem, index_t begin, index_t past,
                                    int first_quad, int first_channel)
      : p(problem), next(begin), end(past) {
    const GemmShape& s = p.g.shape;
    const int thread = static_cast<int>(threadIdx.x);
    const int quad = first_quad + thread % 32;
    has_quad = thread % 32 < kQuads && quad < p.quads;
    const int tap = has_quad ? quad / p.plan.cell_quads : 0;
    offset = p.plan.offset(tap / s.w.kernel / s.h.kernel, tap / s.w.kernel % s.h.kernel,
                           tap % s.w.kernel) +
             quad % p.plan.cell_quads;
    channel = first_channel + thread % kChunks * 8;
    has_channel = channel < p.wide_channels;
    thin.set(p.plan, static_cast<unsigned>(begin) + static_cast<unsigned>(thread / 32));
    wide.set(p.plan, static_cast<unsigned>(begin) + static_cast<unsigned>(thread / kChunks));
  }

  __device__ __forceinline__ void copy_step(T* wide_tile, T* thin_tile) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kDepth / kWarps; ++i) {
      const int row = thread / 32 + i * kWarps;
      const bool valid = has_quad && next + row < end;
      if (lane < kQuads)
        copy_async_8(thin_tile + chunk_at<kChunks>(row, lane / 2) * 8 + lane % 2 * kThinQuad,
                     p.cells + (valid ? thin.base(p.plan) + offset : 0), valid);
      thin.advance(p.plan, kWarps);
    }
    constexpr int kRowsAtOnce = kThreads / kChunks;
#pragma unroll
    for (int i = 0; i < kDepth / kRowsAtOnce; ++i) {
      const int row = thread / kChunks + i * kRowsAtOnce;
      const T* from =
          has_channel && next + row < end ? wide_pixel<T, kLinear>(p, wide, next + row) : nullptr;
      copy_async_16(wide_tile + chunk_at<kChunks>(row, thread % kChunks) * 8,
                    from != nullptr ? static_cast<const void*>(from + channel) : p.cells,
                    from != nullptr);
      if (!kLinear) wide.advance(p.plan, kRowsAtOnce);
    }
    next += kDepth;
  }
};

using Sums = float[kWarpRows][kWarpColumns][4];

// The slices of one step that belong to this warp's group.
template <class T>
__device__ __forceinline__ void multiply_step(const T* wide_tile, const T* thin_tile, Sums& sum) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = warp / (kWarps / kSlices),
            first_chunk = warp % (kWarps / kSlices) * kWarpRows * 2;
  const LaneAddress by_rows = rows_first(lane), by_chunks = chunks_first(lane);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16 * kSlices) {
    const int row = k + group * 16;
    std::uint32_t a[kWarpRows][4];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
      load_matrix_transposed(
          a[i],
          wide_tile +
              chunk_at<kChunks>(row + by_chunks.row, first_chunk + i * 2 + by_chunks.chunk) * 8);
#pragma unroll
    for (int j = 0; j < kWarpColumns; j += 2) {
      std::uint32_t b[4];
      load_matrix_transposed(
          b, thin_tile + chunk_at<kChunks>(row + by_rows.row, j + by_rows.chunk) * 8);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        multiply_accumulate<T>(sum[i][j], a[i], b[0], b[1]);
        multiply_accumulate<T>(sum[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Where a sum goes: [Cout][tap][Cin], or nowhere.
__device__ __forceinline__ void leave_sums(const ThinWeight& p, int first_channel, int first_quad,
                                           const Sums& sum) {
  const GemmShape& s = p.g.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int taps = s.taps();
  float* part = p.g.partial + static_cast<index_t>(blockIdx.y) * s.weights();
#pragma unroll
  for (int j = 0; j < kWarpColumns; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = j * 8 + lane % 4 * 2 + e % 2, quad = first_quad + column / kThinQuad;
      const int tap = quad / p.plan.cell_quads;
      const int thin = quad % p.plan.cell_quads * kThinQuad + column % kThinQuad;
      if (quad >= p.quads || thin >= p.plan.channels) continue;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const int wide = first_channel + (warp * kWarpRows + i) * 16 + e / 2 * 8 + lane / 4;
        if (wide >= p.wide_channels) continue;
        const index_t cout = p.plan.of_sources ? wide : thin;
        const index_t cin = p.plan.of_sources ? thin : wide;
        part[(cout * taps + tap) * s.in_channels + cin] = sum[i][j][e];
      }
    }
}

template <class T, bool kLinear>
__global__ void __launch_bounds__(kThreads) thin_weight_kernel(ThinWeight p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int first_quad = static_cast<int>(blockIdx.x) % p.quad_tiles * kQuads;
  const int first_channel = static_cast<int>(blockIdx.x) / p.quad_tiles * kWide;
  const index_t rows = p.plan.rows(), begin = blockIdx.y * p.g.split.pixels_per_part;
  const index_t end =
      begin + p.g.split.pixels_per_part < rows ? begin + p.g.split.pixels_per_part : rows;
  const int steps = static_cast<int>(ceil_div(end - begin, index_t{kDepth}));
  Loader<T, kLinear> loader(p, begin, end, first_quad, first_channel);
  unsigned char* stages = dynamic_shared();
  const auto tile = [&](int step, int which) {
    return reinterpret_cast<T*>(stages + step % kStages * kStageBytes + which * kTileBytes);
  };

  Sums sum = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) loader.copy_step(tile(step, 0), tile(step, 1));
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps)
      loader.copy_step(tile(step + kStages - 1, 0), tile(step + kStages - 1, 1));
    copy_async_commit();
    multiply_step(tile(step, 0), tile(step, 1), sum);
  }
  copy_async_wait<0>();
  __syncthreads();  // all have read the last tiles

  float* others = reinterpret_cast<float*>(stages) + thread % kGroupThreads;
  constexpr int kSums = kWarpRows * kWarpColumns * 4;
  if (thread >= kGroupThreads)
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      others[i * kGroupThreads] = sum[i / 4 / kWarpColumns][i / 4 % kWarpColumns][i % 4];
  __syncthreads();
  if (thread >= kGroupThreads) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    sum[i / 4 / kWarpColumns][i / 4 % kWarpColumns][i % 4] += others[i * kGroupThreads];
  leave_sums(p, first_channel, first_quad, sum);
}

template <class T, bool kLinear>
void launch_weight(const ThinWeight& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const unsigned tiles = static_cast<unsigned>(thin_weight_tiles(p.g.shape));
  launch(guard, ctx, thin_weight_kernel<T, kLinear>,
         dim3(tiles, static_cast<unsigned>(p.g.split.parts)), kThreads, kStages * kStageBytes, p);
}

}  // namespace

bool can_run_thin_weight(const GemmShape& s) {
  return has_thin_cells(s, true) || has_thin_cells(s, false);
}

index_t thin_weight_tiles(const GemmShape& s) {
  const bool of_sources = has_thin_cells(s, true);
  const int quads = s.taps() * thin_plan(s, of_sources).cell_quads;
  return index_t{ceil_div(quads, kQuads)} *
         ceil_div(of_sources ? s.out_channels : s.in_channels, kWide);
}

WeightSplit thin_weight_split(const GemmShape& s) {
  return weight_split(thin_plan(s, has_thin_cells(s, true)).rows(), thin_weight_tiles(s));
}

void thin_weight(const WeightProblem& g, void* cells, const DeviceGuard& guard,
                 const ExecContext& ctx) {
  const GemmShape& s = g.shape;
  const bool of_sources = has_thin_cells(s, true);
  const ThinPlan plan = thin_plan(s, of_sources);
  thin_expand(s, plan, of_sources ? g.x : g.dy, of_sources ? g.history : nullptr, cells, guard,
              ctx);
  const int quads = s.taps() * plan.cell_quads;
  const ThinWeight p{g,
                     plan,
                     static_cast<const uint2*>(cells),
                     of_sources ? g.dy : g.x,
                     of_sources ? s.out_channels : s.in_channels,
                     quads,
                     ceil_div(quads, kQuads)};
  const auto plain = [](const ThinAxis& axis, int source) {
    return axis.first == 0 && axis.rows == source;
  };
  const bool linear = of_sources || (s.history_frames == 0 && plain(plan.t, s.t.source) &&
                                     plain(plan.h, s.h.source) && plain(plan.w, s.w.source));
  with_half_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (linear) return launch_weight<T, true>(p, guard, ctx);
    launch_weight<T, false>(p, guard, ctx);
  });
}

}  // namespace magvit_fast::cuda
