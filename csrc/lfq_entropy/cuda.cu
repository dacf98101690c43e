// lfq_entropy on CUDA: both entropies over all 2**D codes, by halves, in float32.
// Previous hop: bindings.cpp.
// Next hop: cuda_plan.cuh (workspace), cuda_backward.cu (gradient).
//
// Kernels of the forward pass: bit probabilities and sample entropies (one thread a position); the
// matrix product probs[high, low] = sum_n high[n, high] * low[n, low] in tiles of 128 x 128 codes,
// split over runs of positions; the sum of the runs, in order; the entropy of the mean (double sums
// of fixed order). FLOPs: 2 x positions x 2**D and a fifth more to make the tiles (5.4e9 at 10240 x
// 2**18). Traffic: probs once a run. Every sum has a fixed order: no floating-point atomics,
// results are bit-reproducible. Limits: D <= 24; 65535 runs.
#include "common/cuda/convert.cuh"
#include "lfq_entropy/cuda_backward.h"
#include "lfq_entropy/cuda_plan.cuh"

namespace magvit_fast::cuda {
namespace {

// -p log p of both values of a bit with logit a, and the two probabilities.
struct BitEntropy {
  float plus, minus, entropy;
};
__device__ __forceinline__ BitEntropy bit_entropy(float a) {
  const float small = expf(-fabsf(a)), log_sum = log1pf(small);  // of 1 + exp(-|a|)
  const float larger = 1.0f / (1.0f + small), smaller = small / (1.0f + small);
  // log larger = -log_sum, log smaller = -|a| - log_sum; 0 log 0 = 0.
  const float entropy = larger * log_sum + (smaller > 0.0f ? smaller * (fabsf(a) + log_sum) : 0.0f);
  const bool positive = a >= 0.0f;
  if (a != a) return {a, a, a};
  return {positive ? larger : smaller, positive ? smaller : larger, entropy};
}

// Bit probabilities of every position and partial sums (sample entropy, count) of every block.
template <class T, bool kSums>
__global__ void __launch_bounds__(kEntropyThreads)
    bits_kernel(LfqEntropyInput in, float* bits, double* partial) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  const index_t positions = in.outer * in.inner;
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  double sum = 0.0, count = 0.0;
  for (index_t n = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; n < positions;
       n += step) {
    const bool counted = in.mask == nullptr || in.mask[n] != 0;
    const T* z = static_cast<const T*>(in.z) + n / in.inner * in.outer_stride +
                 n % in.inner * in.inner_stride;
    float entropy = 0.0f;
    for (index_t c = 0; c < in.channels; ++c) {
      BitEntropy bit{0.0f, 0.0f, 0.0f};
      if (counted) bit = bit_entropy(in.scale * static_cast<float>(z[c * in.channel_stride]));
      bits[(n * in.channels + c) * 2] = bit.minus;
      bits[(n * in.channels + c) * 2 + 1] = bit.plus;
      entropy += bit.entropy;
    }
    sum += static_cast<double>(entropy);
    count += counted ? 1.0 : 0.0;
  }
  if (!kSums) return;
  sum = block_sum<kEntropyThreads>(sum, scratch);
  count = block_sum<kEntropyThreads>(count, scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x * 2] = sum;
    partial[blockIdx.x * 2 + 1] = count;
  }
}

// One block: stats from the blocks' partial sums, thread i adding those i, i + 256, ...
__global__ void __launch_bounds__(kEntropyThreads)
    stats_kernel(const double* partial, double* stats) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  for (int which = 0; which < 2; ++which) {
    double sum = 0.0;
    for (int b = static_cast<int>(threadIdx.x); b < kEntropyBlocks; b += kEntropyThreads)
      sum += partial[b * 2 + which];
    sum = block_sum<kEntropyThreads>(sum, scratch);
    if (threadIdx.x == 0) stats[which] = sum;
  }
}

// Grid: x = tile of 128 low codes, y = tile of 128 high codes, z = run of positions.
__global__ void __launch_bounds__(kEntropyThreads)
    product_kernel(const float* bits, float* parts, index_t positions, int channels, HalfCode low,
                   HalfCode high, index_t run) {
  constexpr int kUnits = kEntropyTile * kEntropyDepth / kEntropyThreads, kOwn = kEntropyTile / 16;
  __shared__ float high_tile[kEntropyDepth][kEntropyTile], low_tile[kEntropyDepth][kEntropyTile];
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
  const int my_code = thread % kEntropyTile, my_position = thread / kEntropyTile;
  const int low_first = static_cast<int>(blockIdx.x) * kEntropyTile;
  const int high_first = static_cast<int>(blockIdx.y) * kEntropyTile;
  const index_t begin = blockIdx.z * run;
  const index_t end = begin + run < positions ? begin + run : positions;
  float sum[kOwn][kOwn] = {};
  for (index_t start = begin; start < end; start += kEntropyDepth) {
    for (int u = 0; u < kUnits; ++u) {
      const int k = my_position + u * (kEntropyThreads / kEntropyTile);
      const float* table = bits + (start + k) * channels * 2;
      const bool inside = start + k < end;  // codes beyond a half's last are made, but not stored
      high_tile[k][my_code] = inside ? half_probability(table, high, high_first + my_code) : 0.0f;
      low_tile[k][my_code] = inside ? half_probability(table, low, low_first + my_code) : 0.0f;
    }
    __syncthreads();
    float part[kOwn][kOwn] = {};  // two levels of sums: shorter chains of roundings
#pragma unroll
    for (int k = 0; k < kEntropyDepth; ++k) {
      float a[kOwn], b[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) a[i] = high_tile[k][ty + i * 16];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) b[j] = low_tile[k][tx + j * 16];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) part[i][j] = fmaf(a[i], b[j], part[i][j]);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[i][j] += part[i][j];
    __syncthreads();
  }
  float* out = parts + (static_cast<index_t>(blockIdx.z) << channels);
  for (int i = 0; i < kOwn; ++i)
    for (int j = 0; j < kOwn; ++j) {
      const index_t h = high_first + ty + i * 16, l = low_first + tx + j * 16;
      if (h < high.codes() && l < low.codes()) out[h * low.codes() + l] = sum[i][j];
    }
}

