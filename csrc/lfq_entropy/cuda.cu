// lfq_entropy on CUDA: both entropies over all 2**D codes, by halves, on tensor cores.
// Previous hop: bindings.cpp.
// Next hop: cuda_tables.cuh (operands and products), cuda_plan.cuh (tiles), cuda_backward.cu.
//
// Forward, four launches. Product: probs[high, low] = sum_n high[n, high] * low[n, low] in tiles of
// 128 x 128 codes, split over runs of positions. A block reads z, makes the bits' probabilities,
// from them 32 positions of both half-code tables in shared memory (doubling: two multiplications
// an entry) while the tensor cores work on the 32 before; no table exists in device memory. The
// blocks of a run share the sample entropies, a step of 32 positions each. Sum: the runs, in order.
// Codebook: the entropy of the mean, in double sums of fixed order, and its second stage.
// No floating-point atomics: results are bit-reproducible.
//
// At 10240 x 2^18, full precision (three products): 16.1e9 FLOP, 31 MB of z, parts and probs (16
// runs of 1 MB, in L2). Floor on H200: mma.sync at about 600 TFLOP/s 27 us; with operands of TF32's
// precision (one product) 9 us. Predicted 35 + 9 us (launches, parts, entropy) and 17 + 9 us: the
// one product is bound by making the tables. Ladder: v0 float32 on FMA units (floor 80 us at
// 67 TFLOP/s) -> v1 this. None is measured. Limits: D <= 24; 65535 runs.
#include "common/cuda/convert.cuh"
#include "common/cuda/reduce.cuh"
#include "lfq_entropy/cuda_backward.h"
#include "lfq_entropy/cuda_tables.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kMostPlaces = 2 * kEntropyHalfBits;  // bits of a position, with those of padding
constexpr int kWarps = kProductThreads / kWarpSize;
constexpr int kBitsOfWarp = kMostPlaces / kWarps;

// The entropy of a bit with logit a; 0 log 0 = 0.
__device__ __forceinline__ float bit_entropy(float a) {
  const float small = expf(-fabsf(a)), log_sum = log1pf(small);  // of 1 + exp(-|a|)
  const float larger = 1.0f / (1.0f + small), smaller = small * larger;
  // log larger = -log_sum, log smaller = -|a| - log_sum.
  const float rest = smaller > 0.0f ? smaller * (fabsf(a) + log_sum) : 0.0f;
  return a != a ? a : larger * log_sum + rest;
}

// What a thread reads of 32 positions: every fourth bit of position begin + lane.
struct Logits {
  float value[kBitsOfWarp];
  bool counted;
};
template <class T>
__device__ __forceinline__ Logits read_logits(const LfqEntropyInput& in, const HalfCodes& halves,
                                              index_t begin, index_t end) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const index_t n = begin + threadIdx.x % kWarpSize;
  Logits logits{{}, n < end && (in.mask == nullptr || in.mask[n] != 0)};
  if (!logits.counted) return logits;
  const T* z =
      static_cast<const T*>(in.z) + n / in.inner * in.outer_stride + n % in.inner * in.inner_stride;
#pragma unroll
  for (int j = 0; j < kBitsOfWarp; ++j) {
    const int place = warp + j * kWarps;
    const int channel = place < halves.places() ? halves.channel_at(place) : -1;
    if (channel >= 0)
      logits.value[j] = in.scale * static_cast<float>(z[channel * in.channel_stride]);
  }
  return logits;
}

// To bits [place][32 positions]; a position that is not counted has probability 0 everywhere.
__device__ __forceinline__ void put_bits(const Logits& logits, const HalfCodes& halves,
                                         float2* bits) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < kBitsOfWarp; ++j) {
    const int place = thread / kWarpSize + j * kWarps;
    if (place >= halves.places()) return;
    float2 p = make_float2(1.0f, 0.0f);  // no channel: always minus
    if (halves.channel_at(place) >= 0)
      p = logits.counted ? bit_probabilities(logits.value[j]) : make_float2(0.0f, 0.0f);
    bits[place * kWarpSize + thread % kWarpSize] = p;
  }
}

__device__ __forceinline__ double entropy_of(const Logits& logits, const HalfCodes& halves) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kBitsOfWarp; ++j) {
    const int place = static_cast<int>(threadIdx.x) / kWarpSize + j * kWarps;
    if (logits.counted && place < halves.places() && halves.channel_at(place) >= 0)
      sum += bit_entropy(logits.value[j]);
  }
  return static_cast<double>(sum);
}

