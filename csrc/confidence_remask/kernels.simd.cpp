// confidence_remask, one source per instruction set: samples one position's sub-tokens.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// argmax(logit/T + Gumbel) is a race: the value with the smallest E / w wins, E = -log(u) and
// w = exp((logit - max)/T). At T = 1 the w are the terms of the softmax anyway, so that a value
// costs one exp and its share of a Philox block. The logarithm is taken for few: since E >= 1 - u,
// only a value with 1 - u < w * limit can win where the best ratio is known to be below `limit`;
// and the best ratio is exponentially distributed with rate sum(w), so that limit = kLikely /
// sum(w) holds for 19 rows of 20. The others are looked through again with a larger one.
// Ladder, cycles for 16 values of 2 x 512 (Zen 4): logarithm wherever 1 - u < w * best 81; limit
// from the sum 61; two Philox streams 50; exp without guards, the next row fetched ahead 45.
#include "common/simd_math.h"
#include "common/simd_philox.h"
#include "confidence_remask/confidence_remask.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// kLanes values from p, of which `rest` exist; the missing ones are -infinity and never win.
template <class T>
inline vf load_padded(const T* p, index_t rest) {
  if (rest >= kLanes) return load(p);
  vf v = splat(-kInfinity);
  for (int i = 0; i < rest; ++i) v[i] = to_float(p[i]);
  return v;
}

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
  index_t v = 0;
  for (; v + 4 * kLanes <= count; v += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) best[i] = max(load(row + v + i * kLanes), best[i]);
  for (; v < count; v += kLanes) best[0] = max(load_padded(row + v, count - v), best[0]);
  const float top = max_lanes(max(max(best[0], best[1]), max(best[2], best[3])));
  *good = top < kInfinity && top > -kInfinity;
  return top;
}

template <class T>
float row_exp_sum(const T* row, index_t count, float top) {
  vf sum = {};
  for (index_t v = 0; v < count; v += kLanes) sum += exp(load_padded(row + v, count - v) - top);
  return sum_lanes(sum);
}

inline float min_of(float a, float b) { return a < b ? a : b; }

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

constexpr index_t kWord = 64, kChunk = 512;  // values of a word of flags; values raced at a time
constexpr float kLikely = 3.0f;              // exp(-kLikely) of the rows need a larger limit

// What is raced: weights, the top 23 bits of the random words, and a flag for who may win.
struct Field {
  float weights[kChunk];
  std::int32_t bits[kChunk];
  std::uint64_t able[kChunk / kWord];

  // Flags of up to 64 values from `base` on: 1 - u < w * limit, times 2^23 and with room for
  // rounding.
  inline void mark(index_t base, index_t count, float limit) {
    const vf scaled = splat(limit * 8388608.0f), all = splat(8388608.0f - 2.0f);
    std::uint64_t flags = 0;
    for (index_t v = 0; v < count; v += kLanes) {
      const vf k = __builtin_convertvector(load_as<vi>(bits + base + v), vf);
      const vi can = k > all - load(weights + base + v) * scaled;
      flags |= static_cast<std::uint64_t>(lane_bits(can)) << v;
    }
    able[base / kWord] = flags;
  }
};

// Draws the bits of the elements from `first` on and marks those that may beat `limit`; `count` is
// a power of two.
template <class T>
inline void draw(const ConfidenceRemaskParams& p, const PhiloxKeys& keys, std::uint64_t first,
                 index_t count, float limit, const T* next, Field* field) {
  if (count < kPhiloxDraws) {     // may begin inside a counter
    store_as(field->bits, vi{});  // also of the lanes beyond a row shorter than a vector
    for (index_t i = 0; i < count; ++i) {
      const std::uint64_t index = first + static_cast<std::uint64_t>(i);
      const Philox4 words = philox4x32(philox_counter(index, p.step, kValueStream),
                                       static_cast<std::uint32_t>(keys.first[0]),
                                       static_cast<std::uint32_t>(keys.second[0]));
      field->bits[i] = static_cast<std::int32_t>(words.x[index & 3] >> 9);
    }
    return field->mark(0, count, limit);
  }
  const PhiloxStart start(keys, first, p.step, kValueStream);
  const index_t unit = count < kWord ? count : kWord;
  for (index_t base = 0; base < count; base += unit) {
    for (index_t v = base; v < base + unit; v += kPhiloxDraws) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) __builtin_prefetch(next + v + i * kLanes);
      vu words[4];
      philox_draws(keys, start, first + static_cast<std::uint64_t>(v), words);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_as(field->bits + v + i * kLanes, words[i] >> 9);
    }
    field->mark(base, unit, limit);
  }
}

struct Race {
  float best = 3.0e38f;  // the smallest E / w so far
  index_t winner = 0;

