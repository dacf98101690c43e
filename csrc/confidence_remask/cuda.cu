// confidence_remask on CUDA: two kernels, sampling and ranking; nothing waits for the host.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Sampling: one warp a position, its sub-tokens one after the other; a lane takes four neighboring
// values at a time. A row is read twice, the second time from cache: its maximum, then its weights,
// whose running sum decides; at most a 32nd of it (128 values at least) a third time. One exp a
// value and one random number a row. Known positions read nothing.
// Ranking: one block a clip selects the num_unknown-th smallest key by radix, 8 bits a pass from
// the top, until the rest of a bin is wanted whole (3 or 4 passes of the 6 that 1280 positions
// could take); the histogram counts in integers, so its order of additions does not matter.
// Traffic: the logits of unknown positions once (21 MB at 8 x 1280 x 2 x 512 bfloat16). Limits:
// 2^31 - 1 blocks of 8 positions; counts in int32 (positions of a clip below 2^31).
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

constexpr int kChunk = 4 * kWarpSize;  // neighboring values that a warp takes at a time

// Sums over this lane and those before it.
__device__ __forceinline__ double sum_through(double x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const double other = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// What a warp reads of a row: a lane's four values of the chunk at `base`, less the largest, or
// -infinity.
template <class T>
struct Row {
  const T* values;
  int count;
  float top;

  __device__ __forceinline__ float gap(int v) const {
    return v < count ? static_cast<float>(values[v]) - top : -INFINITY;
  }
};

// The first value whose running sum of weights exp(gap / temperature) exceeds u times the sum of
// all. A lane keeps the sum of one group of chunks; then the group that passes is read again.
// `total` is the sum of exp(gap).
template <class T>
__device__ int choose(const Row<T>& row, float temperature, double u, float* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int chunks = ceil_div(row.count, kChunk), group = ceil_div(chunks, kWarpSize) * kChunk;
  double mine = 0.0;
  float plain = 0.0f;
  for (int g = 0; g * group < row.count; ++g) {
    double sum = 0.0;
    for (int v = g * group + lane * 4; v < (g + 1) * group && v < row.count; v += kChunk) {
      float four = 0.0f;
      for (int j = 0; j < 4; ++j) {
        const float gap = row.gap(v + j), weight = expf(gap);
        plain += weight;
        four += temperature == 1.0f ? weight : expf(gap / temperature);
      }
      sum += static_cast<double>(four);
    }
    sum = warp_sum(sum);
    if (lane == g) mine = sum;
  }
  *total = warp_sum(plain);

  const double through = sum_through(mine);
  double target = u * __shfl_sync(kAllLanes, through, kWarpSize - 1);
  unsigned passed = __ballot_sync(kAllLanes, through > target);
  if (passed == 0) {  // rounding: the last value with a weight
    const unsigned some = __ballot_sync(kAllLanes, mine > 0.0);
    passed = some == 0 ? 1u : 0x80000000u >> __clz(static_cast<int>(some));
    target = INFINITY;
  }
  const int chosen = __ffs(static_cast<int>(passed)) - 1;
  double before = __shfl_sync(kAllLanes, through - mine, chosen);
  int last = 0;  // value with a weight
  for (int base = chosen * group; base < (chosen + 1) * group && base < row.count; base += kChunk) {
    const int v = base + lane * 4;
    float weights[4];
    double sum = 0.0;
    for (int j = 0; j < 4; ++j) {
      weights[j] = expf(row.gap(v + j) / temperature);
      if (weights[j] > 0.0f) last = v + j;
      sum += static_cast<double>(weights[j]);
    }
    const double reached = before + sum_through(sum);
    const unsigned owners = __ballot_sync(kAllLanes, reached > target);
    if (owners != 0) {
      const int owner = __ffs(static_cast<int>(owners)) - 1;
      double at = reached - sum;
      int value = v;
      for (int j = 0; j < 4; ++j) {
        if (weights[j] > 0.0f) value = v + j;
        at += static_cast<double>(weights[j]);
        if (at > target) break;
      }
      return __shfl_sync(kAllLanes, value, owner);
    }
    before = __shfl_sync(kAllLanes, reached, kWarpSize - 1);
  }
  return warp_max(last);
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

// The largest of gap / temperature + noise, or of the gaps alone; false if there is a NaN.
template <class T>
__device__ bool best_score(const Row<T>& row, const float* noise, float temperature, int* value,
                           float* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  Best best{-INFINITY, row.count};
  float sum = 0.0f;
  bool bad = false;
  for (int v = lane; v < row.count; v += kWarpSize) {
    const float gap = row.gap(v);
    sum += expf(gap);
    const float score = noise != nullptr ? gap / temperature + noise[v] : gap;
    bad = bad || score != score;
    best.meet(score, v);
  }
  *total = warp_sum(sum);
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best.score, offset);
    const int other = __shfl_xor_sync(kAllLanes, best.value, offset);
    best.meet(score, other);
  }
  *value = best.value;
  return __any_sync(kAllLanes, bad) == 0;
}

// One row of 2**bits logits, by a warp: the sampled value and its log probability; false if bad.
template <class T>
__device__ bool sample_row(const ConfidenceRemaskParams& p, index_t row_index, int* picked,
                           float* log_prob) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const index_t first = row_index << p.bits;
  Row<T> row{static_cast<const T*>(p.logits) + first, 1 << p.bits, 0.0f};
  float top = -INFINITY;
  bool bad = false;
  for (int v = lane; v < row.count; v += kWarpSize) {
    const float x = static_cast<float>(row.values[v]);
    bad = bad || x != x;
    top = x > top ? x : top;
  }
  row.top = warp_max(top);
  bad = bad || row.top == INFINITY || row.top == -INFINITY;
  if (__any_sync(kAllLanes, bad)) return false;

  float total = 0.0f;
  if (p.temperature > 0.0f && p.value_noise == nullptr) {
    const auto word = static_cast<std::uint64_t>(2 * row_index);
    const Philox4 words = draw(p, word, kValueStream);
    const bool late = (word & 2) != 0;
    const double u = uniform_wide(late ? words.x[2] : words.x[0], late ? words.x[3] : words.x[1]);
    *picked = choose(row, p.temperature, u, &total);
  } else {
    const float* noise = p.temperature > 0.0f ? p.value_noise + first : nullptr;
    if (!best_score(row, noise, p.temperature, picked, &total)) return false;
  }
  *log_prob = row.gap(*picked) - logf(total);
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
    int value = 0;
    float log_prob = 0.0f;
    good = sample_row<T>(p, position * p.groups + g, &value, &log_prob);
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
  int bin, before, inside;
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
  Bin found{lane * 8, through - sum, 0};
  while (lane == owner && found.before + histogram[found.bin] < wanted)
    found.before += histogram[found.bin++];
  if (lane == owner) found.inside = histogram[found.bin];
  found.bin = __shfl_sync(kAllLanes, found.bin, owner);
  found.before = __shfl_sync(kAllLanes, found.before, owner);
  found.inside = __shfl_sync(kAllLanes, found.inside, owner);
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
    const bool whole =
        wanted == found.inside;  // the bin is taken as it is: no need to look into it
    __syncthreads();             // `found` and the histogram are free again
    if (whole) {
      cut |= (std::uint64_t{1} << shift) - 1;
      break;
    }
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
