// causal_conv3d for Hopper (sm_90a): forward and input gradient as one product of boxes.
// Previous hop: cuda.cu. Next hop: sm90_plan.h (which boxes), common/cuda/hopper.cuh (PTX).
//
// UNVERIFIED: compiled, run on the emulator of the tests, never on a device. Off unless asked for
// (_native.sm90a_kernels).
//
// Persistent blocks of three warpgroups, one block a multiprocessor. One thread of the first asks
// the copy engine for boxes: 128 x 64 weights and kPixels x 64 source elements a step, into a ring
// of stages, as far ahead as the ring is deep. The other two multiply: each owns 64 target channels
// x kPixels pixels in registers (channels on the rows of wgmma: 20 KB of shared memory read a
// 16-deep slice of 128 x 256, where pixels on the rows would read 24). They leave through shared
// memory in pieces of 64 pixels; the copy engine writes them while the next tile is multiplied, and
// clips what lies outside.
//
// Steps follow sm90_walk: (frame, plane tap, 64 channels). A residual comes as two more steps, one
// a warpgroup: what it is to add, where the pixels of a step stand. A stage is free again when all
// eight multiplying warps have seen the products that read it end.
//
// The result may leave as depth to space: 64 channels are of one part of a cell, so the copy engine
// writes them to a strided view of the result, as it does the classes of the input gradient. And
// it may leave its moments by channel for the group norm that follows: of the sums as rounded,
// while they are in registers (about 500 instructions a thread and tile, 2 % of 54 steps); two
// passes over them, so that a mean far from zero costs no digits.
//
// Floor: 2 x pixels x channels x channels x taps that read something, at 790 TFLOP/s measured by a
// matrix product. L2 gives 48 KB a step of 4.2 MFLOP (9 TB/s at that rate: the first suspect).
#include "causal_conv3d/cuda_kernels.h"
#include "causal_conv3d/sm90_schedule.h"
#include "causal_conv3d/sm90_view.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/hopper.cuh"
#include "common/cuda/moments.cuh"
#include "common/cuda/swizzle.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kGroup = 128, kGroups = 2, kThreads = kGroup * (1 + kGroups), kWarps = 4 * kGroups;
constexpr int kGroupChannels = kSm90Channels / kGroups;
static_assert(kGroupChannels == 64 && kSm90Depth * 2 == kSwizzleRowBytes, "rows of 128 bytes");
constexpr int kPiece = 64;                                      // pixels that leave at once
constexpr int kPieceBytes = kPiece * kSwizzleRowBytes;          // of one warpgroup
constexpr int kWeightBytes = kSm90Channels * kSwizzleRowBytes;  // of one stage

template <int kPixels>
struct Shared {
  static constexpr int stage_bytes = kWeightBytes + kPixels * kSwizzleRowBytes;
  static constexpr int stages = kPixels == 256 ? 4 : 6;
  static constexpr int pieces = stages * stage_bytes;  // two of each warpgroup
  static constexpr int full = pieces + kGroups * 2 * kPieceBytes, empty = full + stages * 8;
  static constexpr int bytes = empty + stages * 8 + kSwizzleAtomBytes;  // last: for alignment
};

struct Sm90Problem {
  TensorMap weight;
  TensorMap source[2 * kSm90Views];  // views of x (dy), then of the history
  // Classes of y (dx), then of the history; or the parts of depth to space.
  TensorMap target[2 * kSm90Classes];
  TensorMap residual;           // like y
  bool adds;                    // whether there is a residual
  int part_channels;            // of the target that one map holds
  bool late[2 * kSm90Classes];  // parts whose frame 0 is dropped: the map begins at frame 1
  Moments* moments;             // or null
  Sm90Plan plan;
  const void* bias;
};

// A block's tiles, in its order.
template <class Visit>
__device__ __forceinline__ void for_each_tile(const Sm90Plan& plan, const Visit& visit) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  for (int wave = 0; wave * blocks < plan.tiles; ++wave) {
    const int index = sm90_tile_of_block(wave, block, blocks);
    if (index < plan.tiles) visit(sm90_tile(plan, index));
  }
}

