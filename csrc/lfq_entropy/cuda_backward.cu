// lfq_entropy on CUDA: from the gradients of both entropies to the gradient of z.
// Previous hop: cuda.cu.
// Next hop: cuda_tables.cuh (operands and products).
//
// Three launches. Slopes: d codebook entropy / d probs[code], as float16 pairs, less the slope of a
// uniform distribution: a constant has no part in the result, since probabilities sum to 1, but
// would cost digits. Halves: for each half, d[n, own] = sum over the other half's codes of slopes x
// other[n, other], in tiles of 128 positions x 128 own codes, both halves in one grid; the table of
// the other half is made in shared memory while tensor cores work on the step before, slopes come
// by asynchronous copies. Results never leave the block: each is multiplied with own[n, own] and
// added to the bits it consists of, plus and minus apart (their difference would cancel at
// confident positions). Gradient: adds the tiles in order and applies d log p / d logit. No
// floating-point atomics.
//
// At 10240 x 2^18, full precision: 32.2e9 FLOP in 640 blocks, two a multiprocessor; 168 MB of
// slopes from L2, 6 MB of bit gradients. Floor on H200: mma.sync at about 600 TFLOP/s 54 us; one
// product each 18 us. Predicted 68 + 4 us and 26 + 4 us. Ladder: v0 float32 on FMA units (floor 160
// us) -> v1 this. None is measured.
#include "common/cuda/convert.cuh"
#include "lfq_entropy/cuda_backward.h"
#include "lfq_entropy/cuda_tables.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Two neighboring low codes a thread; 0 where a half is padded.
template <bool kFull>
__global__ void __launch_bounds__(kEntropyThreads)
    slopes_kernel(LfqEntropyBackwardParams p, HalfCodes halves, std::uint32_t* slopes) {
  const double count = p.stats[1];
  const float scale = count > 0.0 ? static_cast<float>(1.0 / count) : 0.0f;
  const int low_codes = halves.low.codes(), row_pairs = halves.low.padded_codes() / 2;
  const int pairs = halves.high.padded_codes() * row_pairs;
  const auto log = [](float x) { return logf(x); };
  const float uniform = lfq_entropy_slope(
      1.0f / static_cast<float>(low_codes * halves.high.codes()), p.eps, p.clamp, log);
  const auto slope = [&](int high, int low) {
    if (high >= halves.high.codes() || low >= low_codes) return 0.0f;
    const float mean = p.probs[static_cast<index_t>(high) * low_codes + low] * scale;
    return kSlopeScale * (lfq_entropy_slope(mean, p.eps, p.clamp, log) - uniform);
  };
  const int step = static_cast<int>(gridDim.x) * kEntropyThreads;
  for (int k = static_cast<int>(blockIdx.x) * kEntropyThreads + static_cast<int>(threadIdx.x);
       k < pairs; k += step) {
    const int high = k / row_pairs, low = k % row_pairs * 2;
    std::uint32_t main, rest;
    split_pair<kFull>(slope(high, low), slope(high, low + 1), main, rest);
    slopes[k] = main;
    if constexpr (kFull) slopes[pairs + k] = rest;
  }
}

// Bits [bit][position of the tile] of one half, by the thread of the position.
template <class T>
__device__ __forceinline__ void put_half_bits(const LfqEntropyInput& in, const T* z, bool counted,
                                              const HalfCode& half, float2* bits) {
  for (int b = 0; b < half.padded_bits(); ++b) {
    float2 p = make_float2(1.0f, 0.0f);  // no channel: always minus
    if (b < half.bits)
      p = counted ? bit_probabilities(in.scale *
                                      static_cast<float>(z[(half.first + b) * in.channel_stride]))
                  : make_float2(0.0f, 0.0f);
    bits[b * kEntropyTile + threadIdx.x] = p;
  }
}

