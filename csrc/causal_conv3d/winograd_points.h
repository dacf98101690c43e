// causal_conv3d: Winograd's one-dimensional transforms F(2,3) and F(4,3) on vectors.
// Previous hop: winograd_*.simd.cpp only.
// Next hop: common/simd.h.
//
// F(4,3) at the points 0, +-1/sqrt(2), +-sqrt(2), infinity errs a third as much as at 0, +-1, +-2.
// Scale factors all stand in the transform of the results, so weights and sources need none.
// Strides are in vectors.
#pragma once

#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  template <int S, int R>
  static inline __attribute__((always_inline)) void sources(const vf* d, vf* v) {
    v[0 * R] = d[2 * S] - d[0 * S];
    v[1 * R] = d[2 * S] + d[1 * S];
    v[2 * R] = d[2 * S] - d[1 * S];
    v[3 * R] = d[3 * S] - d[1 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void weights(const vf* g, vf* u) {
    const vf even = g[0 * S] + g[2 * S];
    u[0 * R] = g[0 * S];
    u[1 * R] = even + g[1 * S];
    u[2 * R] = even - g[1 * S];
    u[3 * R] = g[2 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void results(const vf* m, vf* y) {
    y[0 * R] = splat(0.5f) * (m[1 * S] + m[2 * S]) - m[0 * S];
    y[1 * R] = splat(0.5f) * (m[1 * S] - m[2 * S]) + m[3 * S];
  }
  // The transposes of the last two, for the weight gradient.
  template <int S, int R>
  static inline __attribute__((always_inline)) void from_results(const vf* y, vf* m) {
    m[0 * R] = -y[0 * S];
    m[1 * R] = splat(0.5f) * (y[0 * S] + y[1 * S]);
    m[2 * R] = splat(0.5f) * (y[0 * S] - y[1 * S]);
    m[3 * R] = y[1 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void from_weights(const vf* u, vf* g) {
    const vf sum = u[1 * S] + u[2 * S];
    g[0 * R] = u[0 * S] + sum;
    g[1 * R] = u[1 * S] - u[2 * S];
    g[2 * R] = sum + u[3 * S];
  }
};

template <>
struct Winograd<4> {
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  static constexpr float p = -2.0f / 3.0f, q = 1.0f / 6.0f;

  template <int S, int R>
  static inline __attribute__((always_inline)) void sources(const vf* d, vf* v) {
    const vf even1 = d[4 * S] - splat(2.0f) * d[2 * S];
    const vf odd1 = d[3 * S] - splat(2.0f) * d[1 * S];
    const vf even2 = d[4 * S] - splat(0.5f) * d[2 * S];
    const vf odd2 = d[3 * S] - splat(0.5f) * d[1 * S];
    v[0 * R] = (d[0 * S] + d[4 * S]) - splat(2.5f) * d[2 * S];
    v[1 * R] = even1 + splat(a) * odd1;
    v[2 * R] = even1 - splat(a) * odd1;
    v[3 * R] = even2 + splat(b) * odd2;
    v[4 * R] = even2 - splat(b) * odd2;
    v[5 * R] = (d[1 * S] + d[5 * S]) - splat(2.5f) * d[3 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void weights(const vf* g, vf* u) {
    const vf even1 = g[0 * S] + splat(0.5f) * g[2 * S];
    const vf even2 = g[0 * S] + splat(2.0f) * g[2 * S];
    u[0 * R] = g[0 * S];
    u[1 * R] = even1 + splat(a) * g[1 * S];
    u[2 * R] = even1 - splat(a) * g[1 * S];
    u[3 * R] = even2 + splat(b) * g[1 * S];
    u[4 * R] = even2 - splat(b) * g[1 * S];
    u[5 * R] = g[2 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void results(const vf* m, vf* y) {
    const vf sum1 = m[1 * S] + m[2 * S], dif1 = m[1 * S] - m[2 * S];
    const vf sum2 = m[3 * S] + m[4 * S], dif2 = m[3 * S] - m[4 * S];
    y[0 * R] = (m[0 * S] + splat(p) * sum1) + splat(q) * sum2;
    y[1 * R] = splat(p * a) * dif1 + splat(q * b) * dif2;
    y[2 * R] = splat(p * 0.5f) * sum1 + splat(q * 2.0f) * sum2;
    y[3 * R] = (m[5 * S] + splat(p * a * 0.5f) * dif1) + splat(q * b * 2.0f) * dif2;
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void from_results(const vf* y, vf* m) {
    const vf even1 = splat(p) * y[0 * S] + splat(p * 0.5f) * y[2 * S];
    const vf odd1 = splat(p * a) * y[1 * S] + splat(p * a * 0.5f) * y[3 * S];
    const vf even2 = splat(q) * y[0 * S] + splat(q * 2.0f) * y[2 * S];
    const vf odd2 = splat(q * b) * y[1 * S] + splat(q * b * 2.0f) * y[3 * S];
    m[0 * R] = y[0 * S];
    m[1 * R] = even1 + odd1;
    m[2 * R] = even1 - odd1;
    m[3 * R] = even2 + odd2;
    m[4 * R] = even2 - odd2;
    m[5 * R] = y[3 * S];
  }
  template <int S, int R>
  static inline __attribute__((always_inline)) void from_weights(const vf* u, vf* g) {
    const vf sum1 = u[1 * S] + u[2 * S], sum2 = u[3 * S] + u[4 * S];
    g[0 * R] = u[0 * S] + sum1 + sum2;
    g[1 * R] = splat(a) * (u[1 * S] - u[2 * S]) + splat(b) * (u[3 * S] - u[4 * S]);
    g[2 * R] = u[5 * S] + splat(0.5f) * sum1 + splat(2.0f) * sum2;
  }
};

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
