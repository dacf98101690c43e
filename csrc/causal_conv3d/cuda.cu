// causal_conv3d on CUDA: chooses the kernel, adds up the parts of the weight gradient.
// Previous hop: bindings.cpp.
// Next hop: cuda_pack.cu; sm90_gather.cu and sm90_weight.cu (Hopper, where they are asked for; with
// cuda_plane.cu where the plane is not padded with zeros); cuda_thin_*.cu (16-bit, a few channels
// on one side); cuda_gather_mma.cu (16-bit, tensor cores), cuda_gather_fma.cu (float32, any channel
// count), cuda_weight_mma.cu, cuda_weight_fma.cu; gemm_rows.h is the geometry.
#include <algorithm>

#include "causal_conv3d/cuda_kernels.h"
#include "causal_conv3d/cuda_pack.h"
#include "causal_conv3d/cuda_plane.h"
#include "causal_conv3d/sm90_schedule.h"
#include "causal_conv3d/sm90_weight_schedule.h"
#include "causal_conv3d/sum_parts.cuh"
#include "causal_conv3d/workspace.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/hopper.cuh"
#include "common/cuda/moments.cuh"

namespace magvit_fast::cuda {
namespace {

// Parts as the portable kernels leave them, [Cout, taps, channels].
struct WholeParts {
  index_t weights;
  int parts, channels, taps;

  __device__ PartRow row(int out, int first, int tap) const {
    return {(static_cast<index_t>(out) * taps + tap) * channels + first, weights, parts};
  }
};

enum class Engine { sm90a, thin_sum, thin_result, thin_weight, mma, fma };

bool may_run_sm90(const Conv3dShape& shape, const GemmShape& s) {
  return shape.sm90a && can_run_sm90(on_padded_planes(s));
}

// `aligned`: whether every address is a multiple of 16.
Engine engine_for(const Conv3dShape& shape, const GemmShape& s, bool forward, bool aligned,
                  const ExecContext& ctx) {
  if (!aligned) return Engine::fma;
  if (may_run_sm90(shape, s) && has_sm90a(ctx, "causal_conv3d")) return Engine::sm90a;
  if (can_run_thin_sum(s, forward)) return Engine::thin_sum;
  if (forward && can_run_thin_result(s, ctx)) return Engine::thin_result;
  const bool on_tensor_cores = forward ? can_run_mma_forward(s) : can_run_mma_gradients(s);
  return on_tensor_cores ? Engine::mma : Engine::fma;
}

Engine weight_engine_for(const Conv3dShape& shape, const GemmShape& s, bool aligned,
                         const ExecContext& ctx) {
  if (!aligned) return Engine::fma;
  if (shape.sm90a && can_run_sm90_weight(on_padded_planes(s)) && has_sm90a(ctx, "causal_conv3d"))
    return Engine::sm90a;
  if (can_run_thin_weight(s)) return Engine::thin_weight;
  return can_run_mma_gradients(s) ? Engine::mma : Engine::fma;
}

const char* name_of(Engine engine) {
  switch (engine) {
    case Engine::sm90a:
      return "sm90a";
    case Engine::thin_sum:
    case Engine::thin_result:
    case Engine::thin_weight:
      return "thin";
    case Engine::mma:
      return "mma";
    case Engine::fma:
      break;
  }
  return "fma";
}

PackedOrder order_for(Engine engine, const GemmShape& s, bool forward) {
  return engine == Engine::sm90a ? by_tap(s, forward) : by_output(s);
}

// The weights as the engine wants them: packed by the caller, or now.
const void* packed_for(Engine engine, const Conv3dShape& shape, const GemmShape& s, bool forward,
                       const void* weight, void* space, const DeviceGuard& guard,
                       const ExecContext& ctx) {
  if (shape.packed) {
    const Engine packed = engine_for(shape, s, forward, true, ctx);
    check((packed == Engine::sm90a) == (engine == Engine::sm90a),
          "causal_conv3d: weights packed for another kernel");
    return weight;
  }
  pack_weight(s, order_for(engine, s, forward), weight, space, nullptr, guard, ctx);
  return space;
}

int multiprocessors_of(const ExecContext& ctx, const char* op) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ctx.device), op);
  return count;
}

// What comes first (packed weights, parts of their gradient), and for the kernels of sm_90a planes
// with their padding (of x or dx, and of the history).
struct Space {
  char *first, *x, *history;
  std::size_t bytes;

  Space(void* base, const GemmShape& s, std::size_t first_bytes, bool padded) {
    Workspace from(base);
    first = from.take<char>(static_cast<index_t>(first_bytes));
    x = from.take<char>(padded ? padded_bytes(s, s.frames) : 0);
    history = from.take<char>(padded ? padded_bytes(s, s.history_frames) : 0);
    bytes = from.bytes();
  }
};

