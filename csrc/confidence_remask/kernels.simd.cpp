// confidence_remask, one source per instruction set: samples one position's sub-tokens.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// A value is drawn by its place in the running sum of the weights exp((logit - max) / T), which at
// T = 1 are the terms of the softmax anyway: one random number a row, one exp a value. Blocks of
// weights are summed first, then the block that holds the place is gone through again.
//
// Floor, instructions of 512 bits for 16 values: exp 10, its difference and sum 2, the largest
// logit 2; those of exp share one unit, 9 cycles. Ladder, cycles for 16 values of 2 x 512 (Zen 4):
// a Gumbel number a value, its logarithm only where it may win, 81 to 45 (Philox 15 and more); one
// number a row 27; rows in whole blocks, four chains of exp and of sums side by side 22. The rest
// is 300 cycles a row: a chain from the largest logit to the value that nothing of the next row
// fills.
#include "common/simd_math.h"
#include "confidence_remask/confidence_remask.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr index_t kBlock = 64,
                  kMostBlocks = 512;  // values; rows are whole blocks (shorter: padded)

struct Pick {
  index_t value;
  float log_prob;
  bool good;
};

// The largest logit, NaN aside; `good` is cleared by +inf, or if there is no finite one.
template <class T>
float row_max(const T* row, index_t count, bool* good) {
  vf best[4];
  for (int i = 0; i < 4; ++i) best[i] = splat(-kInfinity);
  for (index_t v = 0; v < count; v += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) best[i] = max(load(row + v + i * kLanes), best[i]);
  const float top = max_lanes(max(max(best[0], best[1]), max(best[2], best[3])));
  *good = top < kInfinity && top > -kInfinity;
  return top;
}

// Sums of `kCount` neighboring blocks of weights; weights.four(v, w) gives those of v to v + 4
// kLanes - 1. Step by step over all of them: one chain after the other would wait for itself.
template <int kCount, class Weights>
inline void sum_blocks(index_t begin, const Weights& weights, float* out) {
  vf sums[kCount];
#pragma GCC unroll 4
  for (int b = 0; b < kCount; ++b) {
    vf sum = {};
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / kLanes; i += 4) {
      vf w[4];
      weights.four(begin + b * kBlock + i * kLanes, w);
      sum += (w[0] + w[1]) + (w[2] + w[3]);
    }
    sums[b] = sum;
  }
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int b = 0; b < kCount; ++b)
      sums[b] += __builtin_shuffle(sums[b], (lane + half) & (kLanes - 1));
#pragma GCC unroll 4
  for (int b = 0; b < kCount; ++b) out[b] = sums[b][0];
}

// exp((x - top) / T) of a row.
template <class T, bool kTempered>
struct Weights {
  const T* row;
  float top, temperature;

  inline void four(index_t v, vf w[4]) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = load(row + v + i * kLanes) - top;
      if constexpr (kTempered) w[i] /= temperature;
    }
    quick_exp<4>(w);
  }
};

template <class T>
double row_exp_sum(const T* row, index_t count, float top) {
  const Weights<T, false> weights{row, top, 1.0f};
  double all = 0.0;
  for (index_t v = 0; v < count; v += kBlock) {
    float sum;
    sum_blocks<1>(v, weights, &sum);
    all += sum;
  }
  return all;
}

// The first index of the largest score; score(v) gives kLanes of them.
template <class Score>
index_t argmax(index_t count, bool* good, const Score& score) {
  vf best = splat(-kInfinity);
  vi where = {}, nan = {};
  vi index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  for (index_t v = 0; v < count; v += kLanes) {
    const vf s = score(v);
    nan |= s != s;
    const vi better = s > best;
    best = better ? s : best;
    where = better ? index : where;
    index += kLanes;
  }
  if (any(nan)) *good = false;
  const float top = max_lanes(best);
  std::int32_t first = INT32_MAX;
  for (int i = 0; i < kLanes; ++i)
    if (best[i] == top && where[i] < first) first = where[i];
  return first;
}

// The first value from `begin` on whose running sum, `before` at the start, exceeds `target`; where
// rounding leaves none, the last one with a weight.
template <class Weights>
index_t pass_target(index_t begin, index_t end, double before, double target,
                    const Weights& weights) {
  index_t last = begin;
  for (index_t v = begin; v < end; v += 4 * kLanes) {
    vf w[4];
    weights.four(v, w);
    float each[4 * kLanes];
    for (int i = 0; i < 4; ++i) store(each + i * kLanes, w[i]);
    for (int i = 0; i < 4 * kLanes; ++i) {
      before += each[i];
      if (before > target) return v + i;
      if (each[i] > 0.0f) last = v + i;
    }
  }
  return last;
}

// The same for one block, without branches that depend on the draw: where the sum passes is a coin
// that no predictor guesses.
template <class Weights>
inline index_t pass_in_block(index_t begin, double before, double target, const Weights& weights) {
  constexpr int kPart = 8, kParts = kBlock / kPart;
  float each[kBlock];
#pragma GCC unroll 4
  for (int v = 0; v < kBlock; v += 4 * kLanes) {
    vf w[4];
    weights.four(begin + v, w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(each + v + i * kLanes, w[i]);
  }
  double through[kParts + 1];
  through[0] = before;
  int part = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) {
    const float* w = each + i * kPart;
    through[i + 1] =
        through[i] + (((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7])));
    part += through[i + 1] <= target;
  }
  int place = 0;
  if (part < kParts) {
    double sum = through[part];
#pragma GCC unroll 8
    for (int i = 0; i < kPart; ++i) {
      sum += each[part * kPart + i];
      place += sum <= target;
    }
    if (place < kPart) [[likely]]
      return begin + part * kPart + place;
  }
  return pass_target(begin, begin + kBlock, before, target, weights);
}

