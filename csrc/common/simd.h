// Vectors of float32 at the width of the level being compiled: one source for 4, 8 and 16 lanes.
// Previous hop: *.simd.cpp only (MF_ISA names the namespace).
// Next hop: compiler vector extensions; intrinsics only where the compiler has no words for it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/shape.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_loadN(void* p, long bytes);  // of the sanitizer's library
extern "C" void __asan_storeN(void* p, long bytes);
#endif

namespace magvit_fast {
namespace MF_ISA {

#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
constexpr int kLanes = 16;
#elif defined(MF_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t vh __attribute__((vector_size(kLanes * 2)));

static inline vf splat(float x) { return x - vf{}; }

template <class V>
static inline V load_as(const void* p) {  // unaligned
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// The address sanitizer does not see what masked instructions read and write: it is told before.
template <class T>
static inline void will_load(const T* p, int n) {
#ifdef __SANITIZE_ADDRESS__
  if (n > 0) __asan_loadN(const_cast<T*>(p), static_cast<long>(sizeof(T)) * n);
#else
  (void)p, (void)n;
#endif
}
template <class T>
static inline void will_store(T* p, int n) {
#ifdef __SANITIZE_ADDRESS__
  if (n > 0) __asan_storeN(p, static_cast<long>(sizeof(T)) * n);
#else
  (void)p, (void)n;
#endif
}

static inline vf load(const float* p) { return load_as<vf>(p); }
static inline vf load(const bf16_t* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
static inline vf load(const f16_t* p) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(MF_ISA_avx2)
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

static inline void store(float* p, vf v) { store_as(p, v); }
static inline void store(bf16_t* p, vf v) {
#if defined(MF_ISA_avx512_bf16)
  // The instruction flushes subnormals (class bit 0x20), and all levels must agree.
  if (_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0) [[likely]]
    return store_as(p, _mm512_cvtneps_pbh((__m512)v));
#endif
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vi is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  const vu bits = is_nan ? quiet : rounded;
  store_as(p, __builtin_convertvector(bits, vh));
}
static inline void store(f16_t* p, vf v) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(MF_ISA_avx2)
  store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16_t>(v[i]);
#endif
}

// The first n lanes (n < kLanes); the rest are zero on loading and untouched on storing.
template <class T>
static inline vf load_some(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, sizeof(T) * static_cast<unsigned>(n));
  return load(buffer);
}
template <class T>
static inline void store_some(T* p, vf v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, sizeof(T) * static_cast<unsigned>(n));
}

#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
// The same with the masks of this level: a copy of unknown length is a call.
static inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
static inline vf load_some(const float* p, int n) {
  will_load(p, n);
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
static inline vf load_some(const bf16_t* p, int n) {
  will_load(p, n);
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static inline vf load_some(const f16_t* p, int n) {
  will_load(p, n);
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
static inline void store_some(float* p, vf v, int n) {
  will_store(p, n);
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
static inline void store_some(bf16_t* p, vf v, int n) {
  will_store(p, n);
  bf16_t all[kLanes];
  store(all, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), load_as<__m256i>(all));
}
static inline void store_some(f16_t* p, vf v, int n) {
  will_store(p, n);
  f16_t all[kLanes];
  store(all, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), load_as<__m256i>(all));
}
#endif

static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
// Over all lanes, by halves.
template <class Op>
static inline float over_lanes(vf v, const Op& op) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    v = op(v, __builtin_shuffle(v, (lane + half) & (kLanes - 1)));
  return v[0];
}
static inline float sum_lanes(vf v) {
  return over_lanes(v, [](vf a, vf b) { return a + b; });
}
static inline float max_lanes(vf v) { return over_lanes(v, max); }
static inline float min_lanes(vf v) { return over_lanes(v, min); }

}  // namespace MF_ISA
}  // namespace magvit_fast