// The cells of a thin tensor stand behind what else the workspace holds.
std::size_t cells_place(std::size_t bytes) { return round_up(bytes, std::size_t{256}); }
std::size_t with_cells(std::size_t bytes, const GemmShape& s, bool of_sources) {
  if (!has_thin_cells(s, of_sources)) return bytes;
  return cells_place(bytes) + static_cast<std::size_t>(thin_plan(s, of_sources).quads()) * 8;
}
void* cells_in(void* workspace, std::size_t bytes) {
  return static_cast<unsigned char*>(workspace) + cells_place(bytes);
}

std::size_t parts_bytes(const GemmShape& s, const WeightSplit& split) {
  return static_cast<std::size_t>(split.parts * s.weights()) * sizeof(float);
}

Space gather_space(void* base, const Conv3dShape& shape, const GemmShape& s) {
  return {base, s, packed_bytes(s), may_run_sm90(shape, s) && pads_planes(s)};
}

// x and history of a pass, as the kernels of sm_90a take them.
template <class Params>
void pad_sources(Params* params, const GemmShape& s, const Space& space, const DeviceGuard& guard,
                 const ExecContext& ctx) {
  if (!pads_planes(s)) return;
  pad_planes(s, params->x, s.frames, space.x, guard, ctx);
  pad_planes(s, params->history, s.history_frames, space.history, guard, ctx);
  params->x = space.x;
  params->history = s.history_frames > 0 ? space.history : nullptr;
}

Space grad_space(void* base, const GemmShape& s) {
  return {base, s, sm90_weight_grad_workspace(on_padded_planes(s)), pads_planes(s)};
}

GatherProblem forward_problem(const Conv3dForwardParams& params, const GemmShape& s,
                              const void* weight) {
  return {s,
          {entry_axis<true>(s.t), entry_axis<true>(s.h), entry_axis<true>(s.w)},
          params.x,
          params.history,
          weight,
          params.bias,
          params.residual,
          params.y,
          nullptr};
}

GatherProblem gradient_problem(const Conv3dInputGradParams& params, const GemmShape& s,
                               const void* weight) {
  return {s,
          {entry_axis<false>(s.t), entry_axis<false>(s.h), entry_axis<false>(s.w)},
          params.dy,
          nullptr,
          weight,
          nullptr,
          nullptr,
          params.dx,
          params.dhistory};
}

bool aligned(const Conv3dForwardParams& p) {
  return aligned_16(p.x) && aligned_16(p.history) && aligned_16(p.residual) && aligned_16(p.y);
}

void forward_sm90(Conv3dForwardParams params, const GemmShape& s, const Sm90Epilogue& epilogue,
                  const DeviceGuard& guard, const ExecContext& ctx) {
  const Space space = gather_space(params.workspace, params.shape, s);
  const void* weight =
      packed_for(Engine::sm90a, params.shape, s, true, params.weight, space.first, guard, ctx);
  pad_sources(&params, s, space, guard, ctx);
  sm90_gather(forward_problem(params, on_padded_planes(s), weight), true, epilogue, guard, ctx);
}

void input_grad_sm90(Conv3dInputGradParams params, const GemmShape& s, const DeviceGuard& guard,
                     const ExecContext& ctx) {
  const Space space = gather_space(params.workspace, params.shape, s);
  const Conv3dInputGradParams asked = params;
  const void* weight =
      packed_for(Engine::sm90a, params.shape, s, false, params.weight, space.first, guard, ctx);
  if (pads_planes(s)) {
    params.dx = space.x;
    params.dhistory = s.history_frames > 0 ? space.history : nullptr;
  }
  sm90_gather(gradient_problem(params, on_padded_planes(s), weight), false, {nullptr, {1, 1, 1}, 0},
              guard, ctx);
  if (!pads_planes(s)) return;
  fold_planes(s, params.dx, s.frames, asked.dx, guard, ctx);
  fold_planes(s, params.dhistory, s.history_frames, asked.dhistory, guard, ctx);
}

void weight_grad_sm90(Conv3dWeightGradParams params, const GemmShape& s, const DeviceGuard& guard,
                      const ExecContext& ctx) {
  const Space space = grad_space(params.workspace, s);
  pad_sources(&params, s, space, guard, ctx);
  sm90_weight_grad({on_padded_planes(s),
                    params.x,
                    params.history,
                    params.dy,
                    reinterpret_cast<float*>(space.first),
                    {}},
                   params.dweight, guard, ctx);
}

