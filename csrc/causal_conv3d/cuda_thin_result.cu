// causal_conv3d on tensor cores for few results: every source element is read once.
// Previous hop: cuda.cu (128 -> 3 forward).
// Next hop: cuda_thin.cuh.
//
// UNVERIFIED on a device: compiled, and run on the emulator of the tests.
//
// A block makes a box of outputs of one clip and walks through time. Of each source frame it
// multiplies the box and its halo (rows of the product: padded positions, so that a row's source is
// looked up once for all time) by the weights of all taps (columns: slot of time, plane tap,
// channel). A frame serves the outputs u = tau, tau - 1, tau - 2: their sums stay in registers, in
// three slots that take turns; the finished slot goes to shared memory as [position] [plane tap,
// channel], where each output adds up its plane taps.
//
// Source elements go from memory to the fragments of mma.sync: the order of the sum is free, so
// thread q of four takes 8 neighboring channels, 16 bytes, of a row for every 32; the next 32 come
// while these are multiplied. Weights lie in shared memory in the same order, 16 bytes a lane.
//
// Floor, 128 -> 3 channels, 17x128x128, batch 8, bfloat16: 570 MB read, 0.136 ms at 4.3 TB/s. L2
// gives 1.24 times that (the halo of 19 x 16). Products: 27 of 32 columns, 378 of 384 rows for 304
// outputs, 69 GFLOP: 0.11-0.14 ms at mma.sync's rate; shared memory 197 KB of weights and 76 KB of
// sums a frame of a box, 0.07 ms. Two barriers a frame keep these from overlapping whole: predicted
// 0.22-0.27 ms. The portable product before it: 128 rows x 32 columns of which 3 are used, every
// element gathered 27 times from L2, 15 GB or 2.7 ms at 5.5 TB/s.
// First step beyond: wgmma with the rows in registers (sm_90a).
// Registers (nvcc 13.0, sm_90a): 246 of 255, nothing spilled; three slots that move up instead of
// taking turns spill.
#include "causal_conv3d/cuda_thin.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kSlots = 3, kDepth = 32;

// Product tiles: columns of one slot, rows of a warp.
template <int kTiles>
struct Shape {
  static constexpr int row_tiles = kTiles <= 4 ? 3 : 1;
  static constexpr int warp_rows = row_tiles * 16, rows = kWarps * warp_rows;
  static constexpr int columns = kTiles * 8;
  // Of a position's sums: 8 more than a multiple of 16, so that the stores of four rows share no
  // bank.
  static constexpr int pitch = kTiles % 2 ? columns : columns + 8;
  static constexpr int depth_units = kSlots * kTiles * 32;  // uint4 of weights for 32 channels
  static constexpr int sum_bytes = rows * pitch * static_cast<int>(sizeof(float));
};

struct ThinResult {
  GatherProblem g;
  int box_h, box_w, halo_h, halo_w;
  int tiles_h, tiles_w, spans, span;  // pieces of time, outputs of one
  int depths;                         // of 32 channels
};

