// lfq_entropy on CUDA: how the work is cut into tiles and what the workspace holds.
// Previous hop: cuda.cu and cuda_backward.cu.
// Next hop: none.
#pragma once

#include "common/cuda/launch.cuh"
#include "lfq_entropy/lfq_entropy.h"

namespace magvit_fast::cuda {

constexpr int kEntropyThreads = 256, kEntropyBlocks = 512;  // of the kernels without products
constexpr int kEntropyTile = 128, kEntropyDepth = 32;  // codes or positions of a tile; a step's sum
constexpr int kEntropyTileBits = 7;
constexpr int kEntropyHalfBits = 12;  // at most, of the 24 channels

// The channels of one half of the code. A half of fewer bits than a tile gets bits that are always
// minus: the codes beyond its last have probability 0.
struct HalfCode {
  int first, bits;
  MF_HOST_DEVICE int codes() const { return 1 << bits; }
  MF_HOST_DEVICE int padded_bits() const {
    return bits < kEntropyTileBits ? kEntropyTileBits : bits;
  }
  MF_HOST_DEVICE int padded_codes() const { return 1 << padded_bits(); }
  MF_HOST_DEVICE int tiles() const { return padded_codes() / kEntropyTile; }
};

// Both halves, and the places of their bits in shared memory: low first.
struct HalfCodes {
  HalfCode low, high;
  explicit HalfCodes(int channels)
      : low{0, lfq_entropy_low_bits(channels)}, high{low.bits, channels - low.bits} {}
  MF_HOST_DEVICE int places() const { return low.padded_bits() + high.padded_bits(); }
  // The channel at a place, or -1 where there is none.
  MF_HOST_DEVICE int channel_at(int place) const {
    if (place < low.padded_bits()) return place < low.bits ? place : -1;
    const int bit = place - low.padded_bits();
    return bit < high.bits ? high.first + bit : -1;
  }
};

// The sum over positions is cut into runs: two blocks for each of about 128 multiprocessors, runs
// of at least 128. A function of the shape alone, so that the order of summation is the same on
// every device.
struct EntropyRuns {
  index_t count, length;
  EntropyRuns(index_t positions, const HalfCodes& halves) {
    const index_t tiles = index_t{halves.low.tiles()} * halves.high.tiles();
    const index_t wanted = ceil_div(index_t{256}, tiles), most = ceil_div(positions, index_t{128});
    const index_t runs = wanted < most ? wanted : most;
    length = round_up(ceil_div(positions, runs < 1 ? 1 : runs), index_t{kEntropyDepth});
    count = length > 0 ? ceil_div(positions, length) : 1;
  }
};

// Two steps of two operands of float16, with remainders for full precision.
constexpr std::size_t product_shared_bytes(bool full_precision) {
  return 2 * 2 * kEntropyTile * kEntropyDepth * 2 * (full_precision ? 2 : 1);
}

// With a null base it only counts.
struct EntropyWorkspace {
  double* partial;  // [blocks][2], of a reduction
  float* parts;     // forward: [runs][codes]
  unsigned short*
      slopes;       // backward: [2: high, low part][padded high codes][padded low codes], float16
  float* gradient;  // backward: [tile of low, then high codes][bit][sign][position]
  index_t bytes;

  EntropyWorkspace(void* base, index_t positions, const HalfCodes& halves) {
    char* start = static_cast<char*>(base);
    index_t used = 0;
    const auto take = [&](index_t size) {
      char* at = start == nullptr ? nullptr : start + used;
      used += round_up(size, index_t{256});
      return at;
    };
    const EntropyRuns runs(positions, halves);
    const index_t tiles = index_t{halves.low.tiles()} * halves.high.tiles();
    const index_t codes = index_t{1} << (halves.low.bits + halves.high.bits);
    const index_t sums = runs.count * tiles > kEntropyBlocks ? runs.count * tiles : kEntropyBlocks;
    partial = reinterpret_cast<double*>(take(sums * 2 * index_t{sizeof(double)}));
    const index_t fork = used;
    parts = reinterpret_cast<float*>(take(runs.count * codes * index_t{sizeof(float)}));
    const index_t forward_end = used;
    used = fork;
    slopes = reinterpret_cast<unsigned short*>(
        take(2 * index_t{halves.low.padded_codes()} * halves.high.padded_codes() * 2));
    gradient = reinterpret_cast<float*>(take((index_t{halves.low.tiles()} * halves.low.bits +
                                              index_t{halves.high.tiles()} * halves.high.bits) *
                                             2 * positions * index_t{sizeof(float)}));
    bytes = used > forward_end ? used : forward_end;
  }
};

}  // namespace magvit_fast::cuda