// One thread.
template <int kPixels>
__device__ __forceinline__ void produce(const Sm90Problem& p, std::uint32_t base) {
  using Layout = Shared<kPixels>;
  prefetch_map(&p.weight);
  prefetch_map(&p.source[0]);
  Sm90Ring<Layout::stages> ring;
  for_each_tile(p.plan, [&](const Sm90Tile& tile) {
    sm90_walk(p.plan, tile, [&](const Sm90Step& step) {
      const std::uint32_t full = base + Layout::full + ring.stage * 8;
      const std::uint32_t stage = base + ring.stage * Layout::stage_bytes;
      barrier_wait(base + Layout::empty + ring.stage * 8, ring.phase ^ 1);
      barrier_arrive_expecting(full, Layout::stage_bytes);
      copy_box_in(stage, &p.weight, full, step.c, tile.c, step.tap, 0, 0);
      copy_box_in(stage + kWeightBytes, &p.source[step.view], full, step.c, step.w, step.h, step.t,
                  step.n);
      ring.advance();
    });
    for (int group = 0; p.adds && group < kGroups; ++group) {
      const std::uint32_t full = base + Layout::full + ring.stage * 8;
      barrier_wait(base + Layout::empty + ring.stage * 8, ring.phase ^ 1);
      barrier_arrive_expecting(full, kPixels * kSwizzleRowBytes);
      copy_box_in(base + ring.stage * Layout::stage_bytes + kWeightBytes, &p.residual, full,
                  tile.c + group * kGroupChannels, tile.w, tile.h, tile.t, tile.n);
      ring.advance();
    }
  });
}

// What a thread adds to its sums: the bias of its two rows, and the residual [pixel][channel] in
// shared memory (0: none).
struct Added {
  float bias_low, bias_high;
  std::uint32_t residual;
};

// Sums of 64 channels x 64 pixels (from kFirst on) to a piece in shared memory: [pixel][channel],
// swizzled. For moments the sums become what is stored.
template <class T, bool kMoments, int kFirst, int kSums>
__device__ __forceinline__ void keep_piece(float (&sum)[kSums], const Added& added,
                                           std::uint32_t piece) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  const int chunk = warp * 2 + lane / 8 % 2;  // of 8 channels
  const int row = lane / 16 * 8 + lane % 8;   // pixel
#pragma unroll
  for (int pair = 0; pair < kPiece / 16; ++pair) {
    const std::uint32_t place =
        swizzle_128(static_cast<std::uint32_t>((pair * 16 + row) * kSwizzleRowBytes + chunk * 16));
    std::uint32_t fragment[4] = {};
    if (added.residual != 0)
      load_matrix_transposed(fragment, added.residual + kFirst * kSwizzleRowBytes + place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 channels x 8 pixels each: low, high, and 8 pixels on
      const int at = (kFirst + pair * 16) / 2 + i / 2 * 4 + i % 2 * 2;
      const float bias = i % 2 ? added.bias_high : added.bias_low;
      const float2 residual = unpack_pair<T>(fragment[i]);
      fragment[i] = pack_pair<T>(sum[at] + bias + residual.x, sum[at + 1] + bias + residual.y);
      if constexpr (kMoments) {
        const float2 stored = unpack_pair<T>(fragment[i]);
        sum[at] = stored.x, sum[at + 1] = stored.y;
      }
    }
    store_matrix_transposed(piece + place, fragment);
  }
}

