// causal_conv3d on tensor cores for few channels to sum over: all taps of a pixel are one sum.
// Previous hop: cuda.cu (3 -> 128 forward, the input gradient of 128 -> 3).
// Next hop: cuda_thin.cuh and thin_plan.h.
//
// UNVERIFIED on a device: compiled, and run on the emulator of the tests.
//
// First the thin tensor is written out with its padding (expand_kernel, 4 channels a quad), so that
// a tap is an offset and no row needs a map. Then the sum of a pixel runs over its quads: 27 taps
// of one quad are 7 slices of 16. Weights are the left operand of mma.sync, pixels the right one:
// in a slice, thread t of a warp holds quad t % 4 of pixel t / 4, which is exactly one load of 8
// bytes from the first-level cache into the register pair that the product wants. Weights lie in
// shared memory as fragments, made once by a block that then takes many tiles. Their rows are
// permuted so that a thread ends with 8 neighboring channels: every store is 16 bytes, eight lanes
// fill 128.
//
// The input gradient adds passes for the copies of a pixel in replicated or reflected padding, only
// in warps that have such a pixel.
//
// Floor, 3 -> 128 channels, 17x128x128, batch 8, bfloat16: 570 MB written, 13 read: 0.136 ms at 4.3
// TB/s. The cells add 20 MB written and 20 read (L2), 9 us with the launch. Products: 64 GFLOP (112
// of 81 terms), 0.11 ms at mma.sync's 600 TFLOP/s. Instructions, counted in the machine code: 70 a
// slice (16 of them products), about 1,000 a warp for 32 pixels x 64 channels, 0.15 ms. All three
// overlap: predicted 0.20-0.24 ms. The FMA kernel before it: 62 GFLOP at about 50 TFLOP/s, 1.2 ms.
//
// Ladder: pixels as the left operand (112 instructions a slice: four registers of a fragment are of
// two pixels, which costs moves); pixels as the right one, two slices in turn (70).
// Registers (nvcc 13.0, sm_90a): 119 forward, 126 input gradient, nothing spilled; two blocks a
// multiprocessor.
#include "causal_conv3d/cuda_thin.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostSlices = 22;  // 88 KB of weights
constexpr int kWarpRows = 32, kPixelTiles = kWarpRows / 8;
constexpr int kWarpColumns = 64, kChannelTiles = kWarpColumns / 16;
constexpr unsigned kAllLanes = 0xffffffffu;

// One thread a quad.
template <class T>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(GemmShape s, ThinPlan plan, const T* thin, const T* history, T* cells) {
  const index_t total = plan.quads(), step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const auto quad = static_cast<unsigned>(i);
    const auto across = static_cast<unsigned>(plan.w.cells),
               down = static_cast<unsigned>(plan.h.cells),
               deep = static_cast<unsigned>(plan.t.cells);
    const unsigned cell = quad / static_cast<unsigned>(plan.cell_quads);
    const unsigned row = cell / across, frame = row / down;
    const int w = thin_content(s.w, plan.w, plan.of_sources, static_cast<int>(cell % across));
    const int h = thin_content(s.h, plan.h, plan.of_sources, static_cast<int>(row % down));
    const int t = thin_content(s.t, plan.t, plan.of_sources, static_cast<int>(frame % deep));
    const int n = static_cast<int>(frame / deep);
    const int channel = static_cast<int>(quad % static_cast<unsigned>(plan.cell_quads)) * kThinQuad;
    Gathered from{-1, false};
    if (t >= 0 && h >= 0 && w >= 0)
      from = plan.of_sources ? source_pixel(s, n, t, h, w)
                             : Gathered{output_pixel(s, n, t, h, w), false};
    const T* pixel = (from.in_history ? history : thin) + from.pixel * plan.channels;
    float value[kThinQuad] = {};
    for (int c = 0; c < kThinQuad; ++c)
      if (from.pixel >= 0 && channel + c < plan.channels)
        value[c] = static_cast<float>(pixel[channel + c]);
    uint2 bits;
    bits.x = pack_pair<T>(value[0], value[1]);
    bits.y = pack_pair<T>(value[2], value[3]);
    reinterpret_cast<uint2*>(cells)[i] = bits;
  }
}

