// lfq_entropy on CUDA: from the gradients of both entropies to the gradient of z.
// Previous hop: cuda.cu.
// Next hop: none.
//
// slopes[code] = d codebook entropy / d probs[code]. For each half, d[n, own] = sum over the other
// half's codes of slopes x other[n, other]: a matrix product of the forward's size, in tiles of 128
// positions x 128 own codes. Its results never leave the block: each is multiplied with own[n, own]
// and added to the bits it consists of, plus and minus apart (their difference would cancel at
// confident positions). A last kernel adds the tiles in order and applies d log p / d logit. No
// floating-point atomics. FLOPs: 4 x positions x 2**D. Traffic: slopes once a 128 positions.
#include "common/cuda/convert.cuh"
#include "lfq_entropy/cuda_backward.h"

namespace magvit_fast::cuda {
namespace {

__global__ void __launch_bounds__(kEntropyThreads)
    slopes_kernel(LfqEntropyBackwardParams p, float* slopes, index_t codes) {
  const double count = p.stats[1];
  const float scale = count > 0.0 ? static_cast<float>(1.0 / count) : 0.0f;
  const float outside = *p.grad_codebook * scale;
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  for (index_t k = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; k < codes;
       k += step)
    slopes[k] = outside * lfq_entropy_slope(p.probs[k] * scale, p.eps, p.clamp,
                                            [](float x) { return logf(x); });
}

// Grid: x = tile of 128 codes of the half `own`, y = tile of 128 positions.
__global__ void __launch_bounds__(kEntropyThreads)
    half_kernel(const float* bits, const float* slopes, float* gradient, index_t positions,
                int channels, HalfCode own, HalfCode other, index_t own_stride,
                index_t other_stride) {
  constexpr int kUnits = kEntropyTile * kEntropyDepth / kEntropyThreads, kOwn = kEntropyTile / 16;
  __shared__ float other_tile[kEntropyDepth][kEntropyTile], slope_tile[kEntropyDepth][kEntropyTile];
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
  const int my_column = thread % kEntropyTile, my_depth = thread / kEntropyTile;
  const int own_first = static_cast<int>(blockIdx.x) * kEntropyTile;
  const int other_codes = static_cast<int>(other.codes()),
            own_codes = static_cast<int>(own.codes());
  const index_t first = static_cast<index_t>(blockIdx.y) * kEntropyTile;
  const bool has_position = first + my_column < positions;
  const float* my_bits = bits + (has_position ? first + my_column : 0) * channels * 2;
  float sum[kOwn][kOwn] = {};
  for (int start = 0; start < other_codes; start += kEntropyDepth) {
    for (int u = 0; u < kUnits; ++u) {
      const int k = my_depth + u * (kEntropyThreads / kEntropyTile), code = start + k;
      const int own_code = own_first + my_column;
      other_tile[k][my_column] =
          has_position && code < other_codes ? half_probability(my_bits, other, code) : 0.0f;
      slope_tile[k][my_column] = own_code < own_codes && code < other_codes
                                     ? slopes[own_code * own_stride + code * other_stride]
                                     : 0.0f;
    }
    __syncthreads();
    float part[kOwn][kOwn] = {};  // two levels of sums: shorter chains of roundings
#pragma unroll
    for (int k = 0; k < kEntropyDepth; ++k) {
      float a[kOwn], b[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) a[i] = other_tile[k][ty + i * 16];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) b[j] = slope_tile[k][tx + j * 16];
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

  // To the bits: lanes tx = 0..15 hold the codes tx, tx + 16, ... of position ty + 16 i.
  const int width = own.bits * 2;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const index_t n = first + ty + i * 16;
    const float* table = bits + (n < positions ? n : 0) * channels * 2;
    float of_code[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int code = own_first + tx + j * 16;
      of_code[j] = code < own_codes ? sum[i][j] * half_probability(table, own, code) : 0.0f;
    }
    for (int b = 0; b < own.bits; ++b) {
      float plus = 0.0f, minus = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (((own_first + tx + j * 16) >> b) & 1)
          plus += of_code[j];
        else
          minus += of_code[j];
      }
      for (int offset = 8; offset > 0; offset /= 2) {  // within the 16 lanes of a position
        plus += __shfl_xor_sync(kAllLanes, plus, offset);
        minus += __shfl_xor_sync(kAllLanes, minus, offset);
      }
      if (tx == 0 && n < positions) {
        float* to = gradient + (blockIdx.x * positions + n) * width + b * 2;
        to[0] = minus;
        to[1] = plus;
      }
    }
  }
}

// One thread a (position, channel): adds the tiles and writes the gradient of z.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads)
    gradient_kernel(LfqEntropyBackwardParams p, const float* bits, const float* low_gradient,
                    const float* high_gradient, HalfCode low, HalfCode high) {
  const LfqEntropyInput& in = p.in;
  const index_t positions = in.outer * in.inner, total = positions * in.channels;
  const double count = p.stats[1];
  const float of_sample = count > 0.0 ? *p.grad_sample * static_cast<float>(1.0 / count) : 0.0f;
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  for (index_t e = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; e < total;
       e += step) {
    const index_t n = e / in.channels;
    const int c = static_cast<int>(e % in.channels);
    const index_t at =
        n / in.inner * in.outer_stride + n % in.inner * in.inner_stride + c * in.channel_stride;
    float result = 0.0f;
    if (in.mask == nullptr || in.mask[n] != 0) {
      const bool is_low = c < low.bits;
      const HalfCode half = is_low ? low : high;
      const float* gradient = is_low ? low_gradient : high_gradient;
      const int tiles = static_cast<int>(ceil_div(half.codes(), index_t{kEntropyTile}));
      float minus = 0.0f, plus = 0.0f;
      for (int tile = 0; tile < tiles; ++tile) {
        const float* from = gradient + ((tile * positions + n) * half.bits + (c - half.first)) * 2;
        minus += from[0];
        plus += from[1];
      }
      const float p_minus = bits[e * 2], p_plus = bits[e * 2 + 1];
      const float logit = in.scale * static_cast<float>(static_cast<const T*>(in.z)[at]);
      // d entropy of a bit / d logit = -logit p+ p-; an infinite logit has no slope.
      const float spread = p_plus * p_minus;
      const float of_bit = spread > 0.0f || spread != spread ? -logit * spread * of_sample : 0.0f;
      result = in.scale * (plus * p_minus - minus * p_plus + of_bit);
    }
    static_cast<T*>(p.grad_z)[at] = static_cast<T>(result);
  }
}

}  // namespace

