// confidence_remask on the CPU: samples the unknown positions on all threads, then ranks each clip.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "confidence_remask/confidence_remask.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kBlock = 8;  // positions handed out at a time; known ones cost nothing

float choice_gumbel(const ConfidenceRemaskParams& p, index_t position) {
  if (p.choice_noise) return p.choice_noise[position];
  const auto index = static_cast<std::uint64_t>(position);
  const Philox4 draw =
      philox4x32(philox_counter(index, p.step, kChoiceStream), static_cast<std::uint32_t>(p.seed),
                 static_cast<std::uint32_t>(p.seed >> 32));
  return -std::log(-std::log(uniform_open(draw.x[index & 3])));
}

// Confidence of one position into `keys`; false where logits or noise are bad.
template <class Sample>
bool sample_position(const ConfidenceRemaskParams& p, const Sample& sample, index_t position,
                     std::uint64_t* keys) {
  float confidence = 0.0f;
  bool good = sample(p, position, p.new_tokens + position, &confidence);
  if (p.choice_temperature > 0.0f) confidence += p.choice_temperature * choice_gumbel(p, position);
  good = good && confidence == confidence;
  if (!good) p.new_tokens[position] = -1;
  std::uint32_t bits;
  std::memcpy(&bits, &confidence, 4);
  keys[position] = confidence_key(bits, position % p.length);
  return good;
}

// The num_unknown smallest keys of a clip's unknown positions stay unknown.
void rank_clip(const ConfidenceRemaskParams& p, index_t clip, std::uint64_t* keys) {
  const index_t base = clip * p.length;
  std::uint64_t* end = keys + base;
  for (index_t n = 0; n < p.length; ++n) {
    p.new_unknown[base + n] = 0;
    if (p.unknown[base + n]) *end++ = keys[base + n];  // compacts in place: never ahead of n
  }
  const index_t wanted = std::max<index_t>(p.num_unknown[clip], 0);
  std::uint64_t* cut = keys + base + std::min<index_t>(wanted, end - (keys + base));
  if (cut < end) std::nth_element(keys + base, cut, end);
  for (const std::uint64_t* key = keys + base; key < cut; ++key)
    p.new_unknown[base + static_cast<index_t>(*key & 0xffffffffu)] = 1;
}

}  // namespace

void confidence_remask(const ConfidenceRemaskParams& p, const ExecContext& ctx) {
  check(p.groups >= 1 && p.groups <= kConfidenceRemaskMaxGroups,
        "confidence_remask: groups must be in 1..8");
  check(p.bits >= 0 && p.groups * p.bits <= 63, "confidence_remask: at most 63 bits a token");
  check(p.length < (index_t{1} << 32), "confidence_remask: at most 2**32 - 1 positions a clip");
  const auto sample = MF_PICK_SIMD(confidence_remask_sample, ctx.isa);
  auto* keys = static_cast<std::uint64_t*>(p.workspace);
  const index_t positions = p.batch * p.length;
  index_t first_bad = -1;
  parallel_items(ceil_div(positions, kBlock), ctx.num_threads, [&](index_t block, int) {
    const index_t end = std::min(positions, (block + 1) * kBlock);
    for (index_t position = block * kBlock; position < end; ++position) {
      if (!p.unknown[position]) {
        p.new_tokens[position] = p.tokens[position];
      } else if (!sample_position(p, sample, position, keys)) {
#pragma omp critical(magvit_fast_first_bad)
        if (first_bad < 0 || position < first_bad) first_bad = position;
      }
    }
  });
  if (first_bad >= 0) *p.bad = first_bad;
  parallel_items(p.batch, ctx.num_threads, [&](index_t clip, int) { rank_clip(p, clip, keys); });
}

}  // namespace magvit_fast::cpu
