// causal_conv3d: vectors of sources for groups of few channels, by storage type.
// Previous hop: grouped.simd.cpp, grouped_weight_grad.simd.cpp only.
// Next hop: common/simd.h.
#pragma once

#include <type_traits>

#include "causal_conv3d/grouped.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// The first n lanes, n <= kLanes; the rest zero.
template <class T>
inline vf load_lanes(const T* p, int n) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return load_some(p, n);
#else
  return n == kLanes ? load(p) : load_some(p, n);
#endif
}

// A value that several products use: the compiler would rather read it from memory for each.
template <class V>
inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Which unit of the vector's pixels stands at each lane, for the k-th unit of its group.
struct Spread {
  vi lane[kMaxUnits];

  explicit Spread(const GroupLanes& l) {
    if (l.source != GroupSource::spread) return;
    for (index_t k = 0; k < l.units; ++k)
      for (index_t i = 0; i < kLanes; ++i) {
        const index_t group = i / l.produce < l.together ? i / l.produce : 0;
        lane[k][i] = static_cast<std::int32_t>(group * l.units + k);
      }
  }
};

// Products of float32, whatever the storage.
template <class Storage>
struct Widened {
  typedef Storage T;
  typedef float Weight;
  typedef vf Vector;
  static constexpr bool kChained = true;  // long sums in short chains
  static constexpr bool kBroadcasts = std::is_same_v<T, float>;
  static Vector source(const T* p) { return load(p); }
  static Vector source(const T* p, int units) { return load_lanes(p, units); }
  static Vector broadcast(const T* p, index_t unit) { return splat(p[unit]); }
  static Vector weights(const Weight* p) { return load(p); }
  static Vector spread(Vector v, vi lanes) { return __builtin_shuffle(v, lanes); }
  static vf multiply_add(vf sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(MF_ISA_avx512_bf16)
// Products of two bfloat16 each.
struct Paired {
  typedef bf16_t T;
  typedef std::uint32_t Weight;
  typedef vi Vector;
  static constexpr bool kBroadcasts = true;
  static constexpr bool kChained = false;  // the rounding of the result is far coarser
  static Vector source(const T* p) { return load_as<vi>(p); }
  static Vector source(const T* p, int units) {
    will_load(p, 2 * units);
    return (vi)_mm512_maskz_loadu_epi32(first_lanes(units), p);
  }
  static Vector broadcast(const T* p, index_t unit) {
    return (vi)_mm512_set1_epi32(load_as<std::int32_t>(p + 2 * unit));
  }
  static Vector weights(const Weight* p) { return load_as<vi>(p); }
  static Vector spread(Vector v, vi lanes) { return __builtin_shuffle(v, lanes); }
  static vf multiply_add(vf sum, Vector a, Vector b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