// A step's slopes: 128 own codes x 32 codes of the other half. Rows of the array are high codes, so
// that low codes as own lie down the depth, high codes line by line.
template <bool kFull, bool kOwnHigh>
__device__ __forceinline__ void load_slopes(const __half* slopes, index_t all, int row_length,
                                            int own_first, int other_first, __half* operand) {
  constexpr int kChunks = kOwnHigh ? kEntropyDepth / 8 : kEntropyTile / 8;  // of a row
  const int first_row = kOwnHigh ? own_first : other_first,
            first_column = kOwnHigh ? other_first : own_first;
#pragma unroll
  for (int u = 0; u < kOperandElements / 8 / kProductThreads; ++u) {
    const int unit = static_cast<int>(threadIdx.x) + u * kProductThreads;
    const int row = unit / kChunks, chunk = unit % kChunks;
    const index_t from =
        static_cast<index_t>(first_row + row) * row_length + first_column + chunk * 8;
    __half* to = operand + chunk_at<kChunks>(row, chunk) * 8;
    copy_async_16(to, slopes + from, true);
    if constexpr (kFull) copy_async_16(to + kOperandElements, slopes + all + from, true);
  }
}

// From d[n, own code] of a warp's 64 positions x 64 codes to sums [value][position]: 2 b + sign for
// bits b below 6, 12 for all codes. A thread holds eight positions of 16 codes: bit 0 and bits 3 to
// 5 run within it, bits 1 and 2 over the four lanes of a position.
constexpr int kBitSums = 13;
__device__ __forceinline__ void fold_to_bits(const float (&sum)[4][8][4], const float2* bits,
                                             int padded_bits, int first_code, int first_position,
                                             float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane % 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int position = first_position + i * 8 + lane / 4;
    const auto bit = [&](int b) { return bits[b * kEntropyTile + position]; };
    const auto factor = [&](int b, int value) { return value ? bit(b).y : bit(b).x; };
    float base = factor(1, quarter & 1) * factor(2, quarter >> 1);
    for (int b = 6; b < padded_bits; ++b) base *= factor(b, (first_code >> b) & 1);
    float value[16];  // index bit 0: code bit 0; index bits 1 to 3: code bits 3 to 5
    value[0] = base;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 p = bit(k == 0 ? 0 : k + 2);
#pragma unroll
      for (int e = 0; e < 1 << k; ++e) {
        value[e + (1 << k)] = value[e] * p.y;
        value[e] *= p.x;
      }
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) value[e] *= sum[i / 2][e / 2][i % 2 * 2 + e % 2];

    const auto over_lanes = [](float x) {
      x += __shfl_xor_sync(kAllLanes, x, 1);
      return x + __shfl_xor_sync(kAllLanes, x, 2);
    };
    float result[kBitSums];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float minus = 0.0f, plus = 0.0f;
#pragma unroll
      for (int e = 0; e < 16; ++e) ((e >> k) & 1 ? plus : minus) += value[e];
      const int b = k == 0 ? 0 : k + 2;
      result[2 * b] = over_lanes(minus);
      result[2 * b + 1] = over_lanes(plus);
    }
    float own = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; ++e) own += value[e];
    const float along[2] = {own + __shfl_xor_sync(kAllLanes, own, 2),   // lanes of this bit 1
                            own + __shfl_xor_sync(kAllLanes, own, 1)};  // lanes of this bit 2
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // the first lane has minus in both
      result[2 + 2 * k] = along[k];
      result[3 + 2 * k] = __shfl_xor_sync(kAllLanes, along[k], 1 << k);
    }
    result[12] = result[2] + result[3];
    if (quarter == 0)
#pragma unroll
      for (int r = 0; r < kBitSums; ++r) to[r * kEntropyTile + position] = result[r];
  }
}

