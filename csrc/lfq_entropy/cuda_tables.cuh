// lfq_entropy on CUDA: half-code probabilities as operands of tensor cores, and their product.
// Previous hop: cuda.cu and cuda_backward.cu.
// Next hop: mma.sync and ldmatrix through common/cuda/ptx.cuh.
//
// A value enters as a float16 of 11 bits and, for full precision, a second float16 with what the
// first left out: 22 bits together, and nothing finer than 2^-40 of a probability (the values are
// scaled so that 1 is 2^15). Of the four products of two such pairs the one of both small parts,
// 2^-22 of the result, is left out. Sums are float32.
#pragma once

#include <cuda_fp16.h>

#include "common/cuda/ptx.cuh"
#include "common/cuda/tile.h"
#include "lfq_entropy/cuda_plan.cuh"

namespace magvit_fast::cuda {

constexpr int kProductThreads = 128;  // four warps, 64 x 64 of a tile of 128 x 128 each
constexpr float kProbabilityScale = 32768.0f;
constexpr float kSlopeScale = 512.0f;  // slopes lie within +-105
constexpr int kOperandElements = kEntropyTile * kEntropyDepth;

// (minus, plus): the probabilities of a bit with logit a. Both exact where they are small.
__device__ __forceinline__ float2 bit_probabilities(float a) {
  const float small = expf(-fabsf(a));
  const float larger = 1.0f / (1.0f + small), smaller = small * larger;
  return a >= 0.0f ? make_float2(smaller, larger) : make_float2(larger, smaller);
}

// Two values as float16, and with kFull what that rounding left out.
template <bool kFull>
__device__ __forceinline__ void split_pair(float first, float second, std::uint32_t& main,
                                           std::uint32_t& rest) {
  if constexpr (kFull) {
    const float a = __uint_as_float((__float_as_uint(first) + 0x1000u) & 0xffffe000u);
    const float b = __uint_as_float((__float_as_uint(second) + 0x1000u) & 0xffffe000u);
    main = pack_half_pair(a, b);
    rest = pack_half_pair(first - a, second - b);
  } else {
    main = pack_half_pair(first, second);
    rest = 0;
  }
}

// An operand in shared memory: 128 lines x 32 depths (the sum's index), stored line by line
// (kUpright) or depth by depth; with kFull the remainders follow.
template <bool kFull>
constexpr int operand_elements() {
  return kFull ? 2 * kOperandElements : kOperandElements;
}

// Probabilities of 32 neighboring codes of one position from `first` on, in four chunks of eight:
// store(chunk, main, rest). `bits` holds the position's (minus, plus), `stride` apart.
template <bool kFull, class Store>
__device__ __forceinline__ void make_probabilities(const float2* bits, int stride, int count,
                                                   int first, const Store& store) {
  float base = kProbabilityScale;
  for (int b = 5; b < count; ++b) {
    const float2 p = bits[b * stride];
    base *= (first >> b) & 1 ? p.y : p.x;
  }
  float2 p[5];
#pragma unroll
  for (int b = 0; b < 5; ++b) p[b] = bits[b * stride];
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    float value[8];
    value[0] = base * (chunk & 1 ? p[3].y : p[3].x) * (chunk & 2 ? p[4].y : p[4].x);
#pragma unroll
    for (int b = 0; b < 3; ++b)
#pragma unroll
      for (int e = 0; e < 1 << b; ++e) {
        value[e + (1 << b)] = value[e] * p[b].y;
        value[e] *= p[b].x;
      }
    uint4 main, rest;
    split_pair<kFull>(value[0], value[1], main.x, rest.x);
    split_pair<kFull>(value[2], value[3], main.y, rest.y);
    split_pair<kFull>(value[4], value[5], main.z, rest.z);
    split_pair<kFull>(value[6], value[7], main.w, rest.w);
    store(chunk, main, rest);
  }
}

// Puts eight neighboring elements at a chunk of an operand.
template <bool kFull>
__device__ __forceinline__ void put_chunk(__half* operand, int at, const uint4& main,
                                          const uint4& rest) {
  *reinterpret_cast<uint4*>(operand + at * 8) = main;
  if constexpr (kFull) *reinterpret_cast<uint4*>(operand + kOperandElements + at * 8) = rest;
}

// The fragment of lines [line, line + 16) and depths [depth, depth + 16); kLeft: as the product's
// left factor.
template <bool kUpright, bool kLeft>
__device__ __forceinline__ void load_fragment(std::uint32_t (&fragment)[4], const __half* operand,
                                              int line, int depth) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Upright, a left factor's second matrix is the next eight lines, a right factor's the next eight
  // depths; on its side the other way round, as rows are then depths.
  const LaneAddress at = kUpright == kLeft ? rows_first(lane) : chunks_first(lane);
  if constexpr (kUpright)
    load_matrix(fragment,
                operand + chunk_at<kEntropyDepth / 8>(line + at.row, depth / 8 + at.chunk) * 8);
  else
    load_matrix_transposed(
        fragment, operand + chunk_at<kEntropyTile / 8>(depth + at.row, line / 8 + at.chunk) * 8);
}

// sum += left x right over one step's depth, for this warp's 64 x 64.
template <bool kFull, bool kLeftUpright, bool kRightUpright>
__device__ __forceinline__ void multiply_step(const __half* left, const __half* right, int row,
                                              int column, float (&sum)[4][8][4]) {
#pragma unroll(kFull ? 1 : 2)  // fragments of both at once would spill
  for (int depth = 0; depth < kEntropyDepth; depth += 16) {
    std::uint32_t a[4][4], a_rest[kFull ? 4 : 1][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_fragment<kLeftUpright, true>(a[i], left, row + i * 16, depth);
      if constexpr (kFull)
        load_fragment<kLeftUpright, true>(a_rest[i], left + kOperandElements, row + i * 16, depth);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t b[4];
      load_fragment<kRightUpright, false>(b, right, column + j * 16, depth);
      if constexpr (kFull) {
        // Small products first; products of one sum are eight apart, so that none waits for
        // another.
        std::uint32_t b_rest[4];
        load_fragment<kRightUpright, false>(b_rest, right + kOperandElements, column + j * 16,
                                            depth);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          multiply_accumulate<__half>(sum[i / 2][j * 2 + i % 2], a[i / 2], b_rest[i % 2 * 2],
                                      b_rest[i % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          multiply_accumulate<__half>(sum[i / 2][j * 2 + i % 2], a_rest[i / 2], b[i % 2 * 2],
                                      b[i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply_accumulate<__half>(sum[i / 2][j * 2 + i % 2], a[i / 2], b[i % 2 * 2],
                                    b[i % 2 * 2 + 1]);
    }
  }
}

}  // namespace magvit_fast::cuda
