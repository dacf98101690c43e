// causal_conv3d on CUDA: packs the weights, chooses the kernel, adds up the parts of the weight
// gradient. Previous hop: bindings.cpp. Next hop: sm90_gather.cu and sm90_weight.cu (Hopper, where
// they are asked for), cuda_thin_*.cu (16-bit, a few channels on one side), cuda_gather_mma.cu
// (16-bit, tensor cores), cuda_gather_fma.cu (float32, any channel count), cuda_weight_mma.cu,
// cuda_weight_fma.cu; gemm_rows.h is the geometry.
#include <algorithm>

#include "causal_conv3d/cuda_kernels.h"
#include "causal_conv3d/sm90_weight_schedule.h"
#include "causal_conv3d/sum_parts.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/hopper.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr unsigned kThreads = 256;

// Where packed weights stand: element (cout, channel, tap) at cout * out + channel * in + tap *
// tap.
struct PackedOrder {
  index_t out, in, tap;
};

constexpr int kPackOuts = 32, kPackBytes = 32 * 1024;

// [Cout, channels, taps] to another order. A block moves kPackOuts x `wide` x all taps through
// shared memory, so that it reads whole rows and writes runs along whichever index is innermost.
template <class T>
__global__ void pack_weight_kernel(const T* weight, T* packed, PackedOrder order, int outs,
                                   int channels, int taps, int wide) {
  T* tile = reinterpret_cast<T*>(dynamic_shared());  // [kPackOuts][wide][taps]
  const int column_tiles = ceil_div(channels, wide);
  const int first_out = static_cast<int>(blockIdx.x) / column_tiles * kPackOuts;
  const int first_in = static_cast<int>(blockIdx.x) % column_tiles * wide;
  const int row = wide * taps, all = kPackOuts * row;
  for (int i = static_cast<int>(threadIdx.x); i < all; i += static_cast<int>(blockDim.x)) {
    const int out = first_out + i / row, rest = i % row;
    if (out < outs && first_in + rest / taps < channels)
      tile[i] = weight[(static_cast<index_t>(out) * channels + first_in) * taps + rest];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < all; i += static_cast<int>(blockDim.x)) {
    int out, in, tap;
    if (order.in == 1) {
      in = i % wide, tap = i / wide % taps, out = i / wide / taps;
    } else {
      out = i % kPackOuts, in = i / kPackOuts % wide, tap = i / kPackOuts / wide;
    }
    if (first_out + out < outs && first_in + in < channels)
      packed[(first_out + out) * order.out + (first_in + in) * order.in + tap * order.tap] =
          tile[(out * wide + in) * taps + tap];
  }
}

// Parts as the portable kernels leave them, [Cout, taps, channels].
struct WholeParts {
  index_t weights;
  int parts, channels, taps;

  __device__ PartRow row(int out, int first, int tap) const {
    return {(static_cast<index_t>(out) * taps + tap) * channels + first, weights, parts};
  }
};

std::size_t packed_bytes(const GemmShape& s) {
  return static_cast<std::size_t>(s.weights() * dtype_bytes(s.dtype));
}

void pack_weight(const GemmShape& s, const PackedOrder& order, const void* weight, void* packed,
                 const DeviceGuard& guard, const ExecContext& ctx) {
  const int outs = s.out_channels, channels = s.group_in(), taps = s.taps();
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    const int column = kPackOuts * taps * static_cast<int>(sizeof(T));  // bytes of one channel
    check(column <= 192 * 1024, "causal_conv3d: more taps than the packing of weights holds");
    const int fit = kPackBytes / column, wide = fit < 1 ? 1 : fit < 16 ? fit : 16;
    const index_t blocks = index_t{ceil_div(outs, kPackOuts)} * ceil_div(channels, wide);
    launch(guard, ctx, pack_weight_kernel<T>,
           dim3(grid_blocks(blocks, "causal_conv3d: more than 2^31 - 1 blocks of weights")),
           kThreads, static_cast<std::size_t>(column) * wide, static_cast<const T*>(weight),
           static_cast<T*>(packed), order, outs, channels, taps, wide);
  });
}

// [Cout, taps, Cin], which the portable kernels read in both directions; and [taps, produced,
// summed] for the kernel of sm_90a.
PackedOrder by_output(const GemmShape& s) {
  return {index_t{s.taps()} * s.group_in(), 1, s.group_in()};
}
PackedOrder by_tap(const GemmShape& s, bool forward) {
  const index_t all = index_t{s.in_channels} * s.out_channels;
  if (forward) return {s.in_channels, 1, all};
  return {1, s.out_channels, all};
}

enum class Engine { sm90a, thin_sum, thin_result, thin_weight, mma, fma };