// One tile of one half; kOwnHigh: the high half's.
template <class T, bool kFull, bool kOwnHigh>
__device__ __forceinline__ void half_tile(const LfqEntropyInput& in, const HalfCodes& halves,
                                          const __half* slopes, int tile, float* gradient) {
  constexpr int kOperand = operand_elements<kFull>();
  __half* operands = reinterpret_cast<__half*>(dynamic_shared());  // [2][left, right]
  float2* bits = reinterpret_cast<float2*>(operands + 4 * kOperand);
  const HalfCode& own = kOwnHigh ? halves.high : halves.low;
  const HalfCode& other = kOwnHigh ? halves.low : halves.high;
  const int thread = static_cast<int>(threadIdx.x), own_first = tile * kEntropyTile;
  const index_t positions = in.outer * in.inner;
  const index_t n = static_cast<index_t>(blockIdx.x) * kEntropyTile + thread;
  const bool counted = n < positions && (in.mask == nullptr || in.mask[n] != 0);
  const T* z = static_cast<const T*>(in.z);
  if (counted) z += n / in.inner * in.outer_stride + n % in.inner * in.inner_stride;
  const int row_length = halves.low.padded_codes();
  const index_t all = static_cast<index_t>(halves.high.padded_codes()) * row_length;

  const auto make = [&](int step) {
    __half* left = operands + (step & 1) * 2 * kOperand;
    load_slopes<kFull, kOwnHigh>(slopes, all, row_length, own_first, step * kEntropyDepth,
                                 left + kOperand);
    copy_async_commit();
    make_probabilities<kFull>(
        bits + thread, kEntropyTile, other.padded_bits(), step * kEntropyDepth,
        [&](int chunk, const uint4& main, const uint4& rest) {
          put_chunk<kFull>(left, chunk_at<kEntropyDepth / 8>(thread, chunk), main, rest);
        });
  };
  float sum[4][8][4] = {};
  const int row = thread / 64 * 64, column = thread / 32 % 2 * 64;
  const int steps = other.padded_codes() / kEntropyDepth;
  put_half_bits(in, z, counted, other, bits);  // each thread reads what it wrote
  make(0);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<0>();
    __syncthreads();  // this step's operands are whole, and nobody reads those of the one before
    if (step + 1 < steps) make(step + 1);
    const __half* left = operands + (step & 1) * 2 * kOperand;
    multiply_step<kFull, true, kOwnHigh>(left, left + kOperand, row, column, sum);
  }
  __syncthreads();
  put_half_bits(in, z, counted, own, bits);
  __syncthreads();
  float* sums = reinterpret_cast<float*>(operands);  // [2 warps across][kBitSums][128 positions]
  fold_to_bits(sum, bits, own.padded_bits(), own_first + column, row,
               sums + column / 64 * kBitSums * kEntropyTile);
  __syncthreads();
  if (n >= positions) return;
  const float* first = sums + thread;
  const float* second = first + kBitSums * kEntropyTile;
  const float total[2] = {first[12 * kEntropyTile], second[12 * kEntropyTile]};
  float* to = gradient + static_cast<index_t>(tile) * own.bits * 2 * positions + n;
  for (int b = 0; b < own.bits; ++b) {
    float minus = total[0], plus = total[1];  // bit 6 tells the warps apart
    if (b < 6) {
      minus = first[2 * b * kEntropyTile] + second[2 * b * kEntropyTile];
      plus = first[(2 * b + 1) * kEntropyTile] + second[(2 * b + 1) * kEntropyTile];
    } else if (b > 6) {  // and the bits above it the tiles
      const bool set = (own_first >> b) & 1;
      minus = set ? 0.0f : total[0] + total[1];
      plus = set ? total[0] + total[1] : 0.0f;
    }
    to[2 * b * positions] = minus;
    to[(2 * b + 1) * positions] = plus;
  }
}

// Grid: x = tile of 128 positions, y = tile of 128 codes: the low half's, then the high half's.
template <class T, bool kFull>
__global__ void __launch_bounds__(kProductThreads, 2)
    halves_kernel(LfqEntropyInput in, HalfCodes halves, const __half* slopes, float* gradient) {
  const int tile = static_cast<int>(blockIdx.y), low_tiles = halves.low.tiles();
  if (tile < low_tiles)
    half_tile<T, kFull, false>(in, halves, slopes, tile, gradient);
  else
    half_tile<T, kFull, true>(
        in, halves, slopes, tile - low_tiles,
        gradient + index_t{low_tiles} * halves.low.bits * 2 * in.outer * in.inner);
}

