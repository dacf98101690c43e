// causal_conv3d: the register tile of float32 products, and rows of split tensors.
// Previous hop: *.simd.cpp only.
// Next hop: common/simd.h.
#pragma once

#include "causal_conv3d/gather.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// Register tiles are arrays; only fully unrolled loops let the compiler keep them in registers.
#define MF_UNROLL _Pragma("GCC unroll 16")

#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// sums[i][:] (+)= sum over k of a[i][k] * b[k][:].
template <int MR, int NV>
inline __attribute__((always_inline)) void multiply(vf (&acc)[MR][NV], const float* const (&a)[MR],
                                                    const float* b, index_t reduce) {
  for (index_t k = 0; k < reduce; ++k, b += NV * kLanes) {
    vf column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * kLanes);
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      const vf pixel = splat(a[i][k]);
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += pixel * column[j];
    }
  }
}

// sums (+)= acc, and acc starts anew: short chains of additions keep float32 as exact as it can be.
template <int MR, int NV>
inline __attribute__((always_inline)) void flush(vf (&acc)[MR][NV], float* sums, bool accumulate) {
  MF_UNROLL
  for (int i = 0; i < MR; ++i) {
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* to = sums + (i * NV + j) * kLanes;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
      acc[i][j] = vf{};
    }
  }
}

template <class T>
T* row_of(const SplitTensor& s, index_t n, index_t t, index_t h) {
  const index_t row = s.width * s.channels, frame = s.height * row;
  if (t < s.early_frames)
    return static_cast<T*>(s.early) + (n * s.early_frames + t) * frame + h * row;
  return static_cast<T*>(s.late) + (n * s.late_frames + t - s.early_frames) * frame + h * row;
}

}  // namespace
}  // namespace MF_ISA
}  // namespace magvit_fast