void lfq_entropy_gradient(const LfqEntropyBackwardParams& params, const EntropyWorkspace& space,
                          const DeviceGuard& guard, const ExecContext& ctx) {
  const LfqEntropyInput& in = params.in;
  const index_t positions = in.outer * in.inner, codes = index_t{1} << in.channels;
  const int channels = static_cast<int>(in.channels);
  const HalfCode low = low_half(channels), high = high_half(channels);
  launch(guard, ctx, slopes_kernel, dim3(blocks_for(codes, kEntropyThreads)), kEntropyThreads, 0,
         params, space.slopes, codes);
  check(entropy_tiles(positions) <= 65535, "lfq_entropy: at most 8388480 positions");
  const auto half = [&](const HalfCode& own, const HalfCode& other, index_t own_stride,
                        index_t other_stride, float* gradient) {
    if (own.bits == 0) return;  // no channel lies in this half
    const dim3 grid(static_cast<unsigned>(entropy_tiles(own.codes())),
                    static_cast<unsigned>(entropy_tiles(positions)));
    launch(guard, ctx, half_kernel, grid, kEntropyThreads, 0, space.bits, space.slopes, gradient,
           positions, channels, own, other, own_stride, other_stride);
  };
  half(low, high, 1, low.codes(), space.low_gradient);
  half(high, low, low.codes(), 1, space.high_gradient);
  with_type(in.dtype, [&](auto type) {
    launch(guard, ctx, gradient_kernel<decltype(type)>,
           dim3(blocks_for(positions * in.channels, kEntropyThreads)), kEntropyThreads, 0, params,
           space.bits, space.low_gradient, space.high_gradient, low, high);
  });
}

}  // namespace magvit_fast::cuda