// One thread a (channel, position), positions fastest.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads)
    gradient_kernel(LfqEntropyBackwardParams p, HalfCodes halves, const float* gradient) {
  const LfqEntropyInput& in = p.in;
  const index_t positions = in.outer * in.inner;
  const int c = static_cast<int>(blockIdx.y);
  const bool is_low = c < halves.low.bits;
  const HalfCode half = is_low ? halves.low : halves.high;
  if (!is_low) gradient += index_t{halves.low.tiles()} * halves.low.bits * 2 * positions;
  const double count = p.stats[1];
  const float each = count > 0.0 ? static_cast<float>(1.0 / count) : 0.0f;
  const float of_sample = *p.grad_sample * each;
  const float of_codebook = *p.grad_codebook * each / (kProbabilityScale * kSlopeScale);
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  for (index_t n = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; n < positions;
       n += step) {
    const index_t at =
        n / in.inner * in.outer_stride + n % in.inner * in.inner_stride + c * in.channel_stride;
    float result = 0.0f;
    if (in.mask == nullptr || in.mask[n] != 0) {
      float minus = 0.0f, plus = 0.0f;
      for (int tile = 0; tile < half.tiles(); ++tile) {
        const float* from =
            gradient + (index_t{tile} * half.bits + c - half.first) * 2 * positions + n;
        minus += from[0];
        plus += from[positions];
      }
      const float logit = in.scale * static_cast<float>(static_cast<const T*>(in.z)[at]);
      const float2 bit = bit_probabilities(logit);
      // d entropy of a bit / d logit = -logit p+ p-; an infinite logit has no slope.
      const float spread = bit.y * bit.x;
      const float of_bit = spread > 0.0f || spread != spread ? -logit * spread * of_sample : 0.0f;
      result = in.scale * ((plus * bit.x - minus * bit.y) * of_codebook + of_bit);
    }
    static_cast<T*>(p.grad_z)[at] = static_cast<T>(result);
  }
}

}  // namespace

void lfq_entropy_gradient(const LfqEntropyBackwardParams& params, const DeviceGuard& guard,
                          const ExecContext& ctx) {
  const LfqEntropyInput& in = params.in;
  const index_t positions = in.outer * in.inner;
  const HalfCodes halves(static_cast<int>(in.channels));
  const EntropyWorkspace space(params.workspace, positions, halves);
  const index_t pairs = index_t{halves.low.padded_codes()} * halves.high.padded_codes() / 2;
  launch(guard, ctx, params.full_precision ? slopes_kernel<true> : slopes_kernel<false>,
         dim3(blocks_for(pairs, kEntropyThreads)), kEntropyThreads, 0, params, halves,
         reinterpret_cast<std::uint32_t*>(space.slopes));
  const int most_bits = halves.low.padded_bits() > halves.high.padded_bits()
                            ? halves.low.padded_bits()
                            : halves.high.padded_bits();
  const std::size_t shared = product_shared_bytes(params.full_precision) +
                             static_cast<std::size_t>(most_bits) * kEntropyTile * sizeof(float2);
  const dim3 grid(
      grid_blocks(ceil_div(positions, index_t{kEntropyTile}),
                  "lfq_entropy: too many positions for one grid"),
      // A half without channels has no gradient, and its tile is the last one.
      static_cast<unsigned>(halves.low.tiles() + (halves.high.bits > 0 ? halves.high.tiles() : 0)));
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, params.full_precision ? halves_kernel<T, true> : halves_kernel<T, false>,
           grid, kProductThreads, shared, in, halves, reinterpret_cast<const __half*>(space.slopes),
           space.gradient);
    launch(guard, ctx, gradient_kernel<T>,
           dim3(blocks_for(positions, kEntropyThreads), static_cast<unsigned>(in.channels)),
           kEntropyThreads, 0, params, halves, space.gradient);
  });
}

}  // namespace magvit_fast::cuda