template <class T, int kPixels, bool kMoments, int kIndex>
__device__ __forceinline__ void leave(const Sm90Problem& p, const Sm90Tile& tile, int group,
                                      std::uint32_t pieces, float (&sum)[kPixels / 2],
                                      const Added& added) {
  if constexpr (kIndex < kPixels / kPiece) {
    const bool elected = threadIdx.x % kGroup == 0;
    const std::uint32_t piece = pieces + kIndex % 2 * kPieceBytes;
    if (elected) copy_out_wait_read<1>();  // the piece before last has left this place
    named_barrier(1 + group, kGroup);
    keep_piece<T, kMoments, kIndex * kPiece>(sum, added, piece);
    copy_engine_fence();
    named_barrier(1 + group, kGroup);
    if (elected) {
      const int channel = tile.c + group * kGroupChannels;
      const Sm90Frame at = sm90_split(p.plan, tile.t, false);
      const Sm90Piece place = sm90_piece_place(p.plan, kIndex);
      const int part = channel / p.part_channels;
      const int map = part + tile.cls + (at.in_history ? p.plan.classes : 0);
      if (channel < p.plan.produce)
        copy_box_out(&p.target[map], piece, channel - part * p.part_channels, tile.w + place.w,
                     tile.h + place.h, at.t - p.late[map], tile.n + place.n);
      copy_out_commit();
    }
    leave<T, kPixels, kMoments, kIndex + 1>(p, tile, group, pieces, sum, added);
  }
}

// The moments of a warpgroup's 64 channels over the tile's pixels inside the frame (of one clip).
template <int kPixels>
__device__ __forceinline__ void note_moments(const Sm90Problem& p, const Sm90Tile& tile, int group,
                                             const float (&sum)[kPixels / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  const Sm90Class& cls = p.plan.cls[0];
  const int wide = cls.width - tile.w < p.plan.box_w ? cls.width - tile.w : p.plan.box_w;
  const int high = cls.height - tile.h < p.plan.box_h ? cls.height - tile.h : p.plan.box_h;
  const bool whole = wide * high == kPixels;
  const int row_bits = __ffs(p.plan.box_w) - 1, in_row = p.plan.box_w - 1;
  const float count = static_cast<float>(wide * high);
  const index_t frame = static_cast<index_t>(tile.n) * p.plan.frames + tile.t;
  const int box = tile.h / p.plan.box_h * cls.tiles_w + tile.w / p.plan.box_w;
  Moments* to = p.moments + (frame * (cls.tiles_h * cls.tiles_w) + box) * p.plan.produce;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto over_pixels = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < kPixels / 4; ++i) {
        const int pixel = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (whole || ((pixel & in_row) < wide && (pixel >> row_bits) < high))
          visit(sum[i / 2 * 4 + half * 2 + i % 2]);
      }
    };
    const auto over_quad = [](float value) {
      value += __shfl_xor_sync(kAllLanes, value, 1);
      return value + __shfl_xor_sync(kAllLanes, value, 2);
    };
    float total = 0.0f, squares = 0.0f;
    over_pixels([&](float value) { total += value; });
    const float mean = over_quad(total) / count;
    over_pixels([&](float value) { squares += (value - mean) * (value - mean); });
    squares = over_quad(squares);
    const int channel = tile.c + group * kGroupChannels + warp * 16 + half * 8 + lane / 4;
    if (lane % 4 == 0 && channel < p.plan.produce) to[channel] = {count, 0.0f, mean, squares};
  }
}

