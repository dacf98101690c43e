// causal_conv3d for Hopper (sm_90a): the weight gradient, a sum over pixels split over all blocks.
// Previous hop: cuda.cu. Next hop: sm90_weight_plan.h (which boxes), common/cuda/hopper.cuh (PTX).
//
// UNVERIFIED: compiled, run on the emulator of the tests, never on a device. Off unless asked for
// (_native.sm90a_kernels).
//
// One block a multiprocessor, three warpgroups. One thread of the first asks the copy engine for
// boxes: 64 pixels x 128 channels of dy and 80 pixels x 128 channels of x a step, into a ring of
// six stages. The other two multiply: each owns 64 channels of dy x 128 of x x up to three taps in
// registers (192 a thread). Pixels are what is summed over, and both operands lie pixel by pixel:
// wgmma reads both transposed (MN-major). Taps of a run are the same box of x one row of 8 pixels,
// 1024 bytes, further down: a whole period of the swizzle, so that one product of 192 columns takes
// 64 channels of x at all three taps, the leading dimension of its descriptor being that row.
//
// A block's stretch of steps meets one tile of dweight or more. The sums of each piece go to a slot
// of the workspace as float32; sum_parts.cuh adds the slots of a tile in the order of the blocks.
//
// dy outside of its plane is a zero of the copy engine, which x is still multiplied by: an infinity
// in x spreads to taps that do not read it.
//
// Floor: 2 x pixels x channels x channels x taps that read something, at 790 TFLOP/s measured by a
// matrix product. A step moves 36 KB for 6.3 MFLOP (L2: 4.6 TB/s at that rate; the forward kernel
// needs 9) and reads 83 bytes a clock of shared memory while 24 are written, of 128. Predicted:
// benchmarks/notes/cuda.md.
#include "causal_conv3d/cuda_kernels.h"
#include "causal_conv3d/sm90_view.h"
#include "causal_conv3d/sm90_weight_schedule.h"
#include "causal_conv3d/sum_parts.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/hopper.cuh"
#include "common/cuda/swizzle.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kGroup = 128, kGroups = 2, kThreads = kGroup * (1 + kGroups), kWarps = 4 * kGroups;
constexpr int kSlab = 64;  // channels of a box: a row of 128 bytes
constexpr int kSlabs = kGradTile / kSlab;
constexpr int kBoxRowBytes = kGradBox * kSwizzleRowBytes;
static_assert(kBoxRowBytes == kSwizzleAtomBytes, "a row of a box is a period of the swizzle");
static_assert(kGroups == kSlabs, "a warpgroup takes a slab of dy");
constexpr int kDySlabBytes = kGradBox * kBoxRowBytes;
constexpr int kXSlabBytes = (kGradBox + kGradRun - 1) * kBoxRowBytes;
constexpr int kStageBytes = kSlabs * (kDySlabBytes + kXSlabBytes), kStages = 6;
constexpr int kFull = kStages * kStageBytes, kEmpty = kFull + kStages * 8;
constexpr int kSharedBytes = kEmpty + kStages * 8 + kSwizzleAtomBytes;  // last: for alignment

struct WeightGradProblem {
  TensorMap dy;
  TensorMap x[2 * kSm90Views];  // views of x, then of the history
  Sm90WeightPlan plan;
  float* slots;
};
static_assert(sizeof(WeightGradProblem) <= 4096, "what a kernel may be given as parameters");

// One thread.
__device__ __forceinline__ void produce(const WeightGradProblem& p, std::uint32_t base) {
  prefetch_map(&p.dy);
  prefetch_map(&p.x[0]);
  Sm90Ring<kStages> ring;
  const int stage_bytes = kSlabs * (kDySlabBytes + p.plan.box_rows() * kBoxRowBytes);
  sm90_weight_pieces(p.plan, static_cast<int>(blockIdx.x), [&](int index, int first, int last) {
    const Sm90WeightTile tile = sm90_weight_tile(p.plan, index);
    Sm90WeightStep step;
    step.set(p.plan, tile.kt, first);
    for (int i = first; i < last; ++i) {
      const Sm90WeightBoxes at = sm90_weight_boxes(p.plan, tile, step);
      const std::uint32_t full = base + kFull + ring.stage * 8;
      const std::uint32_t stage = base + ring.stage * kStageBytes;
      barrier_wait(base + kEmpty + ring.stage * 8, ring.phase ^ 1);
      barrier_arrive_expecting(full, stage_bytes);
      for (int slab = 0; slab < kSlabs; ++slab) {
        copy_box_in(stage + slab * kDySlabBytes, &p.dy, full, tile.out * kGradTile + slab * kSlab,
                    at.w, at.h, at.t, at.n);
        copy_box_in(stage + kSlabs * kDySlabBytes + slab * kXSlabBytes, &p.x[at.view], full,
                    tile.in * kGradTile + slab * kSlab, at.x_w, at.x_h, at.x_t, at.n);
      }
      ring.advance();
      step.advance(p.plan, tile.kt);
    }
  });
}