struct ThinSum {
  GatherProblem g;
  ThinPlan plan;
  const uint2* cells;
  int quads, slices;  // of a row: taps * cell_quads, in fours
  int row_tiles;
};

// What a block keeps: weights [slice][16 channels][lane], then offsets and the bias.
template <int kColumns>
struct Kept {
  static constexpr int slice = kColumns / 16 * 32;  // uint4 of a slice
  static std::size_t bytes(int slices) {
    return static_cast<std::size_t>(slices) * (slice * sizeof(uint4) + 4 * sizeof(int)) +
           kColumns * sizeof(float);
  }
};

// A thread of a warp holds rows r = lane / 4 and r + 8 of every product tile: of the four tiles of
// 64 channels, these are to be the channels 8 r .. 8 r + 7.
__device__ __forceinline__ int channel_of(int tile, int r, int half) {
  return tile / 4 * 64 + r * 8 + tile % 4 * 2 + half;
}

template <class T, bool kForward, int kColumns>
__device__ __forceinline__ void keep_weights(const ThinSum& p, int first_column, uint4* kept) {
  const GemmShape& s = p.g.shape;
  const int taps = s.taps(), in = s.in_channels;
  const int produce = kForward ? s.out_channels : in;
  const T* weight = static_cast<const T*>(p.g.weight);  // [Cout][tap][Cin]
  constexpr int kTiles = kColumns / 16;
  for (int unit = static_cast<int>(threadIdx.x); unit < p.slices * kTiles * 32; unit += kThreads) {
    const int lane = unit % 32, tile = unit / 32 % kTiles, slice = unit / 32 / kTiles;
    const int quad = slice * 4 + lane % 4;
    const int tap = quad / p.plan.cell_quads;
    float value[2][kThinQuad] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kThinQuad; ++i) {
        const int column = first_column + channel_of(tile, lane / 4, half);
        const int thin = quad % p.plan.cell_quads * kThinQuad + i;
        if (quad >= p.quads || thin >= p.plan.channels || column >= produce) continue;
        const index_t cout = kForward ? column : thin, cin = kForward ? thin : column;
        value[half][i] = static_cast<float>(weight[(cout * taps + tap) * in + cin]);
      }
    kept[unit] =
        make_uint4(pack_pair<T>(value[0][0], value[0][1]), pack_pair<T>(value[1][0], value[1][1]),
                   pack_pair<T>(value[0][2], value[0][3]), pack_pair<T>(value[1][2], value[1][3]));
  }
}

// A lane's row of its warp: where it reads and where it leaves (null: nowhere).
template <class T>
struct ThinRow {
  int n, t, h, w;
  T* result;
};
template <class T, bool kForward>
__device__ __forceinline__ ThinRow<T> thin_row(const ThinSum& p, unsigned row) {
  const GemmShape& s = p.g.shape;
  const auto width = static_cast<unsigned>(kForward ? s.w.out : s.w.source);
  const auto height = static_cast<unsigned>(kForward ? s.h.out : s.h.source);
  const auto frames = static_cast<unsigned>(kForward ? s.t.out : s.t.source);
  const unsigned line = row / width, frame = line / height;
  ThinRow<T> at{static_cast<int>(frame / frames), static_cast<int>(frame % frames),
                static_cast<int>(line % height), static_cast<int>(row % width), nullptr};
  if (at.n >= s.batch) {  // past the end: some row that exists, read in vain
    at = {0, 0, 0, 0, nullptr};
  } else if (kForward) {
    at.result = static_cast<T*>(p.g.out) + static_cast<index_t>(row) * s.out_channels;
  } else {
    const Gathered to = source_pixel(s, at.n, at.t, at.h, at.w);
    T* base = static_cast<T*>(to.in_history ? p.g.out_history : p.g.out);
    if (base != nullptr) at.result = base + to.pixel * s.in_channels;
  }
  return at;
}

// Sums of a warp: 64 channels x 32 pixels.
using Sums = float[kChannelTiles][kPixelTiles][4];

// Adds the weights of 64 channels times the pixels whose bases the lanes hold (negative: none).
template <class T, int kColumns>
__device__ __forceinline__ void add_pixels(const ThinSum& p, int lane_base, const uint4* weights,
                                           const int* offsets, Sums& sum) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int base[kPixelTiles];