// One warpgroup of the two.
template <class T, int kPixels, bool kMoments>
__device__ __forceinline__ void consume(const Sm90Problem& p, std::uint32_t base, int group) {
  using Layout = Shared<kPixels>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  const std::uint32_t pieces = base + Layout::pieces + group * 2 * kPieceBytes;
  Sm90Ring<Layout::stages> ring;
  for_each_tile(p.plan, [&](const Sm90Tile& tile) {
    const int steps = sm90_steps(p.plan, tile);
    const int channel = tile.c + group * kGroupChannels + warp * 16 + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    Added added{};
    added.bias_low =
        bias != nullptr && channel < p.plan.produce ? static_cast<float>(bias[channel]) : 0.0f;
    added.bias_high = bias != nullptr && channel + 8 < p.plan.produce
                          ? static_cast<float>(bias[channel + 8])
                          : 0.0f;
    float sum[kPixels / 2];
    if (steps == 0)  // taps that read nothing at all
      for (int i = 0; i < kPixels / 2; ++i) sum[i] = 0.0f;
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(base + Layout::full + ring.stage * 8, ring.phase);
      const std::uint32_t stage = base + ring.stage * Layout::stage_bytes;
      const std::uint64_t weights =
          wgmma_descriptor(stage + group * kGroupChannels * kSwizzleRowBytes);
      const std::uint64_t pixels = wgmma_descriptor(stage + kWeightBytes);
      product_sums_ready(sum);
      product_begin();
#pragma unroll
      for (int k = 0; k < kSm90Depth / 16; ++k)
        product<T, kPixels>(sum, weights + k * kWgmmaSlice, pixels + k * kWgmmaSlice,
                            step > 0 || k > 0);
      product_commit();
      product_wait<1>();
      if (step > 0 && lane == 0) barrier_arrive(base + Layout::empty + previous * 8);
      previous = ring.stage;
      ring.advance();
    }
    product_wait<0>();
    product_sums_ready(sum);
    if (steps > 0 && lane == 0) barrier_arrive(base + Layout::empty + previous * 8);
    int own = 0;
    for (int other = 0; p.adds && other < kGroups; ++other) {
      barrier_wait(base + Layout::full + ring.stage * 8, ring.phase);
      if (other == group) {
        own = ring.stage;
        added.residual = base + own * Layout::stage_bytes + kWeightBytes;
      } else if (lane == 0) {
        barrier_arrive(base + Layout::empty + ring.stage * 8);
      }
      ring.advance();
    }
    leave<T, kPixels, kMoments, 0>(p, tile, group, pieces, sum, added);
    if (p.adds) {
      __syncwarp();  // all lanes have read it
      if (lane == 0) barrier_arrive(base + Layout::empty + own * 8);
    }
    if constexpr (kMoments) note_moments<kPixels>(p, tile, group, sum);
  });
  if (threadIdx.x % kGroup == 0) copy_out_wait();
}

