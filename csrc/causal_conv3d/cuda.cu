// causal_conv3d on CUDA: packs the weights, chooses the kernel, adds up the parts of the weight
// gradient. Previous hop: bindings.cpp. Next hop: cuda_gather_mma.cu (16-bit, tensor cores),
// cuda_gather_fma.cu (float32, any channel count), cuda_weight_mma.cu, cuda_weight_fma.cu;
// gemm_rows.h is the geometry.
//
// A kernel for one architecture alone (Hopper's bulk copies) would be one more can_run_... here,
// before mma.
#include "causal_conv3d/cuda_kernels.h"
#include "common/cuda/convert.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr unsigned kThreads = 256;

// [Cout, channels, taps] to [Cout, taps, channels]; one thread an element of the result.
template <class T>
__global__ void pack_weight_kernel(const T* weight, T* packed, index_t outs, index_t channels,
                                   index_t taps) {
  const index_t total = outs * channels * taps;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const index_t channel = i % channels, tap = i / channels % taps, cout = i / channels / taps;
    packed[i] = weight[(cout * channels + channel) * taps + tap];
  }
}

// The parts in their order, and back from [Cout, taps, channels] to the weight's own layout.
template <class T>
__global__ void sum_parts_kernel(const float* partial, T* dweight, index_t parts, index_t outs,
                                 index_t channels, index_t taps) {
  const index_t total = outs * channels * taps;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    float sum = 0.0f;
    for (index_t part = 0; part < parts; ++part) sum += partial[part * total + i];
    const index_t channel = i % channels, tap = i / channels % taps, cout = i / channels / taps;
    dweight[(cout * channels + channel) * taps + tap] = static_cast<T>(sum);
  }
}

std::size_t packed_bytes(const GemmShape& s) {
  return static_cast<std::size_t>(s.weights() * dtype_bytes(s.dtype));
}

void pack_weight(const GemmShape& s, const void* weight, void* packed, const DeviceGuard& guard,
                 const ExecContext& ctx) {
  const index_t total = s.weights();
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, pack_weight_kernel<T>, dim3(blocks_for(total, kThreads)), kThreads, 0,
           static_cast<const T*>(weight), static_cast<T*>(packed), index_t{s.out_channels},
           index_t{s.group_in()}, index_t{s.taps()});
  });
}

WeightSplit split_of(const GemmShape& s, bool on_tensor_cores) {
  const WeightTiles tiles = on_tensor_cores ? weight_tiles_mma(s) : weight_tiles_fma(s);
  return weight_split(gemm_rows<true>(s), tiles.count);
}

}  // namespace

std::size_t causal_conv3d_forward_workspace(const Conv3dShape& shape, const ExecContext&) {
  return packed_bytes(gemm_shape(shape));
}

std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape& shape, const ExecContext&) {
  return packed_bytes(gemm_shape(shape));
}

std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape& shape, const ExecContext&) {
  // Either kernel may run: an address that is no multiple of 16 keeps a shape from the tensor
  // cores.
  const GemmShape s = gemm_shape(shape);
  index_t parts = split_of(s, false).parts;
  if (can_run_mma_gradients(s) && split_of(s, true).parts > parts) parts = split_of(s, true).parts;
  return static_cast<std::size_t>(parts * s.weights()) * sizeof(float);
}

void causal_conv3d_forward(const Conv3dForwardParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<true>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d");
  pack_weight(s, params.weight, params.workspace, guard, ctx);
  const GatherProblem problem{s,
                              {entry_axis<true>(s.t), entry_axis<true>(s.h), entry_axis<true>(s.w)},
                              params.x,
                              params.history,
                              params.workspace,
                              params.bias,
                              params.residual,
                              params.y,
                              nullptr};
  const bool aligned = aligned_16(params.x) && aligned_16(params.history) && aligned_16(params.y);
  if (can_run_mma_forward(s) && aligned)
    gather_mma_forward(problem, guard, ctx);
  else
    gather_fma_forward(problem, guard, ctx);
  guard.finish();
}

void causal_conv3d_input_grad(const Conv3dInputGradParams& params, const ExecContext& ctx) {
  const GemmShape s = gemm_shape(params.shape);
  if (gemm_rows<false>(s) == 0) return;
  const DeviceGuard guard(ctx, "causal_conv3d input gradient");
  pack_weight(s, params.weight, params.workspace, guard, ctx);
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
  const bool aligned =
      aligned_16(params.dy) && aligned_16(params.dx) && aligned_16(params.dhistory);
  if (can_run_mma_gradients(s) && aligned)
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
  const bool on_tensor_cores = can_run_mma_gradients(s) && aligned;
  const WeightSplit split = split_of(s, on_tensor_cores);
  check(split.parts <= 65535, "causal_conv3d: more than 65535 parts of the weight gradient");
  const WeightProblem problem{
      s, params.x, params.history, params.dy, static_cast<float*>(params.workspace), split};
  if (on_tensor_cores)
    weight_mma(problem, guard, ctx);
  else
    weight_fma(problem, guard, ctx);
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, sum_parts_kernel<T>, dim3(blocks_for(total, kThreads)), kThreads, 0,
           problem.partial, static_cast<T*>(params.dweight), split.parts, index_t{s.out_channels},
           index_t{s.group_in()}, index_t{s.taps()});
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
