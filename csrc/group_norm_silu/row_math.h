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

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16_t> = true;

// 1 / (1 + exp(-u)), for a result that is stored as T.
template <class T>
inline vf sigmoid(vf u) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  // exp as a power of two, and the reciprocal as an estimate of 14 bits: both to 8e-5 for bfloat16
  // (half a unit in its last place is 2e-3), one term more for float16 (2e-4), and the estimate
  // corrected by a step of Newton's for float32.
  constexpr bool kSingle = sizeof(T) == 4, kCoarse = kIsBf16<T>;
  __m512 t = _mm512_mul_ps((__m512)u, _mm512_set1_ps(-1.44269504088896341f));
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), t);  // in this order NaN comes through
  if constexpr (kSingle) t = _mm512_min_ps(_mm512_set1_ps(126.0f), t);
  const vf n = (vf)_mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = (vf)t - n;
  vf p;
  if constexpr (kSingle) {
    p = splat(1.3276471874e-3f);
    p = p * r + 9.6755413335e-3f;
    p = p * r + 5.5507132739e-2f;
    p = p * r + 2.4022119724e-1f;
    p = p * r + 6.9314696706e-1f;
    p = p * r + 1.0000000717f;
  } else if constexpr (kCoarse) {
    p = splat(5.5171668024e-2f);
    p = p * r + 2.4261112211e-1f;
    p = p * r + 6.9326098565e-1f;
    p = p * r + 9.9992807355e-1f;
  } else {
    p = splat(9.5701017916e-3f);
    p = p * r + 5.5917860310e-2f;
    p = p * r + 2.4024744831e-1f;
    p = p * r + 6.9312181474e-1f;
    p = p * r + 9.9999926144e-1f;
  }
  const vf d = (vf)_mm512_scalef_ps((__m512)p, (__m512)n) + 1.0f;
  const vf estimate = (vf)_mm512_rcp14_ps((__m512)d);
  if constexpr (!kSingle) return estimate;
  return estimate + estimate * (1.0f - d * estimate);
#else
  // Beyond |u| = 87 the result is within one subnormal of the exact one.
  return 1.0f / (1.0f + exp(min(-u, splat(87.0f))));
#endif
}

template <bool kSilu, class T>
inline vf activate(vf u) {
  if constexpr (kSilu) return u * sigmoid<T>(u);
  return u;
}

// d loss / du from dy = d loss / d act(u).
template <bool kSilu, class T>
inline vf through_activation(vf dy, vf u) {
  if constexpr (!kSilu) return dy;
  const vf s = sigmoid<T>(u);
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

// body(row, rows, c, n, tile) for blocks of rows of every tile of channels. A tile is as many
// vectors as may keep their tables and sums in registers, so that memory is read in runs of several
// lines.
template <int kTileVectors, bool kWholeVectors>
struct Tile {
  static constexpr int vectors = kTileVectors;
  static constexpr bool whole = kWholeVectors;
};
template <class Body>
inline void over_tiles(index_t rows, index_t channels, const Body& body) {
  constexpr index_t kRows = 16;
  constexpr int kVectors = 4;
  for (index_t row = 0; row < rows; row += kRows) {
    const index_t count = rows - row < kRows ? rows - row : kRows;
    index_t c = 0;
    for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
      body(row, count, c, kLanes, Tile<kVectors, true>{});
    for (; c + kLanes <= channels; c += kLanes) body(row, count, c, kLanes, Tile<1, true>{});
    if (c < channels) body(row, count, c, static_cast<int>(channels - c), Tile<1, false>{});
  }
}

// The vectors of a table that belong to a tile.
template <class T>
struct TileTable {
  vf at[T::vectors];
  explicit inline TileTable(const float* table) {
    for (int v = 0; v < T::vectors; ++v) at[v] = load(table + v * kLanes);
  }
};

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
