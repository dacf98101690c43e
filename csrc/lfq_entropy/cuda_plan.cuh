// lfq_entropy on CUDA: how the workspace is cut and how a half-code's probability is made.
// Previous hop: cuda.cu.
// Next hop: none.
//
// Positions carry a table of bit probabilities [position][channel][sign], zero where not counted.
// The probability of a half code is the product of at most twelve of them, made when a tile is
// loaded: for a tile of 128 codes that is a tenth of the tile's multiplications, and no [positions,
// 2**12] table exists.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "lfq_entropy/lfq_entropy.h"

namespace magvit_fast::cuda {

constexpr int kEntropyThreads = 256, kEntropyBlocks = 512;  // blocks: partial sums of a reduction
constexpr int kEntropyTile = 128, kEntropyDepth = 8;  // codes (or positions) of a tile, its steps
constexpr int kEntropyHalfBits = 12;                  // at most, of the 24 channels

// The channels of one half of the code.
struct HalfCode {
  int first, bits;
  MF_HOST_DEVICE index_t codes() const { return index_t{1} << bits; }
};
inline HalfCode low_half(int channels) { return {0, lfq_entropy_low_bits(channels)}; }
inline HalfCode high_half(int channels) {
  const int low = lfq_entropy_low_bits(channels);
  return {low, channels - low};
}

inline index_t entropy_tiles(index_t count) { return ceil_div(count, index_t{kEntropyTile}); }

// Parts of the sum over positions: enough blocks for two a multiprocessor of 132, parts of at least
// 256. A function of the shape alone, so that the order of summation is the same on every device.
inline index_t entropy_parts(index_t positions, int channels) {
  const index_t tiles =
      entropy_tiles(low_half(channels).codes()) * entropy_tiles(high_half(channels).codes());
  const index_t wanted = ceil_div(index_t{264}, tiles), most = ceil_div(positions, index_t{256});
  const index_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

// Gradients of a half's bits: [tile of its codes][position][bit][sign].
inline index_t half_gradient_floats(index_t positions, const HalfCode& half) {
  return entropy_tiles(half.codes()) * positions * half.bits * 2;
}

// With a null base it only counts.
struct EntropyWorkspace {
  double* partial;  // [kEntropyBlocks][2]
  float* bits;      // [positions][channels][2]
  float* shared;    // forward: parts of probs; backward: slopes and the gradients of both halves
  float *slopes, *low_gradient, *high_gradient;
  index_t bytes;

  EntropyWorkspace(void* base, index_t positions, int channels) {
    char* start = static_cast<char*>(base);
    index_t used = 0;
    const auto take = [&](index_t size) {
      char* at = start == nullptr ? nullptr : start + used;
      used += round_up(size, index_t{256});
      return at;
    };
    const auto floats = [&](index_t count) {
      return reinterpret_cast<float*>(take(count * static_cast<index_t>(sizeof(float))));
    };
    partial =
        reinterpret_cast<double*>(take(kEntropyBlocks * 2 * static_cast<index_t>(sizeof(double))));
    bits = floats(positions * channels * 2);
    const index_t codes = index_t{1} << channels, fork = used;
    shared = floats(entropy_parts(positions, channels) * codes);
    const index_t forward_end = used;
    used = fork;
    slopes = floats(codes);
    low_gradient = floats(half_gradient_floats(positions, low_half(channels)));
    high_gradient = floats(half_gradient_floats(positions, high_half(channels)));
    bytes = used > forward_end ? used : forward_end;
  }
};

// The product of the half's bit probabilities; `bits` points to the position's table.
__device__ __forceinline__ float half_probability(const float* bits, const HalfCode& half,
                                                  int code) {
  float product = 1.0f;
  for (int b = 0; b < half.bits; ++b) product *= bits[(half.first + b) * 2 + ((code >> b) & 1)];
  return product;
}

}  // namespace magvit_fast::cuda