// The value at share `u` of the sum of all weights, which goes to `total`.
template <class Weights>
index_t choose(index_t count, double u, const Weights& weights, double* total) {
  const index_t size = count > kBlock * kMostBlocks ? count / kMostBlocks : kBlock;
  const index_t blocks = count / size;
  double through[kMostBlocks + 1];
  through[0] = 0.0;
  if (size == kBlock && blocks % 4 == 0) {
    for (index_t b = 0; b < blocks; b += 4) {
      float sums[4];
      sum_blocks<4>(b * kBlock, weights, sums);
      for (int i = 0; i < 4; ++i) through[b + i + 1] = through[b + i] + sums[i];
    }
  } else {
    for (index_t b = 0; b < blocks; ++b) {
      through[b + 1] = through[b];
      for (index_t v = b * size; v < (b + 1) * size; v += kBlock) {
        float sum;
        sum_blocks<1>(v, weights, &sum);
        through[b + 1] += sum;
      }
    }
  }
  *total = through[blocks];
  const double target = u * *total;
  index_t block = 0;
  for (index_t b = 1; b <= blocks; ++b) block += through[b] <= target;
  if (block == blocks) return pass_target(0, count, 0.0, target, weights);  // u * total = total
  const double before = through[block];
  if (size == kBlock) return pass_in_block(block * size, before, target, weights);
  return pass_target(block * size, (block + 1) * size, before, target, weights);
}

// A value drawn at `temperature`, and the sum of exp(x - top).
template <class T>
index_t draw(const T* row, index_t count, float temperature, float top, double u, double* total) {
  if (temperature == 1.0f) return choose(count, u, Weights<T, false>{row, top, 1.0f}, total);
  double tempered;
  *total = row_exp_sum(row, count, top);
  return choose(count, u, Weights<T, true>{row, top, temperature}, &tempered);
}

// `noise` or null: drawn by u.
template <class T>
Pick sample_blocks(const T* row, const float* noise, index_t count, float temperature, double u) {
  Pick pick{0, 0.0f, true};
  const float top = row_max(row, count, &pick.good);
  if (!pick.good) return pick;
  double total = 0.0;
  if (temperature > 0.0f && !noise) {
    pick.value = draw(row, count, temperature, top, u, &total);
  } else {
    if (temperature > 0.0f)
      pick.value = argmax(count, &pick.good,
                          [&](index_t v) { return load(row + v) / temperature + load(noise + v); });
    else
      pick.value = argmax(count, &pick.good, [&](index_t v) { return load(row + v); });
    if (!pick.good) return pick;
    total = row_exp_sum(row, count, top);
  }
  pick.good = total == total;  // else a logit is NaN
  pick.log_prob = to_float(row[pick.value]) - top - log(splat(static_cast<float>(total)))[0];
  return pick;
}

template <class T>
Pick sample_row(const ConfidenceRemaskParams& p, index_t row, double u) {
  const index_t count = index_t{1} << p.bits;
  const T* logits = static_cast<const T*>(p.logits) + (row << p.bits);
  const float* noise = p.value_noise ? p.value_noise + (row << p.bits) : nullptr;
  if (count >= kBlock) return sample_blocks(logits, noise, count, p.temperature, u);
  float values[kBlock], more[kBlock] = {};
  for (index_t v = 0; v < kBlock; ++v) values[v] = v < count ? to_float(logits[v]) : -kInfinity;
  for (index_t v = 0; noise && v < count; ++v) more[v] = noise[v];
  return sample_blocks(values, noise ? more : nullptr, kBlock, p.temperature, u);
}

template <class T>
bool sample(const ConfidenceRemaskParams& p, index_t position, std::int64_t* token,
            float* log_prob) {
  Philox4 words{};
  std::int64_t packed = 0;
  float sum = 0.0f;
  for (int g = 0; g < p.groups; ++g) {
    const index_t row = position * p.groups + g;
    const auto word = static_cast<std::uint64_t>(2 * row);  // two rows share a counter
    if (g == 0 || row % 2 == 0)
      words =
          philox4x32(philox_counter(word, p.step, kValueStream), static_cast<std::uint32_t>(p.seed),
                     static_cast<std::uint32_t>(p.seed >> 32));
    const double u = uniform_wide(words.x[word & 3], words.x[(word & 3) + 1]);
    const Pick pick = sample_row<T>(p, row, u);
    if (!pick.good) return false;
    packed |= static_cast<std::int64_t>(pick.value) << (g * p.bits);
    sum += pick.log_prob;
  }
  *token = packed;
  *log_prob = sum;
  return true;
}

}  // namespace

bool confidence_remask_sample(const ConfidenceRemaskParams& params, index_t position,
                              std::int64_t* token, float* log_prob) {
  switch (params.dtype) {
    case DType::f32:
      return sample<float>(params, position, token, log_prob);
    case DType::bf16:
      return sample<bf16_t>(params, position, token, log_prob);
    case DType::f16:
      return sample<f16_t>(params, position, token, log_prob);
  }
  return false;
}

}  // namespace MF_ISA
}  // namespace magvit_fast