  // Up to kLanes candidates: weights and bits, of the values `value`. Those of weight 0 lose.
  inline void enter(const float* weights, const std::int32_t* bits, const index_t* value) {
    const vf u = (__builtin_convertvector(load_as<vi>(bits), vf) + 0.5f) * 1.1920928955078125e-7f;
    const vf ratio = -log(u) / load(weights);
    const float least = min_lanes(ratio);
    if (!(least < best)) return;
    best = least;
    winner = value[__builtin_ctz(lane_bits(ratio == least))];  // the first of equals
  }

  // The marked values of a field, in order; they are `from` values into the row.
  inline void run(const Field& field, index_t count, index_t from) {
    float weights[kLanes] = {};
    std::int32_t bits[kLanes] = {};
    index_t value[kLanes];
    int entered = 0;
    unsigned words = 0;
    for (index_t w = 0; w < ceil_div(count, kWord); ++w) words |= (field.able[w] ? 1u : 0u) << w;
    for (; words; words &= words - 1) {
      const index_t word = __builtin_ctz(words);
      for (std::uint64_t able = field.able[word]; able; able &= able - 1) {
        const index_t v = word * kWord + __builtin_ctzll(able);
        weights[entered] = field.weights[v];
        bits[entered] = field.bits[v];
        value[entered] = from + v;
        if (++entered == kLanes) {
          enter(weights, bits, value);
          entered = 0;
        }
      }
    }
    for (int i = entered; i < kLanes; ++i) weights[i] = 0.0f;
    enter(weights, bits, value);
  }
};

// Weights exp((x - top) / T) of a chunk, padded with zeros to a vector; their sum.
template <bool kTempered, class T>
float weigh(const T* row, index_t count, float top, float temperature, float* weights) {
  vf sums[2] = {};
  const auto put = [&](index_t v, vf x) {
    vf gap = x - top;
    if constexpr (kTempered) gap /= temperature;
    const vf w = quick_exp(gap);
    store(weights + v, w);
    return w;
  };
  index_t v = 0;
  for (; v + 2 * kLanes <= count; v += 2 * kLanes) {
    sums[0] += put(v, load(row + v));
    sums[1] += put(v + kLanes, load(row + v + kLanes));
  }
  for (; v < count; v += kLanes) sums[0] += put(v, load_padded(row + v, count - v));
  return sum_lanes(sums[0] + sums[1]);
}

// A value drawn by the race, and the sum of exp(x - top).
template <class T>
index_t race_row(const ConfidenceRemaskParams& p, const PhiloxKeys& keys, const T* row, float top,
                 std::uint64_t first, float* total) {
  Field field;
  const index_t count = index_t{1} << p.bits, chunk = count < kChunk ? count : kChunk;
  Race race;
  for (index_t v = 0; v < count; v += chunk) {
    float sum = weigh<false>(row + v, chunk, top, 1.0f, field.weights);
    *total += sum;
    if (p.temperature != 1.0f) sum = weigh<true>(row + v, chunk, top, p.temperature, field.weights);
    const float before = race.best;
    float limit = min_of(kLikely / sum, before);
    draw(p, keys, first + static_cast<std::uint64_t>(v), chunk, limit, row + v + chunk, &field);
    race.run(field, chunk, v);
    while (limit < before && !(race.best <= limit)) {
      limit = min_of(4.0f * limit, before);
      for (index_t base = 0; base < chunk; base += kWord)
        field.mark(base, chunk - base < kWord ? chunk - base : kWord, limit);
      race.run(field, chunk, v);
    }
  }
  return race.winner;
}

template <class T>
Pick sample_row(const ConfidenceRemaskParams& p, const PhiloxKeys& keys, const T* row,
                std::uint64_t first) {
  const index_t count = index_t{1} << p.bits;
  Pick pick{0, 0.0f, true};
  const float top = row_max(row, count, &pick.good);
  if (!pick.good) return pick;
  float total = 0.0f;
  if (p.temperature > 0.0f && !p.value_noise) {
    pick.value = race_row(p, keys, row, top, first, &total);
  } else {
    const float* noise = p.value_noise + first;
    if (p.temperature > 0.0f)
      pick.value = argmax(count, &pick.good, [&](index_t v) {
        return load_padded(row + v, count - v) / p.temperature + load_padded(noise + v, count - v);
      });
    else
      pick.value =
          argmax(count, &pick.good, [&](index_t v) { return load_padded(row + v, count - v); });
    if (!pick.good) return pick;
    total = row_exp_sum(row, count, top);
  }
  pick.good = total == total;  // else a logit is NaN
  pick.log_prob = to_float(row[pick.value]) - top - log(splat(total))[0];
  return pick;
}

template <class T>
bool sample(const ConfidenceRemaskParams& p, index_t position, std::int64_t* token,
            float* log_prob) {
  const PhiloxKeys keys(p.seed);
  std::int64_t packed = 0;
  float sum = 0.0f;
  for (int g = 0; g < p.groups; ++g) {
    const index_t first = (position * p.groups + g) << p.bits;
    const Pick pick = sample_row(p, keys, static_cast<const T*>(p.logits) + first,
                                 static_cast<std::uint64_t>(first));
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
