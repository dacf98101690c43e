// lfq_entropy, per instruction set: a group's logits, and the short list of a sparse position.
// Previous hop: forward.simd.cpp and backward.simd.cpp.
// Next hop: none.
#pragma once

#include "common/simd_math.h"
#include "lfq_entropy/plan.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr float kNegligible = 1e-30f;

inline index_t offset_of(const LfqEntropyInput& in, index_t position) {
  return position / in.inner * in.outer_stride + position % in.inner * in.inner_stride;
}

template <class T>
inline void read_logits_as(const LfqEntropyInput& in, const index_t* order, float* x) {
  const T* z = static_cast<const T*>(in.z);
  for (index_t m = 0; m < kLfqGroup; ++m) {
    const index_t at = order[m] < 0 ? 0 : offset_of(in, order[m]);
    for (index_t c = 0; c < in.channels; ++c)
      x[c * kLfqGroup + m] =
          order[m] < 0 ? 0.0f : in.scale * to_float(z[at + c * in.channel_stride]);
  }
}

// x [channels][32]: scale * z of a group's members, 0 where there is none.
inline void read_logits(const LfqEntropyInput& in, const index_t* order, float* x) {
  switch (in.dtype) {
    case DType::f32:
      return read_logits_as<float>(in, order, x);
    case DType::bf16:
      return read_logits_as<bf16_t>(in, order, x);
    case DType::f16:
      return read_logits_as<f16_t>(in, order, x);
  }
}

// |x| bounded to where exp(-|x|) leaves float32: infinity would turn 0 * infinity into NaN.
inline vf bounded_magnitude(vf x) {
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  return select(magnitude > 88.0f, splat(88.0f), magnitude);
}

// The codes of one half that a sparse position has: index, probability, and the undecided channels,
// the r-th of which is bit r of an entry's number.
struct CodeList {
  std::int32_t* index;
  float* value;
  index_t count;
  int undecided;
  int channel[kLfqEntropyMaxChannels];

  // member: the group's bits, moved to the member's column. Bit 0 of a code is `first_channel`.
  void build(const float* member, int first_channel, int channels) {
    count = 1;
    undecided = 0;
    index[0] = 0;
    value[0] = 1.0f;
    for (int d = 0; d < channels; ++d) {
      const float* of_channel = member + 2 * kLfqGroup * (first_channel + d);
      const float minus = of_channel[0], plus = of_channel[kLfqGroup];
      const std::int32_t bit = std::int32_t{1} << d;
      if (minus < kNegligible) {
        for (index_t e = 0; e < count; ++e) index[e] |= bit;
      } else if (plus >= kNegligible) {
        for (index_t e = 0; e < count; ++e) {
          index[count + e] = index[e] | bit;
          value[count + e] = value[e] * plus;
          value[e] *= minus;
        }
        count *= 2;
        channel[undecided++] = first_channel + d;
      }
    }
  }
};

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