// `aligned`: whether every address is a multiple of 16.
Engine engine_for(const Conv3dShape& shape, const GemmShape& s, bool forward, bool aligned,
                  const ExecContext& ctx) {
  if (!aligned) return Engine::fma;
  if (shape.sm90a && can_run_sm90(s) && has_sm90a(ctx, "causal_conv3d")) return Engine::sm90a;
  if (can_run_thin_sum(s, forward)) return Engine::thin_sum;
  if (forward && can_run_thin_result(s, ctx)) return Engine::thin_result;
  const bool on_tensor_cores = forward ? can_run_mma_forward(s) : can_run_mma_gradients(s);
  return on_tensor_cores ? Engine::mma : Engine::fma;
}

Engine weight_engine_for(const Conv3dShape& shape, const GemmShape& s, bool aligned,
                         const ExecContext& ctx) {
  if (!aligned) return Engine::fma;
  if (shape.sm90a && can_run_sm90_weight(s) && has_sm90a(ctx, "causal_conv3d"))
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

void pack_for(Engine engine, const GemmShape& s, bool forward, const void* weight, void* packed,
              const DeviceGuard& guard, const ExecContext& ctx) {
  const PackedOrder order = engine == Engine::sm90a ? by_tap(s, forward) : by_output(s);
  pack_weight(s, order, weight, packed, guard, ctx);
}

WeightSplit split_of(const GemmShape& s, bool on_tensor_cores) {
  const WeightTiles tiles = on_tensor_cores ? weight_tiles_mma(s) : weight_tiles_fma(s);
  return weight_split(gemm_rows<true>(s), tiles.count);
}

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

}  // namespace

std::size_t causal_conv3d_forward_workspace(const Conv3dShape& shape, const ExecContext&) {
  const GemmShape s = gemm_shape(shape);
  return with_cells(packed_bytes(s), s, true);
}

std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape& shape, const ExecContext&) {
  const GemmShape s = gemm_shape(shape);
  return with_cells(packed_bytes(s), s, false);
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
    bytes = std::max(bytes, sm90_weight_grad_workspace(s));
  return bytes;
}

const char* causal_conv3d_engine(const Conv3dShape& shape, bool forward, const ExecContext& ctx) {
  return name_of(engine_for(shape, gemm_shape(shape), forward, true, ctx));
}

const char* causal_conv3d_weight_grad_engine(const Conv3dShape& shape, const ExecContext& ctx) {
  return name_of(weight_engine_for(shape, gemm_shape(shape), true, ctx));
}

void causal_conv3d_forward(const Conv3dForwardParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<true>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d");
  const bool aligned = aligned_16(params.x) && aligned_16(params.history) &&
                       aligned_16(params.residual) && aligned_16(params.y);
  const Engine engine = engine_for(params.shape, s, true, aligned, ctx);
  pack_for(engine, s, true, params.weight, params.workspace, guard, ctx);
  const GatherProblem problem{s,
                              {entry_axis<true>(s.t), entry_axis<true>(s.h), entry_axis<true>(s.w)},
                              params.x,
                              params.history,
                              params.workspace,
                              params.bias,
                              params.residual,
                              params.y,
                              nullptr};
  if (engine == Engine::sm90a)
    sm90_gather(problem, true, guard, ctx);
  else if (engine == Engine::thin_sum)
    thin_sum(problem, true, cells_in(params.workspace, packed_bytes(s)), guard, ctx);
  else if (engine == Engine::thin_result)
    thin_result(problem, guard, ctx);
  else if (engine == Engine::mma)
    gather_mma_forward(problem, guard, ctx);
  else
    gather_fma_forward(problem, guard, ctx);
  guard.finish();
}

void causal_conv3d_input_grad(const Conv3dInputGradParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<false>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d input gradient");
  const bool aligned =
      aligned_16(params.dy) && aligned_16(params.dx) && aligned_16(params.dhistory);
  const Engine engine = engine_for(params.shape, s, false, aligned, ctx);
  pack_for(engine, s, false, params.weight, params.workspace, guard, ctx);
  const GatherProblem problem{
      s,
      {entry_axis<false>(s.t), entry_axis<false>(s.h), entry_axis<false>(s.w)},
      params.dy,
      nullptr,
      params.workspace,
      nullptr,
      nullptr,
      params.dx,
      params.dhistory};
  if (engine == Engine::sm90a)
    sm90_gather(problem, false, guard, ctx);
  else if (engine == Engine::thin_sum)
    thin_sum(problem, false, cells_in(params.workspace, packed_bytes(s)), guard, ctx);
  else if (engine == Engine::mma)
    gather_mma_input_grad(problem, guard, ctx);
  else
    gather_fma_input_grad(problem, guard, ctx);
  guard.finish();
}

void causal_conv3d_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  const index_t total = s.weights();
  if (total == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d weight gradient");
  const bool aligned = aligned_16(params.x) && aligned_16(params.history) && aligned_16(params.dy);
  const Engine engine = weight_engine_for(params.shape, s, aligned, ctx);
  WeightProblem problem{
      s, params.x, params.history, params.dy, static_cast<float*>(params.workspace), {}};
  if (engine == Engine::sm90a) {
    sm90_weight_grad(problem, params.dweight, guard, ctx);
    return guard.finish();
  }
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
