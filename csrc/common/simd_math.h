// exp and log of float32 vectors: polynomials of about one unit in the last place, the same on all
// levels. Previous hop: lfq_entropy and confidence_remask (*.simd.cpp). Next hop: none; no table,
// no library call, so that a loop over them stays in registers.
#pragma once

#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {

static inline vf select(vi condition, vf yes, vf no) { return condition ? yes : no; }

// The lanes where a comparison held, as bits; and whether there is any.
static inline unsigned lane_bits(vi condition) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return static_cast<unsigned>(_mm512_movepi32_mask((__m512i)condition));
#elif defined(MF_ISA_avx2)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)condition));
#elif defined(__x86_64__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)condition));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (condition[i] ? 1u : 0u) << i;
  return bits;
#endif
}
static inline bool any(vi condition) { return lane_bits(condition) != 0; }

// exp(x) for x <= 88; 0 below -87.3 (where float32 leaves its normal range); NaN stays NaN.
static inline vf exp(vf x) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf bounded = x;
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vi tiny = x < -87.3f;
  const vf bounded = select(tiny, splat(-87.3f), x);
  const vf shifted = bounded * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
#endif
  const vf r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  p = (p * r + 1.0f) * r + 1.0f;
  const __mmask16 sizable = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(sizable, (__m512)p, (__m512)n);
#else
  p = p * (r * r) + r + 1.0f;
  const vf scale = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return select(tiny, vf{}, p * scale);
#endif
}

// exp(x) for x <= 88 at fewer instructions: to a relative error of 2e-7 + 2e-8 |x|; 0 for
// -infinity, NaN stays NaN. Several at a time, step by step, so that their chains overlap.
template <int kCount>
static inline void quick_exp(vf* x) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
  __m512 n[kCount];
  vf r[kCount], p[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const __m512 bounded =
        _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x[i]);  // NaN comes through
    n[i] = _mm512_roundscale_ps(_mm512_mul_ps(bounded, log2e),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r[i] = (vf)_mm512_fmsub_ps(bounded, log2e, n[i]);
    p[i] = splat(1.3276471874e-3f);  // 2^r on [-1/2, 1/2], to 7.5e-8
  }
  constexpr float kTerms[] = {9.6755413335e-3f, 5.5507132739e-2f, 2.4022119724e-1f,
                              6.9314696706e-1f, 1.0000000717f};
#pragma GCC unroll 8
  for (int term = 0; term < 5; ++term)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = p[i] * r[i] + kTerms[term];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = (vf)_mm512_scalef_ps((__m512)p[i], n[i]);
#else
  for (int i = 0; i < kCount; ++i) x[i] = exp(x[i]);
#endif
}

// log(x) for normal x > 0; NaN stays NaN. Nothing is promised for zero, subnormals and infinity.
static inline vf log(vf x) {
  const vi bits = (vi)x;
  const vi exponent = (bits - 0x3f3504f3) >> 23;  // the mantissa then lies in [sqrt(1/2), sqrt(2))
  const vf f = (vf)(bits - (exponent << 23)) - 1.0f;
  const vf e = __builtin_convertvector(exponent, vf);
  const vf f2 = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf y = p * f * f2 - e * 2.12194440e-4f - 0.5f * f2;
  return select(x == x, f + y + e * 0.693359375f, x);
}

// log(1 + x) for 0 <= x <= 1, exact to rounding also where 1 + x loses x.
static inline vf log1p(vf x) {
  const vf u = x + 1.0f;
  return log(u) - ((u - 1.0f) - x) / u;
}

}  // namespace MF_ISA
}  // namespace magvit_fast
