// confidence_remask, one source per instruction set: samples one position's sub-tokens.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// argmax(logit/T + Gumbel) is a race: the value with the smallest E / w wins, E = -log(u) and
// w = exp((logit - max)/T). At T = 1 the w are the terms of the softmax anyway, so that a value
// costs one exp and its share of a Philox block; since E >= 1 - u, the logarithm is taken only
// where 1 - u < w * (the best ratio so far), which is rare. Ladder per sub-token of 512 values: see
// benchmarks/bench_confidence_remask.py.
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

// The largest logit; `good` is cleared by a NaN, by +inf, or if there is no finite one.
template <class T>
float row_max(const T* row, index_t count, bool* good) {
  vf best = splat(-kInfinity);
  vi nan = {};
  for (index_t v = 0; v < count; v += kLanes) {
    const vf x = load_padded(row + v, count - v);
    nan |= x != x;
    best = max(x, best);
  }
  const float top = max_lanes(best);
  *good = !any(nan) && top < kInfinity && top > -kInfinity;
  return top;
}

template <class T>
float row_exp_sum(const T* row, index_t count, float top) {
  vf sum = {};
  for (index_t v = 0; v < count; v += kLanes) sum += exp(load_padded(row + v, count - v) - top);
  return sum_lanes(sum);
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

// Random bits of the elements from `first` on, in order.
inline void draw_bits(const ConfidenceRemaskParams& p, std::uint64_t first, index_t count,
                      vu bits[2]) {
  const auto key0 = static_cast<std::uint32_t>(p.seed);
  const auto key1 = static_cast<std::uint32_t>(p.seed >> 32);
  if (count >= kPhiloxDraws) return philox_draws(first, p.step, kValueStream, key0, key1, bits);
  for (index_t i = 0; i < count; ++i) {  // a row shorter than a block may begin inside a counter
    const std::uint64_t index = first + static_cast<std::uint64_t>(i);
    const Philox4 draw = philox4x32(philox_counter(index, p.step, kValueStream), key0, key1);
    bits[i / kLanes][i % kLanes] = draw.x[index & 3];
  }
}

struct Race {
  float best = 3.0e38f;  // the smallest E / w so far
  index_t winner = 0;

  // kLanes racers with weights w, values from `value` on.
  inline void enter(vf w, vu bits, index_t value) {
    // 1 - u, exactly: the complement of the bits mirrors the grid of uniform_open.
    const vf one_minus_u =
        (__builtin_convertvector((vi)(~bits >> 9), vf) + 0.5f) * 1.1920928955078125e-7f;
    if (!any(one_minus_u < w * best)) return;
    const vf ratio = -log(1.0f - one_minus_u) / w;
    const float least = min_lanes(ratio);
    if (!(least < best)) return;
    best = least;
    winner = value + __builtin_ctz(lane_bits(ratio == least));  // the first of equals
  }
};

template <class T>
Pick sample_row(const ConfidenceRemaskParams& p, const T* row, std::uint64_t first) {
  const index_t count = index_t{1} << p.bits;
  Pick pick{0, 0.0f, true};
  const float top = row_max(row, count, &pick.good);
  if (!pick.good) return pick;
  float total = 0.0f;
  if (p.temperature > 0.0f && !p.value_noise) {
    Race race;
    vf sums[2] = {};
    for (index_t v = 0; v < count; v += kPhiloxDraws) {
      vu bits[2] = {};
      draw_bits(p, first + static_cast<std::uint64_t>(v), count - v, bits);
      for (int h = 0; h < 2; ++h) {
        const index_t at = v + h * kLanes;
        const vf x = load_padded(row + at, count - at) - top;
        const vf w = exp(x);
        sums[h] += w;
        race.enter(p.temperature == 1.0f ? w : exp(x / p.temperature), bits[h], at);
      }
    }
    pick.value = race.winner;
    total = sum_lanes(sums[0] + sums[1]);
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
  pick.log_prob = to_float(row[pick.value]) - top - log(splat(total))[0];
  return pick;
}

template <class T>
bool sample(const ConfidenceRemaskParams& p, index_t position, std::int64_t* token,
            float* log_prob) {
  std::int64_t packed = 0;
  float sum = 0.0f;
  for (int g = 0; g < p.groups; ++g) {
    const index_t first = (position * p.groups + g) << p.bits;
    const Pick pick =
        sample_row(p, static_cast<const T*>(p.logits) + first, static_cast<std::uint64_t>(first));
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
