// confidence_remask on CUDA: two kernels, sampling and ranking; nothing waits for the host.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Sampling: one warp a position, its sub-tokens one after the other; a lane takes four neighboring
// values at a time (one Philox block). A row is read twice, the second time from cache: its
// maximum, then the softmax sum and the Gumbel race in one go. Known positions read nothing.
// Ranking: one block a clip selects the num_unknown-th smallest key by radix, 8 bits a pass from
// the top; the histogram counts in integers, so its order of additions does not matter. Traffic:
// the logits of unknown positions once (21 MB at 8 x 1280 x 2 x 512 bfloat16). Limits: 2^31 - 1
// blocks of 8 positions; counts in int32 (positions of a clip below 2^31).
#include "common/cuda/bad_position.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "confidence_remask/confidence_remask.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kSampleThreads = 256, kRankThreads = 512, kBins = 256;
static_assert(kBins == 8 * kWarpSize, "a lane of the first warp scans eight bins");

__device__ __forceinline__ float gumbel(std::uint32_t bits) {
  return -logf(-logf(uniform_open(bits)));
}

__device__ __forceinline__ Philox4 draw(const ConfidenceRemaskParams& p, std::uint64_t index,
                                        std::uint32_t stream) {
  return philox4x32(philox_counter(index, p.step, stream), static_cast<std::uint32_t>(p.seed),
                    static_cast<std::uint32_t>(p.seed >> 32));
}

__device__ __forceinline__ std::uint32_t lane_of(const Philox4& block, unsigned lane) {
  return lane < 2 ? (lane == 0 ? block.x[0] : block.x[1]) : (lane == 2 ? block.x[2] : block.x[3]);
}

struct Best {
  float score;
  int value;
  // The larger score; of equals the lower value.
  __device__ __forceinline__ void meet(float other, int other_value) {
    if (other > score || (other == score && other_value < value))
      score = other, value = other_value;
  }
};

// One row of 2**bits logits, by a warp: the sampled value and its log probability; false if bad.
template <class T>
__device__ bool sample_row(const ConfidenceRemaskParams& p, const T* row, index_t first,
                           int* picked, float* log_prob) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int count = 1 << p.bits;
  float top = -INFINITY;
  bool bad = false;
  for (int v = lane; v < count; v += kWarpSize) {
    const float x = static_cast<float>(row[v]);
    bad = bad || x != x;
    top = x > top ? x : top;
  }
  top = warp_max(top);
  bad = bad || top == INFINITY || top == -INFINITY;
  if (__any_sync(kAllLanes, bad)) return false;

  Best best{-INFINITY, count};
  float total = 0.0f;
  for (int v = lane * 4; v < count; v += kWarpSize * 4) {
    const std::uint64_t index = static_cast<std::uint64_t>(first + v);
    Philox4 block{};
    if (p.temperature > 0.0f && p.value_noise == nullptr) block = draw(p, index, kValueStream);
    for (int j = 0; j < 4 && v + j < count; ++j) {  // rows below four values lie within one block
      const float x = static_cast<float>(row[v + j]) - top;
      total += expf(x);
      float score = x;
      if (p.temperature > 0.0f) {
        const float noise = p.value_noise != nullptr
                                ? p.value_noise[first + v + j]
                                : gumbel(lane_of(block, static_cast<unsigned>((index & 3) + j)));
        score = x / p.temperature + noise;
        bad = bad || noise != noise;
      }
      best.meet(score, v + j);
    }
  }
  if (__any_sync(kAllLanes, bad)) return false;
  total = warp_sum(total);
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best.score, offset);
    const int value = __shfl_xor_sync(kAllLanes, best.value, offset);
    best.meet(score, value);
  }
  *picked = best.value;
  *log_prob = static_cast<float>(row[best.value]) - top - logf(total);
  return true;
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(ConfidenceRemaskParams p) {
  const index_t position =
      static_cast<index_t>(blockIdx.x) * (kSampleThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (position >= p.batch * p.length) return;  // whole warps
  const bool writes = threadIdx.x % kWarpSize == 0;
  if (!p.unknown[position]) {
    if (writes) p.new_tokens[position] = p.tokens[position];
    return;
  }
  bool good = true;
  std::int64_t token = 0;
  float confidence = 0.0f;
  for (int g = 0; g < p.groups && good; ++g) {
    const index_t first = (position * p.groups + g) << p.bits;
    int value = 0;
    float log_prob = 0.0f;
    good = sample_row(p, static_cast<const T*>(p.logits) + first, first, &value, &log_prob);
    token |= static_cast<std::int64_t>(value) << (g * p.bits);
    confidence += log_prob;
  }
  if (!writes) return;
  if (p.choice_temperature > 0.0f) {
    const auto index = static_cast<std::uint64_t>(position);
    const float noise = p.choice_noise != nullptr
                            ? p.choice_noise[position]
                            : gumbel(lane_of(draw(p, index, kChoiceStream), index & 3));
    confidence += p.choice_temperature * noise;
  }
  if (!good || confidence != confidence) {
    token = -1;
    report_bad(p.bad, position);
  }
  p.new_tokens[position] = token;
  static_cast<std::uint64_t*>(p.workspace)[position] =
      confidence_key(__float_as_uint(confidence), position % p.length);
}

// The first warp: in which bin the `wanted`-th element lies (wanted >= 1) and how many lie before
// it.
struct Bin {
  int bin, before;
};
__device__ __forceinline__ Bin find_bin(const int* histogram, int wanted) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int sum = 0;
  for (int i = 0; i < 8; ++i) sum += histogram[lane * 8 + i];
  int through = sum;  // inclusive prefix over lanes
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, offset);
    if (lane >= offset) through += other;
  }
  const unsigned reached = __ballot_sync(kAllLanes, through >= wanted);
  const int owner = __ffs(static_cast<int>(reached)) - 1;
  Bin found{lane * 8, through - sum};
  while (lane == owner && found.before + histogram[found.bin] < wanted)
    found.before += histogram[found.bin++];
  found.bin = __shfl_sync(kAllLanes, found.bin, owner);
  found.before = __shfl_sync(kAllLanes, found.before, owner);
  return found;
}

