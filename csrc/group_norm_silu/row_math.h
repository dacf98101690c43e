// group_norm_silu: the arithmetic of one vector of channels, shared by both directions.
// Previous hop: kernels.simd.cpp, backward.simd.cpp, planes.simd.cpp.
// Next hop: common/simd_math.h.
#pragma once

#include "common/simd_math.h"
#include "group_norm_silu/group_norm_silu.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// A vector of channels: all lanes, or the first n of the last vector.
template <bool kWhole, class T>
inline vf get(const T* p, int n) {
  if constexpr (kWhole) return load(p);
  return load_some(p, n);
}
template <bool kWhole, class T>
inline void put(T* p, vf v, int n) {
  if constexpr (kWhole) return store(p, v);
  store_some(p, v, n);
}

// 1 / (1 + exp(-u)); beyond |u| = 87 the result is within one subnormal of the exact one.
inline vf sigmoid(vf u) { return 1.0f / (1.0f + exp(min(-u, splat(87.0f)))); }

template <bool kSilu>
inline vf activate(vf u) {
  if constexpr (kSilu) return u * sigmoid(u);
  return u;
}

// d loss / du from dy = d loss / d act(u).
template <bool kSilu>
inline vf through_activation(vf dy, vf u) {
  if constexpr (!kSilu) return dy;
  const vf s = sigmoid(u);
  return dy * (s * (1.0f + u * (1.0f - s)));
}

// norm(x) * weight + bias = (x - center) * gain + offset, a table of each over the channels.
struct Affine {
  float *center, *gain, *offset;

  Affine(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, const GroupStats* stats,
         float* scratch)
      : center(scratch),
        gain(scratch + plan.padded_channels),
        offset(scratch + 2 * plan.padded_channels) {
    const index_t size = in.channels / in.groups;
    for (index_t c = 0; c < in.channels; ++c) {
      const GroupStats& s = stats[c / size];
      const float slope = s.rstd * (in.weight ? in.weight[c] : 1.0f);
      center[c] = s.mean;
      gain[c] = slope;
      offset[c] = (in.bias ? in.bias[c] : 0.0f) - s.mean_rest * slope;
    }
  }
};

// dx = dn * gain - (x - center) * slant - level
struct Terms {
  float *slant, *level;

  Terms(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, const GroupStats* stats,
        const float* terms, float* scratch)
      : slant(scratch + 3 * plan.padded_channels), level(scratch + 4 * plan.padded_channels) {
    const index_t size = in.channels / in.groups;
    for (index_t c = 0; c < in.channels; ++c) {
      const index_t g = c / size;
      const float r = stats[g].rstd;
      slant[c] = r * r * terms[2 * g + 1];
      level[c] = r * terms[2 * g] - stats[g].mean_rest * slant[c];
    }
  }
};

// Where the scale and shift of position (h, w) of a slab lie.
template <class T>
struct Condition {
  const T *scale, *shift;
  const GroupNormSiluInput& in;

  Condition(const GroupNormSiluInput& input, const GroupNormSiluSlab& slab) : in(input) {
    const index_t cell = (slab.time + in.skipped) / in.cell[0];
    scale = static_cast<const T*>(in.scale) + slab.batch * in.scale_stride[0] +
            cell * in.scale_stride[1];
    shift = static_cast<const T*>(in.shift) + slab.batch * in.shift_stride[0] +
            cell * in.shift_stride[1];
  }
  const T* scale_at(index_t h, index_t w) const {
    return scale + h / in.cell[1] * in.scale_stride[2] + w / in.cell[2] * in.scale_stride[3];
  }
  const T* shift_at(index_t h, index_t w) const {
    return shift + h / in.cell[1] * in.shift_stride[2] + w / in.cell[2] * in.shift_stride[3];
  }
};

// body(c, n, whole) for every vector of channels; `whole` is a compile-time bool.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <class Body>
inline void over_channels(index_t channels, const Body& body) {
  index_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, kLanes, Yes{});
  if (c < channels) body(c, static_cast<int>(channels - c), No{});
}

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