// Of the tiles that the forward pass would take.
Sm90Plan forward_plan(const GemmShape& s, const ExecContext& ctx) {
  return sm90_plan(on_padded_planes(s), true, multiprocessors_of(ctx, "causal_conv3d"));
}

index_t moments_of_span(const Sm90Plan& plan, const Conv3dEpilogue& e) {
  const index_t tiles = index_t{plan.cls[0].tiles_h} * plan.cls[0].tiles_w;
  return e.per_frame ? tiles : tiles * plan.frames;
}

// Behind what the forward pass wants.
index_t moments_count(const GemmShape& s, const Conv3dEpilogue& e, const ExecContext& ctx) {
  if (e.groups == 0) return 0;
  const Sm90Plan plan = forward_plan(s, ctx);
  return index_t{plan.cls[0].tiles_h} * plan.cls[0].tiles_w * plan.frames * s.batch *
         s.out_channels;
}

WeightSplit split_of(const GemmShape& s, bool on_tensor_cores) {
  const WeightTiles tiles = on_tensor_cores ? weight_tiles_mma(s) : weight_tiles_fma(s);
  return weight_split(gemm_rows<true>(s), tiles.count);
}

}  // namespace

std::size_t causal_conv3d_forward_workspace(const Conv3dShape& shape, const ExecContext&) {
  const GemmShape s = gemm_shape(shape);
  return std::max(gather_space(nullptr, shape, s).bytes, with_cells(packed_bytes(s), s, true));
}

std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape& shape, const ExecContext&) {
  const GemmShape s = gemm_shape(shape);
  return std::max(gather_space(nullptr, shape, s).bytes, with_cells(packed_bytes(s), s, false));
}

std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  // Any kernel may run: an address that is no multiple of 16 keeps a shape from the tensor cores.
  const GemmShape s = gemm_shape(shape);
  std::size_t bytes = parts_bytes(s, split_of(s, false));
  if (can_run_mma_gradients(s)) bytes = std::max(bytes, parts_bytes(s, split_of(s, true)));
  if (can_run_thin_weight(s)) {
    const std::size_t parts = parts_bytes(s, thin_weight_split(s));
    bytes = std::max({bytes, with_cells(parts, s, true), with_cells(parts, s, false)});
  }
  if (weight_engine_for(shape, s, true, ctx) == Engine::sm90a)
    bytes = std::max(bytes, grad_space(nullptr, s).bytes);
  return bytes;
}

const char* causal_conv3d_engine(const Conv3dShape& shape, bool forward, const ExecContext& ctx) {
  return name_of(engine_for(shape, gemm_shape(shape), forward, true, ctx));
}

const char* causal_conv3d_weight_grad_engine(const Conv3dShape& shape, const ExecContext& ctx) {
  return name_of(weight_engine_for(shape, gemm_shape(shape), true, ctx));
}

Conv3dPacking causal_conv3d_packing(const Conv3dShape& shape, bool forward,
                                    const ExecContext& ctx) {
  const GemmShape s = gemm_shape(shape);
  const bool by_taps = engine_for(shape, s, forward, true, ctx) == Engine::sm90a;
  return {packed_bytes(s) + marks_bytes(s), by_taps ? 1 + forward : 0};
}

void causal_conv3d_pack(const Conv3dShape& shape, bool forward, const void* weight, void* packed,
                        const ExecContext& ctx) {
  const GemmShape s = gemm_shape(shape);
  const DeviceGuard guard(ctx, "causal_conv3d");
  const Engine engine = engine_for(shape, s, forward, true, ctx);
  void* marks = static_cast<char*>(packed) + packed_bytes(s);
  pack_weight(s, order_for(engine, s, forward), weight, packed, static_cast<std::uint64_t*>(marks),
              guard, ctx);
  guard.finish();
}

void causal_conv3d_forward(const Conv3dForwardParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<true>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d");
  const Engine engine = engine_for(params.shape, s, true, aligned(params), ctx);
  if (engine == Engine::sm90a) {
    forward_sm90(params, s, {nullptr, {1, 1, 1}, 0}, guard, ctx);
  } else {
    const void* weight =
        packed_for(engine, params.shape, s, true, params.weight, params.workspace, guard, ctx);
    const GatherProblem problem = forward_problem(params, s, weight);
    if (engine == Engine::thin_sum)
      thin_sum(problem, true, cells_in(params.workspace, packed_bytes(s)), guard, ctx);
    else if (engine == Engine::thin_result)
      thin_result(problem, guard, ctx);
    else if (engine == Engine::mma)
      gather_mma_forward(problem, guard, ctx);
    else
      gather_fma_forward(problem, guard, ctx);
  }
  guard.finish();
}