int columns_of(const GemmShape& s) { return s.h.kernel * s.w.kernel * s.out_channels; }
int row_capacity(const GemmShape& s) {
  return columns_of(s) <= Shape<4>::columns ? Shape<4>::rows : Shape<9>::rows;
}
int halo_of(const AxisMap32& a, int box) {
  return (box - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
}

// The box with the fewest rounds of the four schedulers over a frame, then with the smallest halo.
void choose_box(const GemmShape& s, ThinResult& p) {
  const int capacity = row_capacity(s), round = capacity / kWarps * 4;
  index_t least = -1;
  int least_halo = 0;
  for (int w = 1; w <= 64 && halo_of(s.w, w) <= capacity; w *= 2)
    for (int h = 1; h <= 64 && index_t{halo_of(s.h, h)} * halo_of(s.w, w) <= capacity; ++h) {
      const int halo = halo_of(s.h, h) * halo_of(s.w, w);
      const index_t tiles = index_t{ceil_div(s.h.out, h)} * ceil_div(s.w.out, w);
      const index_t cost = tiles * ceil_div(halo, round);
      if (least >= 0 && (cost > least || (cost == least && halo >= least_halo))) continue;
      least = cost, least_halo = halo;
      p.box_h = h, p.box_w = w;
      p.halo_h = halo_of(s.h, h), p.halo_w = halo_of(s.w, w);
      p.tiles_h = ceil_div(s.h.out, h), p.tiles_w = ceil_div(s.w.out, w);
    }
}

// Time in pieces where clips are few; a piece reads kernel - 1 frames of its neighbor's.
void choose_spans(const GemmShape& s, ThinResult& p) {
  constexpr index_t kBlocks = 528;
  constexpr int kLeastSpan = 4;
  const index_t blocks = index_t{s.batch} * p.tiles_h * p.tiles_w;
  index_t spans = ceil_div(kBlocks, blocks);
  if (spans > ceil_div(s.t.out, kLeastSpan)) spans = ceil_div(s.t.out, kLeastSpan);
  p.span = ceil_div(s.t.out, static_cast<int>(spans));
  p.spans = ceil_div(s.t.out, p.span);
}

std::size_t shared_bytes(const GemmShape& s) {
  const auto depths = static_cast<std::size_t>(ceil_div(s.in_channels, kDepth));
  if (columns_of(s) <= Shape<4>::columns)
    return depths * Shape<4>::depth_units * sizeof(uint4) + Shape<4>::sum_bytes;
  return depths * Shape<9>::depth_units * sizeof(uint4) + Shape<9>::sum_bytes;
}

// Weights [32 channels][slot][column tile][lane]: 8 channels of the column lane / 4.
template <class T, int kTiles>
__device__ __forceinline__ void keep_weights(const ThinResult& p, uint4* kept) {
  const GemmShape& s = p.g.shape;
  const int plane = s.h.kernel * s.w.kernel, units = p.depths * Shape<kTiles>::depth_units;
  const T* weight = static_cast<const T*>(p.g.weight);  // [Cout][tap][Cin]
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += kThreads) {
    const int lane = unit % 32, tile = unit / 32 % kTiles, slot = unit / 32 / kTiles % kSlots;
    const int channel = unit / Shape<kTiles>::depth_units * kDepth + lane % 4 * 8;
    const int column = tile * 8 + lane / 4, kt = slot - (kSlots - s.t.kernel);
    const int cout = column % s.out_channels, tap = column / s.out_channels;
    uint4 bits{0, 0, 0, 0};
    if (kt >= 0 && tap < plane && channel < s.in_channels)
      bits = *reinterpret_cast<const uint4*>(
          weight + (static_cast<index_t>(cout) * s.taps() + kt * plane + tap) * s.in_channels +
          channel);
    kept[unit] = bits;
  }
}

// The steps of a block: for every moment tau of padded time that a wanted output reads, and 32
// channels after 32.
template <class T>
struct TimeWalk {
  const ThinResult& p;
  int n, first, last;  // outputs of the block, counted in unit strides
  int tau, depth;
  const T* frame;  // null: reads nothing

  __device__ __forceinline__ TimeWalk(const ThinResult& problem, int clip, int span)
      : p(problem), n(clip) {
    const AxisMap32& t = p.g.shape.t;
    const int past = (span + 1) * p.span < t.out ? (span + 1) * p.span : t.out;
    first = span * p.span * t.stride, last = (past - 1) * t.stride;
    tau = first - 1, depth = 0;
    next_frame();
  }
  // Whether tap kt at the present moment serves an output of the block.
  __device__ __forceinline__ bool wants(int kt) const {
    const int u = tau - kt;
    return u >= first && u <= last && u % p.g.shape.t.stride == 0;
  }
  __device__ __forceinline__ bool done() const { return tau > last + p.g.shape.t.kernel - 1; }
  __device__ __forceinline__ void next_frame() {
    ++tau;
    const GemmShape& s = p.g.shape;
    frame = nullptr;
    const int t = done() ? -1 : source_at(s.t, tau - s.t.front);
    if (t < 0) return;
    const Gathered from = source_pixel(s, n, t, 0, 0);
    frame = static_cast<const T*>(from.in_history ? p.g.left_history : p.g.left) +
            from.pixel * s.in_channels;
  }
  __device__ __forceinline__ void next_depth() {
    if (++depth < p.depths) return;
    depth = 0;
    next_frame();
  }
};