#pragma unroll
  for (int i = 0; i < kPixelTiles; ++i)
    base[i] = __shfl_sync(kAllLanes, lane_base, i * 8 + lane / 4);
  const auto load = [&](int slice, uint2(&pixels)[kPixelTiles]) {
    const int quad = slice * 4 + lane % 4;
    const int offset = offsets[quad];
#pragma unroll
    for (int i = 0; i < kPixelTiles; ++i) {
      pixels[i] = {0, 0};
      if (quad < p.quads && base[i] >= 0) pixels[i] = __ldg(p.cells + base[i] + offset);
    }
  };
  const auto multiply = [&](int slice, const uint2(&pixels)[kPixelTiles]) {
    const uint4* fragments = weights + slice * Kept<kColumns>::slice + lane;
#pragma unroll
    for (int tile = 0; tile < kChannelTiles; ++tile) {
      const uint4 bits = fragments[tile * 32];
      const std::uint32_t a[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i)
        multiply_accumulate<T>(sum[tile][i], a, pixels[i].x, pixels[i].y);
    }
  };
  uint2 even[kPixelTiles], odd[kPixelTiles];  // slices in turn: one comes, one is multiplied
  load(0, even);
#pragma unroll 1
  for (int slice = 0; slice < p.slices; slice += 2) {
    if (slice + 1 < p.slices) load(slice + 1, odd);
    multiply(slice, even);
    if (slice + 1 >= p.slices) break;
    if (slice + 2 < p.slices) load(slice + 2, even);
    multiply(slice + 1, odd);
  }
}

// The sums of a warp to memory: a thread has 8 channels of pixels 2 (lane % 4) and + 1 of each
// tile.
template <class T, bool kForward>
__device__ __forceinline__ void leave_pixels(const ThinSum& p, const ThinRow<T>& at,
                                             int first_column, const float* bias, const Sums& sum) {
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane / 4 * 8;
  const int produce = kForward ? p.g.shape.out_channels : p.g.shape.in_channels;
#pragma unroll
  for (int i = 0; i < kPixelTiles; ++i)
#pragma unroll
    for (int one = 0; one < 2; ++one) {
      auto address = reinterpret_cast<std::uintptr_t>(at.result);
      address = __shfl_sync(kAllLanes, address, i * 8 + lane % 4 * 2 + one);
      T* result = reinterpret_cast<T*>(address);
      if (result == nullptr || first_column + column >= produce) continue;
      float value[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) value[k] = sum[k / 2][i][k % 2 * 2 + one];
      T* to = result + first_column + column;
      if (kForward) {
#pragma unroll
        for (int k = 0; k < 8; ++k) value[k] += bias[column + k];
        if (p.g.residual != nullptr)
          add_eight(value,
                    static_cast<const T*>(p.g.residual) + (to - static_cast<const T*>(p.g.out)));
      }
      *reinterpret_cast<uint4*>(to) = pack_eight<T>(value);
    }
}

