// causal_conv3d: packed pixels and the register tile of the weight gradients.
// Previous hop: weight_grad.simd.cpp, point_grad.simd.cpp.
// Next hop: tile.h, common/simd.h.
#pragma once

#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// --- packing: pixels in the order in which the products read them
// -----------------------------------

struct Single {  // float32 products
  typedef float Element;
  static constexpr index_t kRows = 1;  // of a packed line
  // to[i] = a[i] for i < count, zeros up to a whole vector and for null.
  template <class T>
  static void pack(const T* a, const T*, index_t count, float* to) {
    index_t i = 0;
    if (a) {
      for (; i + kLanes <= count; i += kLanes) store(to + i, load(a + i));
      if (i < count) store(to + i, load_some(a + i, static_cast<int>(count - i)));
      return;
    }
    for (; i < count; i += kLanes) store(to + i, vf{});
  }
  typedef vf Vector;
  static Vector vector(const float* p) { return load(p); }
  static Vector scalar(const float* p) { return splat(*p); }
  static vf multiply_add(vf sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(MF_ISA_avx512_bf16)
struct Pair {  // bfloat16 products, two rows at a time: the packed element holds both
  typedef std::uint32_t Element;
  static constexpr index_t kRows = 2;
  static vu bits(const bf16_t* from, index_t left) {
    if (left >= kLanes) return __builtin_convertvector(load_as<vh>(from), vu);
    will_load(from, static_cast<int>(left));
    const __m256i some = _mm256_maskz_loadu_epi16(first_lanes(static_cast<int>(left)), from);
    return (vu)_mm512_cvtepu16_epi32(some);
  }
  static __m512i two_vectors(const bf16_t* from) {
    return from ? load_as<__m512i>(from) : _mm512_setzero_si512();
  }
  static void pack(const bf16_t* a, const bf16_t* b, index_t count, std::uint32_t* to) {
    // 0 32 1 33 ...: the first and the last sixteen of both, side by side
    const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low =
        _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    index_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const __m512i x = two_vectors(a ? a + i : nullptr), y = two_vectors(b ? b + i : nullptr);
      store_as(to + i, _mm512_permutex2var_epi16(x, low, y));
      store_as(to + i + kLanes, _mm512_permutex2var_epi16(x, high, y));
    }
    for (; i < count; i += kLanes) {
      const vu x = a ? bits(a + i, count - i) : vu{}, y = b ? bits(b + i, count - i) : vu{};
      store_as(to + i, x | (y << 16));
    }
  }
  typedef __m512bh Vector;
  static Vector vector(const std::uint32_t* p) { return load_as<__m512bh>(p); }
  static Vector scalar(const std::uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p));
  }
  static vf multiply_add(vf sum, Vector a, Vector b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

// --- products: sums[scalar][vector] += over pixels of scalar * vector
// ---------------------------------

template <class P>
struct Operands {
  const typename P::Element* scalars;
  const typename P::Element* vectors;
  index_t lines, columns;  // pixels
  index_t scalar_line, scalar_step, vector_line, vector_step;
};

template <class P, int MS, int NV>
void add_tile(const Operands<P>& o, float* sums) {
  vf acc[MS][NV] = {};
  for (index_t line = 0; line < o.lines; ++line) {
    const typename P::Element* scalars = o.scalars + line * o.scalar_line;
    const typename P::Element* vectors = o.vectors + line * o.vector_line;
    for (index_t p = 0; p < o.columns; ++p, scalars += o.scalar_step, vectors += o.vector_step) {
      typename P::Vector column[NV];
      MF_UNROLL
      for (int j = 0; j < NV; ++j) column[j] = P::vector(vectors + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MS; ++i) {
        const typename P::Vector scalar = P::scalar(scalars + i);
        MF_UNROLL
        for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(acc[i][j], column[j], scalar);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MS; ++i) {
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {  // one short chain of additions a block of pixels
      float* to = sums + (i * NV + j) * kLanes;
      store(to, load(to) + acc[i][j]);
    }
  }
}

// The most scalars of a tile of so many vectors: what the registers hold.
constexpr int most_scalars(int vectors) {
  if (kVectors == 2) return vectors == 1 ? 12 : 6;
  return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
}

template <class P, int NV, int MS>
void add_some(const Operands<P>& o, index_t scalars, float* sums) {
  if constexpr (MS > 1)
    if (scalars < MS) return add_some<P, NV, MS - 1>(o, scalars, sums);
  add_tile<P, MS, NV>(o, sums);
}

template <class P, int NV>
void add_products(Operands<P> o, index_t scalars, float* sums) {
  constexpr int kMost = most_scalars(NV);
  const index_t tiles = ceil_div(scalars, index_t{kMost});
  for (index_t t = 0; t < tiles; ++t) {
    const index_t first = scalars * t / tiles, end = scalars * (t + 1) / tiles;
    Operands<P> part = o;
    part.scalars += first;
    add_some<P, NV, kMost>(part, end - first, sums + first * NV * kLanes);
  }
}

template <class P>
void add_products(const Operands<P>& o, index_t vectors, index_t scalars, float* sums) {
  switch (vectors) {
    case 1:
      return add_products<P, 1>(o, scalars, sums);
    case 2:
      return add_products<P, 2>(o, scalars, sums);
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
    case 3:
      return add_products<P, 3>(o, scalars, sums);
    default:
      return add_products<P, 4>(o, scalars, sums);
#endif
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