// Eight channels of each of a thread's rows; zeros for rows and channels that are none.
template <class T, int kRows>
__device__ __forceinline__ void load_rows(const TimeWalk<T>& at, const int (&place)[kRows],
                                          uint4 (&rows)[kRows]) {
  const int channels = at.p.g.shape.in_channels;
  const int channel = at.depth * kDepth + static_cast<int>(threadIdx.x) % 4 * 8;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    rows[i] = {0, 0, 0, 0};
    if (at.frame != nullptr && place[i] >= 0 && channel < channels)
      rows[i] = __ldg(reinterpret_cast<const uint4*>(
          at.frame + static_cast<index_t>(place[i]) * channels + channel));
  }
}

template <int kTiles>
using SlotSums = float[Shape<kTiles>::row_tiles][kTiles][4];

template <class T, int kTiles>
__device__ __forceinline__ void multiply_slot(const uint4 (&rows)[Shape<kTiles>::row_tiles * 2],
                                              const uint4* weights, SlotSums<kTiles>& sum) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const uint4 b = weights[j * 32];
#pragma unroll
    for (int i = 0; i < Shape<kTiles>::row_tiles; ++i) {
      const uint4 low = rows[2 * i], high = rows[2 * i + 1];
      const std::uint32_t first[4] = {low.x, high.x, low.y, high.y};
      const std::uint32_t second[4] = {low.z, high.z, low.w, high.w};
      multiply_accumulate<T>(sum[i][j], first, b.x, b.y);
      multiply_accumulate<T>(sum[i][j], second, b.z, b.w);
    }
  }
}

// The finished sums of a warp's positions.
template <int kTiles>
__device__ __forceinline__ void keep_sums(const SlotSums<kTiles>& sum, float* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp * Shape<kTiles>::warp_rows + lane / 4;
#pragma unroll
  for (int i = 0; i < Shape<kTiles>::row_tiles; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(sums + (row + i * 16 + half * 8) * Shape<kTiles>::pitch + j * 8 +
                                   lane % 4 * 2) =
            make_float2(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
}

// Every output of the box adds up its plane taps.
template <class T>
__device__ __forceinline__ void leave_box(const ThinResult& p, const float* sums, int pitch, int n,
                                          int t, int first_h, int first_w) {
  const GemmShape& s = p.g.shape;
  const int channels = s.out_channels, all = p.box_h * p.box_w * channels;
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x); unit < all; unit += kThreads) {
    const int cout = unit % channels, pixel = unit / channels;
    const int h = pixel / p.box_w, w = pixel % p.box_w;
    if (first_h + h >= s.h.out || first_w + w >= s.w.out) continue;
    const index_t at = output_pixel(s, n, t, first_h + h, first_w + w) * channels + cout;
    float value = 0.0f;
#pragma unroll 1
    for (int kh = 0; kh < s.h.kernel; ++kh)
#pragma unroll 1
      for (int kw = 0; kw < s.w.kernel; ++kw) {
        const int position =
            (h * s.h.stride + kh * s.h.dilation) * p.halo_w + w * s.w.stride + kw * s.w.dilation;
        value += sums[position * pitch + (kh * s.w.kernel + kw) * channels + cout];
      }
    if (p.g.bias != nullptr) value += static_cast<float>(static_cast<const T*>(p.g.bias)[cout]);
    if (p.g.residual != nullptr)
      value += static_cast<float>(static_cast<const T*>(p.g.residual)[at]);
    static_cast<T*>(p.g.out)[at] = static_cast<T>(value);
  }
}

// What a block keeps from frame to frame.
template <class T, int kTiles>
struct Walker {
  static constexpr int kRows = Shape<kTiles>::row_tiles * 2;  // of a thread

  const ThinResult& p;
  TimeWalk<T> ahead;  // the step whose rows are under way in `next`
  int first_h, first_w;
  int place[kRows];  // pixel of the frame, or -1
  bool has_rows;
  uint4 next[kRows];
  SlotSums<kTiles> sum[kSlots];  // in turn of all slots