template <class T, bool kForward, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) thin_sum_kernel(ThinSum p) {
  constexpr int kAcross = kColumns / kWarpColumns, kRows = kWarps / kAcross * kWarpRows;
  const GemmShape& s = p.g.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const int produce = kForward ? s.out_channels : s.in_channels;
  uint4* weights = reinterpret_cast<uint4*>(dynamic_shared());
  int* offsets = reinterpret_cast<int*>(weights + p.slices * Kept<kColumns>::slice);
  float* bias = reinterpret_cast<float*>(offsets + p.slices * 4);
  keep_weights<T, kForward, kColumns>(p, first_column, weights);
  note_offsets(s, p.plan, offsets, p.slices * 4);
  for (int i = thread; i < kColumns; i += kThreads)
    bias[i] = kForward && p.g.bias != nullptr && first_column + i < produce
                  ? static_cast<float>(static_cast<const T*>(p.g.bias)[first_column + i])
                  : 0.0f;
  __syncthreads();

  const int warp_row = warp / kAcross * kWarpRows, warp_column = warp % kAcross * kWarpColumns;
  const uint4* own = weights + warp_column / 16 * 32;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.row_tiles;
       tile += static_cast<int>(gridDim.x)) {
    const ThinRow<T> at =
        thin_row<T, kForward>(p, static_cast<unsigned>(tile) * kRows + warp_row + lane);
    Sums sum = {};
    if (kForward) {
      add_pixels<T, kColumns>(p, p.plan.base(at.n, at.t, at.h, at.w), own, offsets, sum);
    } else {
      const int copies_t = copies(s.t, at.t), copies_h = copies(s.h, at.h),
                copies_w = copies(s.w, at.w);
      for (int jt = 0; __any_sync(kAllLanes, jt < copies_t); ++jt)
        for (int jh = 0; __any_sync(kAllLanes, jh < copies_h); ++jh)
          for (int jw = 0; __any_sync(kAllLanes, jw < copies_w); ++jw) {
            const bool here = jt < copies_t && jh < copies_h && jw < copies_w;
            if (!__any_sync(kAllLanes, here)) continue;
            const int base =
                here ? p.plan.base(at.n, copy_position(s.t, at.t, jt), copy_position(s.h, at.h, jh),
                                   copy_position(s.w, at.w, jw))
                     : -1;
            add_pixels<T, kColumns>(p, base, own, offsets, sum);
          }
    }
    leave_pixels<T, kForward>(p, at, first_column + warp_column, bias + warp_column, sum);
  }
}

template <class T, bool kForward, int kColumns>
void launch_sum(ThinSum p, const DeviceGuard& guard, const ExecContext& ctx) {
  constexpr int kRows = kWarps / (kColumns / kWarpColumns) * kWarpRows;
  const GemmShape& s = p.g.shape;
  const int column_tiles = ceil_div(kForward ? s.out_channels : s.in_channels, kColumns);
  const index_t rows =
      kForward ? gemm_rows<true>(s) : index_t{s.batch} * s.t.source * s.h.source * s.w.source;
  p.row_tiles = static_cast<int>(ceil_div(rows, index_t{kRows}));
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device),
             guard.op());
  const int wanted = ceil_div(2 * multiprocessors, column_tiles);
  const int blocks = p.row_tiles < wanted ? p.row_tiles : wanted;
  launch(guard, ctx, thin_sum_kernel<T, kForward, kColumns>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(column_tiles)), kThreads,
         Kept<kColumns>::bytes(p.slices), p);
}

template <bool kForward>
void launch_thin(const GatherProblem& g, void* cells, const DeviceGuard& guard,
                 const ExecContext& ctx) {
  const GemmShape& s = g.shape;
  const ThinPlan plan = thin_plan(s, kForward);
  thin_expand(s, plan, g.left, g.left_history, cells, guard, ctx);
  const int quads = s.taps() * plan.cell_quads;
  const ThinSum p{g, plan, static_cast<const uint2*>(cells), quads, ceil_div(quads, 4), 0};
  with_half_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if ((kForward ? s.out_channels : s.in_channels) <= 64)
      return launch_sum<T, kForward, 64>(p, guard, ctx);
    launch_sum<T, kForward, 128>(p, guard, ctx);
  });
}

}  // namespace

bool can_run_thin_sum(const GemmShape& s, bool forward) {
  const index_t quads = index_t{s.taps()} * thin_plan(s, forward).cell_quads;
  return has_thin_cells(s, forward) && quads <= 4 * kMostSlices &&
         (forward ? s.out_channels : s.in_channels) <= 65535 * 64;
}

void thin_expand(const GemmShape& s, const ThinPlan& plan, const void* thin, const void* history,
                 void* cells, const DeviceGuard& guard, const ExecContext& ctx) {
  with_half_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, expand_kernel<T>, dim3(blocks_for(plan.quads(), kThreads)), kThreads, 0, s,
           plan, static_cast<const T*>(thin), static_cast<const T*>(history),
           static_cast<T*>(cells));
  });
}

void thin_sum(const GatherProblem& g, bool forward, void* cells, const DeviceGuard& guard,
              const ExecContext& ctx) {
  if (forward) return launch_thin<true>(g, cells, guard, ctx);
  launch_thin<false>(g, cells, guard, ctx);
}

}  // namespace magvit_fast::cuda