__global__ void __launch_bounds__(kRankThreads) rank_kernel(ConfidenceRemaskParams p) {
  __shared__ int histogram[kBins];
  __shared__ Bin found;
  __shared__ int scratch[kRankThreads / kWarpSize];
  const int thread = static_cast<int>(threadIdx.x), length = static_cast<int>(p.length);
  const index_t base = static_cast<index_t>(blockIdx.x) * p.length;
  const std::uint64_t* keys = static_cast<const std::uint64_t*>(p.workspace) + base;
  const std::uint8_t* unknown = p.unknown + base;
  int mine = 0;
  for (int n = thread; n < length; n += kRankThreads) mine += unknown[n] != 0;
  const int candidates = block_sum<kRankThreads>(mine, scratch);
  const std::int64_t asked = p.num_unknown[blockIdx.x];
  int wanted = asked < 0 ? 0 : asked < candidates ? static_cast<int>(asked) : candidates;

  // The cut is the wanted-th smallest key, found from its top byte down; `kept` masks the found
  // bytes.
  std::uint64_t cut = 0, kept = 0;
  const int rank = wanted;
  for (int shift = 56; rank > 0 && shift >= 0; shift -= 8) {
    if (shift < 32 && static_cast<std::uint32_t>(length - 1) >> shift == 0) {
      kept |= std::uint64_t{0xff} << shift;  // a byte of the position that is 0 in every key
      continue;
    }
    for (int bin = thread; bin < kBins; bin += kRankThreads) histogram[bin] = 0;
    __syncthreads();
    for (int n = thread; n < length; n += kRankThreads)
      if (unknown[n] && (keys[n] & kept) == cut)
        atomicAdd(&histogram[static_cast<int>(keys[n] >> shift) & (kBins - 1)], 1);
    __syncthreads();
    if (thread < kWarpSize) {
      const Bin bin = find_bin(histogram, wanted);
      if (thread == 0) found = bin;
    }
    __syncthreads();
    cut |= static_cast<std::uint64_t>(found.bin) << shift;
    kept |= std::uint64_t{0xff} << shift;
    wanted -= found.before;
    __syncthreads();  // `found` and the histogram are free again
  }
  for (int n = thread; n < length; n += kRankThreads)
    p.new_unknown[base + n] = rank > 0 && unknown[n] && keys[n] <= cut;
}

}  // namespace

void confidence_remask(const ConfidenceRemaskParams& params, const ExecContext& ctx) {
  check(params.groups >= 1 && params.groups <= kConfidenceRemaskMaxGroups,
        "confidence_remask: groups must be in 1..8");
  check(params.bits >= 0 && params.bits < 31 && params.groups * params.bits <= 63,
        "confidence_remask: at most 2**30 values a sub-token and 63 bits a token");
  check(params.length < (index_t{1} << 31),
        "confidence_remask: at most 2**31 - 1 positions a clip");
  const index_t positions = params.batch * params.length;
  if (positions == 0) return;
  const DeviceGuard guard(ctx, "confidence_remask");
  const unsigned blocks = grid_blocks(ceil_div(positions, index_t{kSampleThreads / kWarpSize}),
                                      "confidence_remask: too many positions");
  with_type(params.dtype, [&](auto type) {
    launch(guard, ctx, sample_kernel<decltype(type)>, dim3(blocks), kSampleThreads, 0, params);
  });
  launch(guard, ctx, rank_kernel,
         dim3(grid_blocks(params.batch, "confidence_remask: too many clips")), kRankThreads, 0,
         params);
  guard.finish();
}

}  // namespace magvit_fast::cuda
