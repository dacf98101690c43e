// lfq_entropy on the CPU: how the work is cut, and the kernels that one thread runs.
// Previous hop: cpu.cpp.
// Next hop: forward.simd.cpp and backward.simd.cpp of the chosen instruction set.
//
// Positions are put in order: first the dense ones, in groups of 32, then the sparse ones. A bit is
// undecided if both its values have a probability above 1e-30; a position with few undecided bits
// has few codes, so that listing them is cheaper than a row of the matrix product (and equal to it:
// what is left out is below 1e-30). At temperature 0.01 nearly all positions of a trained tokenizer
// are sparse.
#pragma once

#include "lfq_entropy/lfq_entropy.h"

namespace magvit_fast {

constexpr index_t kLfqGroup = 32;    // positions of a group: the columns of a tile going backward
constexpr index_t kLfqTileRows = 8;  // a tile of the product: 8 rows by 32 columns
constexpr index_t kLfqTileColumns = 32;
constexpr index_t kLfqBlock = 4 * kLfqGroup;  // positions whose tables exist at a time
constexpr float kLfqDecided = 69.0f;  // |logit| beyond which a bit is decided: exp(-69) = 1e-30
constexpr std::uint8_t kLfqMasked = 0, kLfqDense = 1, kLfqSparse = 2;

// The halves of a code and their padded sizes.
struct LfqHalves {
  int channels, low_bits, high_bits;
  index_t columns, rows;                // 2**low_bits, 2**high_bits
  index_t padded_columns, padded_rows;  // whole tiles

  explicit LfqHalves(index_t d)
      : channels(static_cast<int>(d)),
        low_bits(lfq_entropy_low_bits(static_cast<int>(d))),
        high_bits(channels - low_bits),
        columns(index_t{1} << low_bits),
        rows(index_t{1} << high_bits),
        padded_columns(round_up(columns, kLfqTileColumns)),
        padded_rows(round_up(rows, kLfqTileRows)) {}

  // A position is listed where its undecided bits are at most this many: measured break-even.
  int sparse_bits() const { return channels - 6; }
};

// The probabilities of one group: bits[(2 * channel + sign) * 32 + member], sign 1 = plus.
inline index_t lfq_group_floats(const LfqHalves& h) { return 2 * kLfqGroup * h.channels; }

// Per-thread scratch of the backward pass, in floats.
inline index_t lfq_backward_scratch_floats(const LfqHalves& h) {
  const index_t larger = h.padded_rows > h.padded_columns ? h.padded_rows : h.padded_columns;
  return (h.padded_rows + h.padded_columns + larger) * kLfqGroup;
}

// Sorts positions [begin, end) into masked, dense and sparse.
MF_DECLARE_SIMD(void, lfq_entropy_classify,
                (const LfqEntropyInput& in, int sparse_bits, index_t begin, index_t end,
                 std::uint8_t* classes))
// The probabilities of a group's members (order[m] is a position, or -1: probability 0 everywhere);
// returns the sum of their sample entropies.
MF_DECLARE_SIMD(double, lfq_entropy_group_bits,
                (const LfqEntropyInput& in, const index_t* order, float* bits))
// Half-code tables of members [begin, end) of a block, into panels of tiles:
// high [padded_rows / 8][block][8], low [padded_columns / 32][block][32].
MF_DECLARE_SIMD(void, lfq_entropy_tables,
                (const LfqHalves& h, const float* bits, index_t begin, index_t end, float* high,
                 float* low, float* scratch))
// Tiles [begin, end), numbered column by column, of probs (+)= high^T low over `count` members.
MF_DECLARE_SIMD(void, lfq_entropy_tiles,
                (const LfqHalves& h, const float* high, const float* low, index_t count, bool add,
                 index_t begin, index_t end, float* probs))
// Adds the codes of `count` sparse positions to rows [begin, end) of probs.
MF_DECLARE_SIMD(void, lfq_entropy_list,
                (const LfqHalves& h, const float* bits, index_t count, index_t begin, index_t end,
                 float* probs, float* scratch))
// The share of codes [begin, end) in the entropy.
MF_DECLARE_SIMD(double, lfq_entropy_codebook_range,
                (const LfqEntropyCodebookParams& params, index_t begin, index_t end))
// The slopes of row tiles [begin, end), packed for both products:
// by_row [padded_rows / 8][padded_columns][8], by_column [padded_columns / 8][padded_rows][8].
MF_DECLARE_SIMD(void, lfq_entropy_slopes,
                (const LfqEntropyBackwardParams& params, const LfqHalves& h, index_t begin,
                 index_t end, float* by_row, float* by_column))
// Writes the gradient of a group's members; slopes null: the group is sparse.
MF_DECLARE_SIMD(void, lfq_entropy_group_backward,
                (const LfqEntropyBackwardParams& params, const LfqHalves& h, const index_t* order,
                 const float* bits, const float* by_row, const float* by_column, float* scratch))

}  // namespace magvit_fast