// Both operands of a step: warp w makes codes 32 w to 32 w + 31, a lane one position.
template <bool kFull>
__device__ __forceinline__ void make_operands(const float2* bits, const HalfCodes& halves,
                                              int low_first, int high_first, __half* left,
                                              __half* right) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = static_cast<int>(threadIdx.x) / kWarpSize;
  const auto make = [&](const float2* of_half, const HalfCode& half, int first, __half* operand) {
    make_probabilities<kFull>(of_half + lane, kWarpSize, half.padded_bits(), first + group * 32,
                              [&](int chunk, const uint4& main, const uint4& rest) {
                                put_chunk<kFull>(
                                    operand, chunk_at<kEntropyTile / 8>(lane, group * 4 + chunk),
                                    main, rest);
                              });
  };
  make(bits + halves.low.padded_bits() * kWarpSize, halves.high, high_first, left);
  make(bits, halves.low, low_first, right);
}

// Grid: x = tile of low codes, y = tile of high codes, z = run of positions.
template <class T, bool kFull>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(LfqEntropyInput in, double* partial, float* parts, HalfCodes halves,
                   index_t run) {
  __shared__ float2 bits[2][kMostPlaces * kWarpSize];
  __shared__ double scratch[kWarps];
  constexpr int kOperand = operand_elements<kFull>();
  __half* operands = reinterpret_cast<__half*>(dynamic_shared());  // [2][left, right]
  const int tile = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
  const int tiles = static_cast<int>(gridDim.x * gridDim.y);
  const int low_first = static_cast<int>(blockIdx.x) * kEntropyTile;
  const int high_first = static_cast<int>(blockIdx.y) * kEntropyTile;
  const index_t positions = in.outer * in.inner, begin = blockIdx.z * run;
  const index_t end = begin + run < positions ? begin + run : positions;
  const int steps = static_cast<int>(ceil_div(end - begin, index_t{kEntropyDepth}));
  double entropy = 0.0, count = 0.0;

  // A step's z is read two steps ahead, its bits made one product later, its tables one step ahead.
  const auto read = [&](int step) {
    return read_logits<T>(in, halves, begin + index_t{step} * kEntropyDepth, end);
  };
  const auto use = [&](const Logits& logits, int step) {
    put_bits(logits, halves, bits[step & 1]);
    if (step % tiles != tile) return;
    entropy += entropy_of(logits, halves);
    if (threadIdx.x < kWarpSize && logits.counted) count += 1.0;
  };
  const auto make = [&](int step) {
    __half* left = operands + (step & 1) * 2 * kOperand;
    make_operands<kFull>(bits[step & 1], halves, low_first, high_first, left, left + kOperand);
  };

  float sum[4][8][4] = {};
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, row = warp / 2 * 64,
            column = warp % 2 * 64;
  if (steps > 0) use(read(0), 0);
  if (steps > 1) use(read(1), 1);
  __syncthreads();
  if (steps > 0) make(0);
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    Logits ahead{};
    if (step + 2 < steps) ahead = read(step + 2);
    if (step + 1 < steps) make(step + 1);
    const __half* left = operands + (step & 1) * 2 * kOperand;
    multiply_step<kFull, false, false>(left, left + kOperand, row, column, sum);
    if (step + 2 < steps) use(ahead, step + 2);  // this step's bits have become its tables
    __syncthreads();
  }

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int low_codes = halves.low.codes(), high_codes = halves.high.codes();
  float* out = parts + static_cast<index_t>(blockIdx.z) * low_codes * high_codes;
  constexpr float kBack = 1.0f / (kProbabilityScale * kProbabilityScale);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int high = high_first + row + i * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int low = low_first + column + j * 8 + lane % 4 * 2;
      if (high < high_codes && low < low_codes)
        store_pair(out + static_cast<index_t>(high) * low_codes + low,
                   sum[i / 2][j][i % 2 * 2] * kBack, sum[i / 2][j][i % 2 * 2 + 1] * kBack);
    }
  }
  entropy = block_sum<kProductThreads>(entropy, scratch);
  count = block_sum<kProductThreads>(count, scratch);
  if (threadIdx.x == 0) {
    const index_t at = static_cast<index_t>(blockIdx.z) * tiles + tile;
    partial[at * 2] = entropy;
    partial[at * 2 + 1] = count;
  }
}