// One warpgroup of the two: the sums of a piece, to its slot.
template <class T, int kTaps>
__device__ __forceinline__ void multiply(std::uint32_t base, int group, Sm90Ring<kStages>& ring,
                                         int steps, float* slot) {
  constexpr int kSlices = kGradBox * kGradBox / 16, kSliceBytes = 16 * kSwizzleRowBytes;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  float sum[kSlabs][kTaps * kSlab / 2];  // [slab of x][tap, 64 channels of x]
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(base + kFull + ring.stage * 8, ring.phase);
    const std::uint32_t stage = base + ring.stage * kStageBytes;
    const std::uint64_t dy = wgmma_descriptor_mn(stage + group * kDySlabBytes, kBoxRowBytes);
    const std::uint64_t x = wgmma_descriptor_mn(stage + kSlabs * kDySlabBytes, kBoxRowBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) product_sums_ready(sum[slab]);
    product_begin();
#pragma unroll
    for (int k = 0; k < kSlices; ++k)
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab)
        product_mn<T, kTaps * kSlab>(sum[slab], dy + (k * kSliceBytes >> 4),
                                     x + ((k * kSliceBytes + slab * kXSlabBytes) >> 4),
                                     step > 0 || k > 0);
    product_commit();
    product_wait<1>();
    if (step > 0 && lane == 0) barrier_arrive(base + kEmpty + previous * 8);
    previous = ring.stage;
    ring.advance();
  }
  product_wait<0>();
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) product_sums_ready(sum[slab]);
  if (lane == 0) barrier_arrive(base + kEmpty + previous * 8);
  // Eight rows of 32 bytes a store, whole sectors.
  float* row = slot + (group * kSlab + warp * 16 + lane / 4) * kGradTile + lane % 4 * 2;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
    for (int i = 0; i < kTaps * kSlab / 2; i += 4) {
      const int tap = i / (kSlab / 2), channel = slab * kSlab + i % (kSlab / 2) * 2;
      float* to = row + tap * kGradTile * kGradTile + channel;
      store_pair(to, sum[slab][i], sum[slab][i + 1]);
      store_pair(to + 8 * kGradTile, sum[slab][i + 2], sum[slab][i + 3]);
    }
}

template <class T, int kTaps>
__device__ __forceinline__ void consume(const WeightGradProblem& p, std::uint32_t base, int group) {
  const int block = static_cast<int>(blockIdx.x);
  Sm90Ring<kStages> ring;
  sm90_weight_pieces(p.plan, block, [&](int index, int first, int last) {
    float* slot = p.slots + sm90_weight_slot(block, index) * p.plan.slot_floats();
    multiply<T, kTaps>(base, group, ring, last - first, slot);
  });
}

template <class T, int kTaps>  // of the longest run
__global__ void __launch_bounds__(kThreads, 1)
    sm90_weight_kernel(const __grid_constant__ WeightGradProblem p) {
  if constexpr (MF_HAS_SM90A) {
    const std::uint32_t base =
        round_up(shared_address(dynamic_shared()), std::uint32_t{kSwizzleAtomBytes});
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(base + kFull + i * 8, 1);
        barrier_init(base + kEmpty + i * 8, kWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    if (group == 0) {
      release_registers<24>();
      if (threadIdx.x == 0) produce(p, base);
    } else {
      request_registers<240>();
      consume<T, kTaps>(p, base, group - 1);
    }
  }
}

// For sum_parts.cuh.
struct SlotsOfTiles {
  Sm90WeightPlan plan;

  __device__ PartRow row(int out, int first, int tap) const {
    const int of_plane = tap % plan.plane_taps;
    const int tile = sm90_weight_tile_index(
        plan, {plan.run_of[of_plane], out / kGradTile, first / kGradTile, tap / plan.plane_taps});
    const Sm90Slots slots = sm90_slots_of_tile(plan, tile);
    const int place = (plan.place_of[of_plane] * kGradTile + out % kGradTile) * kGradTile;
    return {slots.first * plan.slot_floats() + place + first % kGradTile, plan.slot_floats(),
            slots.count};
  }
};

WeightGradProblem make_problem(const WeightProblem& g, const Sm90WeightPlan& plan, const char* op) {
  const GemmShape& s = g.shape;
  WeightGradProblem p{};
  p.plan = plan;
  p.slots = g.partial;
  const int dy_box[5] = {kSlab, kGradBox, kGradBox, 1, 1};
  const int x_box[5] = {kSlab, kGradBox, plan.box_rows(), 1, 1};
  p.dy = view_of(g.dy, s.out_channels, s, s.h.out, s.w.out, s.t.out, 1, 1, 0, dy_box, op);
  for (int i = 0; i < plan.views; ++i) {
    p.x[i] = view_of(g.x, s.in_channels, s, s.h.source, s.w.source, s.frames, s.h.stride,
                     s.w.stride, i, x_box, op);
    if (s.history_frames > 0)
      p.x[plan.views + i] = view_of(g.history, s.in_channels, s, s.h.source, s.w.source,
                                    s.history_frames, s.h.stride, s.w.stride, i, x_box, op);
  }
  return p;
}

}  // namespace

std::size_t sm90_weight_grad_workspace(const GemmShape& s) {
  return sm90_weight_workspace(sm90_weight_plan(s));
}

void sm90_weight_grad(const WeightProblem& g, void* dweight, const DeviceGuard& guard,
                      const ExecContext& ctx) {
  const GemmShape& s = g.shape;
  const Sm90WeightPlan plan = sm90_weight_plan(s);
  with_half_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = plan.longest_run == 3   ? sm90_weight_kernel<T, 3>
                        : plan.longest_run == 2 ? sm90_weight_kernel<T, 2>
                                                : sm90_weight_kernel<T, 1>;
    if (plan.steps > 0)
      launch(guard, ctx, kernel, dim3(static_cast<unsigned>(plan.blocks)), kThreads, kSharedBytes,
             make_problem(g, plan, guard.op()));
  });
  sum_parts(SlotsOfTiles{plan}, g.partial, dweight, s.dtype, s.out_channels, s.in_channels,
            s.taps(), guard, ctx);
}

}  // namespace magvit_fast::cuda