  __device__ __forceinline__ Walker(const ThinResult& problem, int clip, int span, int tile_h,
                                    int tile_w)
      : p(problem),
        ahead(problem, clip, span),
        first_h(tile_h * problem.box_h),
        first_w(tile_w * problem.box_w),
        next{},
        sum{} {
    const GemmShape& s = p.g.shape;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = warp * Shape<kTiles>::warp_rows + i * 8 + lane / 4;
      const int h = source_at(s.h, first_h * s.h.stride + row / p.halo_w - s.h.front);
      const int w = source_at(s.w, first_w * s.w.stride + row % p.halo_w - s.w.front);
      place[i] = row < p.halo_h * p.halo_w && h >= 0 && w >= 0 ? h * s.w.source + w : -1;
    }
    has_rows = warp * Shape<kTiles>::warp_rows < p.halo_h * p.halo_w;
    load_rows<T, kRows>(ahead, place, next);
  }

  // One moment of padded time. The sums of slot i are sum[(kPhase - i) mod kSlots]: the last slot
  // is finished here, and is the first slot of the next moment, whose phase is one higher.
  template <int kPhase>
  __device__ __forceinline__ void frame(const uint4* weights, float* sums) {
    const int lane = static_cast<int>(threadIdx.x) % 32, first_slot = kSlots - p.g.shape.t.kernel;
    const TimeWalk<T> at = ahead;
    for (int depth = 0; depth < p.depths; ++depth) {
      uint4 now[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) now[i] = next[i];
      ahead.next_depth();
      if (has_rows) load_rows<T, kRows>(ahead, place, next);
      const uint4* here = weights + depth * Shape<kTiles>::depth_units + lane;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        if (slot >= first_slot && has_rows && at.frame != nullptr && at.wants(slot - first_slot))
          multiply_slot<T, kTiles>(now, here + slot * kTiles * 32,
                                   sum[(kPhase + kSlots - slot) % kSlots]);
    }
    SlotSums<kTiles>& finished = sum[(kPhase + 1) % kSlots];
    const int kt = p.g.shape.t.kernel - 1;
    if (at.wants(kt)) {
      __syncthreads();  // the sums of the frame before have been read
      keep_sums<kTiles>(finished, sums);
      __syncthreads();
      leave_box<T>(p, sums, Shape<kTiles>::pitch, at.n, (at.tau - kt) / p.g.shape.t.stride, first_h,
                   first_w);
    }
#pragma unroll
    for (int i = 0; i < Shape<kTiles>::row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) finished[i][j][e] = 0.0f;
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) thin_result_kernel(ThinResult p) {
  uint4* weights = reinterpret_cast<uint4*>(dynamic_shared());
  float* sums = reinterpret_cast<float*>(weights + p.depths * Shape<kTiles>::depth_units);
  keep_weights<T, kTiles>(p, weights);
  // Tiles of a frame fastest: neighbors share their halos while L2 holds them.
  const int block = static_cast<int>(blockIdx.x), tiles = p.tiles_h * p.tiles_w;
  Walker<T, kTiles> walker(p, block / tiles / p.spans, block / tiles % p.spans,
                           block % tiles / p.tiles_w, block % p.tiles_w);
  __syncthreads();
  static_assert(kSlots == 3);
  while (!walker.ahead.done()) {
    walker.template frame<0>(weights, sums);
    if (walker.ahead.done()) break;
    walker.template frame<1>(weights, sums);
    if (walker.ahead.done()) break;
    walker.template frame<2>(weights, sums);
  }
}

template <class T, int kTiles>
void launch_result(const ThinResult& p, const DeviceGuard& guard, const ExecContext& ctx) {
  const index_t blocks = index_t{p.g.shape.batch} * p.spans * p.tiles_h * p.tiles_w;
  launch(guard, ctx, thin_result_kernel<T, kTiles>,
         dim3(grid_blocks(blocks, "causal_conv3d: more than 2^31 - 1 tiles")), kThreads,
         shared_bytes(p.g.shape), p);
}

}  // namespace

bool can_run_thin_result(const GemmShape& s, const ExecContext& ctx) {
  return thin_sizes(s, false) && s.t.kernel <= kSlots && (s.t.dilation == 1 || s.t.kernel == 1) &&
         columns_of(s) <= Shape<9>::columns &&
         index_t{halo_of(s.h, 1)} * halo_of(s.w, 1) <= row_capacity(s) &&
         shared_bytes(s) <= shared_limit(ctx, "causal_conv3d");
}

void thin_result(const GatherProblem& g, const DeviceGuard& guard, const ExecContext& ctx) {
  const GemmShape& s = g.shape;
  ThinResult p{};
  p.g = g;
  choose_box(s, p);
  choose_spans(s, p);
  p.depths = ceil_div(s.in_channels, kDepth);
  with_half_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    if (columns_of(s) <= Shape<4>::columns) return launch_result<T, 4>(p, guard, ctx);
    launch_result<T, 9>(p, guard, ctx);
  });
}

}  // namespace magvit_fast::cuda