// Adds the runs, two codes a thread; the first block adds the sample entropies, too.
__global__ void __launch_bounds__(kEntropyThreads)
    add_runs_kernel(const float2* parts, float2* probs, index_t pairs, index_t runs,
                    const double* partial, index_t blocks, double* stats) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  const index_t step = static_cast<index_t>(gridDim.x) * kEntropyThreads;
  for (index_t k = static_cast<index_t>(blockIdx.x) * kEntropyThreads + threadIdx.x; k < pairs;
       k += step) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8  // loads before their additions
    for (index_t run = 0; run < runs; ++run) {
      const float2 part = parts[run * pairs + k];
      sum.x += part.x;
      sum.y += part.y;
    }
    probs[k] = sum;
  }
  if (blockIdx.x != 0) return;
  for (int which = 0; which < 2; ++which) {
    double sum = 0.0;
    for (index_t b = threadIdx.x; b < blocks; b += kEntropyThreads) sum += partial[b * 2 + which];
    sum = block_sum<kEntropyThreads>(sum, scratch);
    if (threadIdx.x == 0) stats[which] = sum;
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
    codebook_sum_kernel(LfqEntropyCodebookParams p, const double* partial) {
  __shared__ double scratch[kEntropyThreads / kWarpSize];
  double sum = 0.0;
  for (int b = static_cast<int>(threadIdx.x); b < kEntropyBlocks; b += kEntropyThreads)
    sum += partial[b];
  sum = block_sum<kEntropyThreads>(sum, scratch);
  if (threadIdx.x != 0) return;
  *p.entropy = static_cast<float>(sum);
  *p.per_sample = lfq_entropy_per_sample(p.stats);
}

void check_input(const LfqEntropyInput& in) {
  check(in.channels >= 1 && in.channels <= kLfqEntropyMaxChannels,
        "lfq_entropy: channels must be in 1..24");
}

}  // namespace

index_t lfq_entropy_workspace_bytes(index_t positions, index_t channels, const ExecContext&) {
  return EntropyWorkspace(nullptr, positions, HalfCodes(static_cast<int>(channels))).bytes;
}

void lfq_entropy_sums(const LfqEntropySumsParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const DeviceGuard guard(ctx, "lfq_entropy");
  const index_t positions = params.in.outer * params.in.inner;
  const HalfCodes halves(static_cast<int>(params.in.channels));
  const EntropyWorkspace space(params.workspace, positions, halves);
  const EntropyRuns runs(positions, halves);
  check(runs.count <= 65535, "lfq_entropy: too many runs of positions");
  const dim3 grid(static_cast<unsigned>(halves.low.tiles()),
                  static_cast<unsigned>(halves.high.tiles()), static_cast<unsigned>(runs.count));
  with_type(params.in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = params.full_precision ? product_kernel<T, true> : product_kernel<T, false>;
    launch(guard, ctx, kernel, grid, kProductThreads, product_shared_bytes(params.full_precision),
           params.in, space.partial, space.parts, halves, runs.length);
  });
  const index_t pairs = index_t{1} << (params.in.channels - 1);
  launch(guard, ctx, add_runs_kernel, dim3(blocks_for(pairs, kEntropyThreads)), kEntropyThreads, 0,
         reinterpret_cast<const float2*>(space.parts), reinterpret_cast<float2*>(params.probs),
         pairs, runs.count, space.partial, index_t{grid.x} * grid.y * grid.z, params.stats);
  guard.finish();
}

void lfq_entropy_codebook(const LfqEntropyCodebookParams& params, const ExecContext& ctx) {
  const DeviceGuard guard(ctx, "lfq_entropy codebook");
  double* partial = static_cast<double*>(params.workspace);
  launch(guard, ctx, codebook_kernel, dim3(kEntropyBlocks), kEntropyThreads, 0, params, partial);
  launch(guard, ctx, codebook_sum_kernel, dim3(1), kEntropyThreads, 0, params, partial);
  guard.finish();
}

void lfq_entropy_backward(const LfqEntropyBackwardParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const DeviceGuard guard(ctx, "lfq_entropy backward");
  if (params.in.outer * params.in.inner == 0) return;
  lfq_entropy_gradient(params, guard, ctx);
  guard.finish();
}

}  // namespace magvit_fast::cuda