__global__ void __launch_bounds__(kEntropyThreads)
    add_parts_kernel(const float* parts, float* probs, index_t codes, index_t count) {
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  for (index_t k = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; k < codes;
       k += step) {
    float sum = 0.0f;
    for (index_t part = 0; part < count; ++part) sum += parts[part * codes + k];
    probs[k] = sum;
  }
}

// -sum P log(guard(P)) of a block's codes.
__global__ void __launch_bounds__(kEntropyThreads)
    codebook_kernel(LfqEntropyCodebookParams p, double* partial) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  const double count = p.stats[1];
  const float scale = count > 0.0 ? static_cast<float>(1.0 / count) : 0.0f;
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  double sum = 0.0;
  for (index_t k = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x;
       count > 0.0 && k < p.codes; k += step) {
    const float mean = p.probs[k] * scale;
    float guarded = mean;
    if (p.eps > 0.0f) guarded = p.clamp ? (mean > p.eps ? mean : p.eps) : mean + p.eps;
    if (mean != mean || guarded > 0.0f) sum -= static_cast<double>(mean * logf(guarded));
  }
  sum = block_sum<kEntropyThreads>(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kEntropyThreads)
    codebook_sum_kernel(const double* partial, float* entropy) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  double sum = 0.0;
  for (int b = static_cast<int>(threadIdx.x); b < kEntropyBlocks; b += kEntropyThreads)
    sum += partial[b];
  sum = block_sum<kEntropyThreads>(sum, scratch);
  if (threadIdx.x == 0) *entropy = static_cast<float>(sum);
}

void check_input(const LfqEntropyInput& in) {
  check(in.channels >= 1 && in.channels <= kLfqEntropyMaxChannels,
        "lfq_entropy: channels must be in 1..24");
}

}  // namespace

void lfq_entropy_bits(const LfqEntropyInput& in, const EntropyWorkspace& space, bool sums,
                      const DeviceGuard& guard, const ExecContext& ctx) {
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = sums ? bits_kernel<T, true> : bits_kernel<T, false>;
    launch(guard, ctx, kernel, dim3(kEntropyBlocks), kEntropyThreads, 0, in, space.bits,
           space.partial);
  });
}

index_t lfq_entropy_workspace_bytes(index_t positions, index_t channels, const ExecContext&) {
  return EntropyWorkspace(nullptr, positions, static_cast<int>(channels)).bytes;
}

void lfq_entropy_sums(const LfqEntropySumsParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const DeviceGuard guard(ctx, "lfq_entropy");
  const index_t positions = params.in.outer * params.in.inner;
  const int channels = static_cast<int>(params.in.channels);
  const EntropyWorkspace space(params.workspace, positions, channels);
  lfq_entropy_bits(params.in, space, true, guard, ctx);
  launch(guard, ctx, stats_kernel, dim3(1), kEntropyThreads, 0, space.partial, params.stats);
  const HalfCode low = low_half(channels), high = high_half(channels);
  index_t parts = entropy_parts(positions, channels);
  const index_t run = round_up(ceil_div(positions, parts), index_t{kEntropyDepth});
  if (run > 0) parts = ceil_div(positions, run);
  check(parts <= 65535, "lfq_entropy: too many runs of positions");
  const dim3 grid(static_cast<unsigned>(entropy_tiles(low.codes())),
                  static_cast<unsigned>(entropy_tiles(high.codes())), static_cast<unsigned>(parts));
  launch(guard, ctx, product_kernel, grid, kEntropyThreads, 0, space.bits, space.shared, positions,
         channels, low, high, run);
  const index_t codes = index_t{1} << channels;
  launch(guard, ctx, add_parts_kernel, dim3(blocks_for(codes, kEntropyThreads)), kEntropyThreads, 0,
         space.shared, params.probs, codes, parts);
  guard.finish();
}

void lfq_entropy_codebook(const LfqEntropyCodebookParams& params, const ExecContext& ctx) {
  const DeviceGuard guard(ctx, "lfq_entropy codebook");
  double* partial = static_cast<double*>(params.workspace);
  launch(guard, ctx, codebook_kernel, dim3(kEntropyBlocks), kEntropyThreads, 0, params, partial);
  launch(guard, ctx, codebook_sum_kernel, dim3(1), kEntropyThreads, 0, partial, params.entropy);
  guard.finish();
}

void lfq_entropy_backward(const LfqEntropyBackwardParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const DeviceGuard guard(ctx, "lfq_entropy backward");
  const index_t positions = params.in.outer * params.in.inner;
  if (positions == 0) return;
  const EntropyWorkspace space(params.workspace, positions, static_cast<int>(params.in.channels));
  lfq_entropy_bits(params.in, space, false, guard, ctx);
  lfq_entropy_gradient(params, space, guard, ctx);
  guard.finish();
}

}  // namespace magvit_fast::cuda