bool causal_conv3d_fuses(const Conv3dShape& shape, const Conv3dEpilogue& e,
                         const ExecContext& ctx) {
  const GemmShape s = gemm_shape(shape);
  if (engine_for(shape, s, true, true, ctx) != Engine::sm90a) return false;
  const index_t parts = e.factor[0] * e.factor[1] * e.factor[2];
  const bool by_parts = parts == 1 || (parts <= 2 * kSm90Classes && s.out_channels % parts == 0 &&
                                       s.out_channels / parts % kSm90Depth == 0 &&
                                       e.dropped < e.factor[0] && e.groups == 0);
  return by_parts && (e.groups == 0 || forward_plan(s, ctx).box_n == 1);
}

std::size_t causal_conv3d_forward_fused_workspace(const Conv3dShape& shape, const Conv3dEpilogue& e,
                                                  const ExecContext& ctx) {
  const GemmShape s = gemm_shape(shape);
  return gather_space(nullptr, shape, s).bytes +
         static_cast<std::size_t>(moments_count(s, e, ctx)) * sizeof(Moments);
}

void causal_conv3d_forward_fused(const Conv3dForwardParams& params, const Conv3dEpilogue& e,
                                 const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<true>(s) == 0) return;
  check(aligned(params) && causal_conv3d_fuses(params.shape, e, ctx),
        "causal_conv3d: no kernel makes this of the result");
  const DeviceGuard guard(ctx, "causal_conv3d");
  Moments* moments = nullptr;
  if (e.groups > 0)
    moments = reinterpret_cast<Moments*>(static_cast<char*>(params.workspace) +
                                         gather_space(nullptr, params.shape, s).bytes);
  const Sm90Epilogue epilogue{
      moments,
      {static_cast<int>(e.factor[0]), static_cast<int>(e.factor[1]), static_cast<int>(e.factor[2])},
      static_cast<int>(e.dropped)};
  forward_sm90(params, s, epilogue, guard, ctx);
  if (moments != nullptr) {
    const index_t parts = moments_of_span(forward_plan(s, ctx), e);
    const MomentsMerger merger{moments, parts,  s.out_channels, static_cast<int>(e.groups),
                               e.eps,   e.stats};
    merge_moments(merger, index_t{s.batch} * (e.per_frame ? s.t.out : 1), guard, ctx);
  }
  guard.finish();
}

void causal_conv3d_input_grad(const Conv3dInputGradParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<false>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d input gradient");
  const bool even = aligned_16(params.dy) && aligned_16(params.dx) && aligned_16(params.dhistory);
  const Engine engine = engine_for(params.shape, s, false, even, ctx);
  if (engine == Engine::sm90a) {
    input_grad_sm90(params, s, guard, ctx);
  } else {
    const void* weight =
        packed_for(engine, params.shape, s, false, params.weight, params.workspace, guard, ctx);
    const GatherProblem problem = gradient_problem(params, s, weight);
    if (engine == Engine::thin_sum)
      thin_sum(problem, false, cells_in(params.workspace, packed_bytes(s)), guard, ctx);
    else if (engine == Engine::mma)
      gather_mma_input_grad(problem, guard, ctx);
    else
      gather_fma_input_grad(problem, guard, ctx);
  }
  guard.finish();
}

void causal_conv3d_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  const index_t total = s.weights();
  if (total == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d weight gradient");
  const bool even = aligned_16(params.x) && aligned_16(params.history) && aligned_16(params.dy);
  const Engine engine = weight_engine_for(params.shape, s, even, ctx);
  if (engine == Engine::sm90a) {
    weight_grad_sm90(params, s, guard, ctx);
    return guard.finish();
  }
  WeightProblem problem{
      s, params.x, params.history, params.dy, static_cast<float*>(params.workspace), {}};
  problem.split =
      engine == Engine::thin_weight ? thin_weight_split(s) : split_of(s, engine == Engine::mma);
  const WeightSplit& split = problem.split;
  check(split.parts <= 65535, "causal_conv3d: more than 65535 parts of the weight gradient");
  if (engine == Engine::thin_weight)
    thin_weight(problem, cells_in(params.workspace, parts_bytes(s, split)), guard, ctx);
  else if (engine == Engine::mma)
    weight_mma(problem, guard, ctx);
  else
    weight_fma(problem, guard, ctx);
  const WholeParts parts{total, static_cast<int>(split.parts), s.group_in(), s.taps()};
  sum_parts(parts, problem.partial, params.dweight, s.dtype, s.out_channels, s.group_in(), s.taps(),
            guard, ctx);
  guard.finish();
}

}  // namespace magvit_fast::cuda