template <class T, int kPixels, bool kMoments>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_gather_kernel(const __grid_constant__ Sm90Problem p) {
  if constexpr (MF_HAS_SM90A) {
    using Layout = Shared<kPixels>;
    const std::uint32_t base =
        round_up(shared_address(dynamic_shared()), std::uint32_t{kSwizzleAtomBytes});
    if (threadIdx.x == 0) {
      for (int i = 0; i < Layout::stages; ++i) {
        barrier_init(base + Layout::full + i * 8, 1);
        barrier_init(base + Layout::empty + i * 8, kWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    if (group == 0) {
      release_registers<40>();
      if (threadIdx.x == 0) produce<kPixels>(p, base);
    } else {
      request_registers<232>();
      consume<T, kPixels, kMoments>(p, base, group - 1);
    }
  }
}

// The parts of a result that leaves as depth to space, [N, T factor - dropped, H factor, W factor,
// C of a part]: each a strided view, the first frame of those that lie before the result left out.
void map_parts(Sm90Problem* p, const GatherProblem& g, const Sm90Epilogue& epilogue,
               const int (&box)[5], const char* op) {
  const GemmShape& s = g.shape;
  const int *f = epilogue.factor, c = p->part_channels;
  const index_t row = index_t{s.w.out} * f[2] * c, frame = row * s.h.out * f[1];
  const index_t clip = frame * (index_t{s.t.out} * f[0] - epilogue.dropped);
  for (int part = 0; part < epilogue.parts(); ++part) {
    const int i = part / (f[1] * f[2]), j = part / f[2] % f[1], k = part % f[2];
    p->late[part] = i < epilogue.dropped;
    const index_t first = i - epilogue.dropped + (p->late[part] ? f[0] : 0);
    // A clip of one frame leaves nothing of a late part: its one frame, 1, is never written.
    const int frames = s.t.out - p->late[part] < 1 ? 1 : s.t.out - p->late[part];
    p->target[part] =
        tensor_map({static_cast<const char*>(g.out) + (first * frame + j * row + k * c) * 2,
                    {c, s.w.out, s.h.out, frames, s.batch},
                    {1, index_t{f[2]} * c, row * f[1], frame * f[0], clip},
                    {box[0], box[1], box[2], box[3], box[4]},
                    s.dtype},
                   op);
  }
}

Sm90Problem make_problem(const GatherProblem& g, bool forward, const Sm90Epilogue& epilogue,
                         int multiprocessors, const char* op) {
  const GemmShape& s = g.shape;
  Sm90Problem p{};
  p.plan = sm90_plan(s, forward, multiprocessors);
  p.bias = g.bias;
  const Sm90Plan& plan = p.plan;
  const index_t reduce = plan.reduce, produce = plan.produce, taps = s.taps();
  p.weight =
      tensor_map({g.weight,
                  {reduce, produce, taps, 1, 1},
                  {1, reduce, reduce * produce, reduce * produce * taps, reduce * produce * taps},
                  {kSm90Depth, kSm90Channels, 1, 1, 1},
                  s.dtype},
                 op);
  // Inputs and outputs of the convolution: x and its history in views where the strides want it.
  const int in_box[5] = {kSm90Depth, plan.box_w, plan.box_h, 1, plan.box_n};
  const Sm90Piece piece = sm90_piece_size(plan);
  const int out_box[5] = {kSm90Depth, piece.w, piece.h, 1, piece.n};
  TensorMap* strided = forward ? p.source : p.target;
  const auto& box = forward ? in_box : out_box;
  const int views = s.h.stride * s.w.stride;
  const void* now = forward ? g.left : g.out;
  const void* before = forward ? g.left_history : g.out_history;
  for (int i = 0; i < views; ++i) {
    strided[i] = view_of(now, s.in_channels, s, s.h.source, s.w.source, s.frames, s.h.stride,
                         s.w.stride, i, box, op);
    if (s.history_frames > 0)
      strided[views + i] = view_of(before, s.in_channels, s, s.h.source, s.w.source,
                                   s.history_frames, s.h.stride, s.w.stride, i, box, op);
  }
  (forward ? p.target : p.source)[0] =
      view_of(forward ? g.out : g.left, s.out_channels, s, s.h.out, s.w.out, s.t.out, 1, 1, 0,
              forward ? out_box : in_box, op);
  p.part_channels = plan.produce / epilogue.parts();
  if (epilogue.parts() > 1) map_parts(&p, g, epilogue, out_box, op);
  p.moments = epilogue.moments;
  p.adds = g.residual != nullptr;
  if (p.adds)
    p.residual =
        view_of(g.residual, s.out_channels, s, s.h.out, s.w.out, s.t.out, 1, 1, 0, in_box, op);
  return p;
}

template <int kPixels>
void launch_pixels(const Sm90Problem& p, DType dtype, int blocks, const DeviceGuard& guard,
                   const ExecContext& ctx) {
  const dim3 grid(static_cast<unsigned>(blocks));
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (p.moments != nullptr)
      launch(guard, ctx, sm90_gather_kernel<T, kPixels, true>, grid, kThreads,
             Shared<kPixels>::bytes, p);
    else
      launch(guard, ctx, sm90_gather_kernel<T, kPixels, false>, grid, kThreads,
             Shared<kPixels>::bytes, p);
  });
}

}  // namespace

void sm90_gather(const GatherProblem& g, bool forward, const Sm90Epilogue& epilogue,
                 const DeviceGuard& guard, const ExecContext& ctx) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device),
             guard.op());
  const Sm90Problem p = make_problem(g, forward, epilogue, multiprocessors, guard.op());
  const int blocks = p.plan.tiles < multiprocessors ? p.plan.tiles : multiprocessors;
  if (p.plan.pixels() == 256)
    launch_pixels<256>(p, g.shape.dtype, blocks, guard, ctx);
  else
    launch_pixels<128>(p, g.shape.dtype, blocks, guard, ctx);
}

}  // namespace magvit_fast::cuda
