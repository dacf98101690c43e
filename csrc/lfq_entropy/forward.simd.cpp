// lfq_entropy forward, one source per instruction set: sample entropies and the sum over positions
// of all code probabilities. Previous hop: cpu.cpp. Next hop: none.
//
// Dense positions: an outer-product micro-kernel over panels of the two half-code tables. A tile is
// 8 x 32; wide registers hold it whole (16 accumulators), narrow ones in parts.
#include "lfq_entropy/group.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

template <class T>
void classify(const LfqEntropyInput& in, int sparse_bits, index_t begin, index_t end,
              std::uint8_t* classes) {
  const T* z = static_cast<const T*>(in.z);
  for (index_t n = begin; n < end; ++n) {
    if (in.mask && !in.mask[n]) {
      classes[n] = kLfqMasked;
      continue;
    }
    const T* at = z + offset_of(in, n);
    int undecided = 0;
    for (index_t c = 0; c < in.channels; ++c) {
      const float x = in.scale * to_float(at[c * in.channel_stride]);
      undecided += !(x > kLfqDecided || x < -kLfqDecided);  // NaN counts as undecided
      if (x != x) undecided += kLfqEntropyMaxChannels;      // and makes its position dense
    }
    classes[n] = undecided <= sparse_bits ? kLfqSparse : kLfqDense;
  }
}

// table[k] = product over the half's channels of the probability of bit d of k.
inline void half_table(const float* member, int first_channel, int channels, index_t padded,
                       float* table) {
  index_t size = 1;
  table[0] = 1.0f;
  for (int d = 0; d < channels; ++d, size *= 2) {
    const float* of_channel = member + 2 * kLfqGroup * (first_channel + d);
    const float minus = of_channel[0], plus = of_channel[kLfqGroup];
    index_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      const vf t = load(table + k);
      store(table + size + k, t * plus);
      store(table + k, t * minus);
    }
    for (; k < size; ++k) {
      table[size + k] = table[k] * plus;
      table[k] *= minus;
    }
  }
  for (index_t k = size; k < padded; ++k) table[k] = 0.0f;
}

constexpr int kTileRows = kLanes == 16 ? 8 : 4;  // as many as the registers hold
constexpr int kTileColumns = 2 * kLanes;

inline void tile(const float* high, const float* low, index_t count, float* out, index_t out_stride,
                 bool add) {
  vf sum[kTileRows][2] = {};
  for (index_t n = 0; n < count; ++n, high += kLfqTileRows, low += kLfqTileColumns) {
    const vf b0 = load(low), b1 = load(low + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      sum[r][0] += high[r] * b0;
      sum[r][1] += high[r] * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r, out += out_stride)
    for (int half = 0; half < 2; ++half) {
      float* to = out + half * kLanes;
      store(to, add ? load(to) + sum[r][half] : sum[r][half]);
    }
}

}  // namespace

void lfq_entropy_classify(const LfqEntropyInput& in, int sparse_bits, index_t begin, index_t end,
                          std::uint8_t* classes) {
  switch (in.dtype) {
    case DType::f32:
      return classify<float>(in, sparse_bits, begin, end, classes);
    case DType::bf16:
      return classify<bf16_t>(in, sparse_bits, begin, end, classes);
    case DType::f16:
      return classify<f16_t>(in, sparse_bits, begin, end, classes);
  }
}

// With e = exp(-|x|): the likelier value has 1 / (1 + e), the other e / (1 + e), and the entropy is
// log(1 + e) + |x| e / (1 + e); nothing cancels, however sure the bit is.
double lfq_entropy_group_bits(const LfqEntropyInput& in, const index_t* order, float* bits) {
  float x[kLfqEntropyMaxChannels * kLfqGroup];
  read_logits(in, order, x);
  double total = 0.0;
  for (index_t m = 0; m < kLfqGroup; m += kLanes) {
    vf present;
    for (int i = 0; i < kLanes; ++i) present[i] = order[m + i] < 0 ? 0.0f : 1.0f;
    vf entropy = {};
    for (index_t c = 0; c < in.channels; ++c) {
      const vf logit = load(x + c * kLfqGroup + m), magnitude = bounded_magnitude(logit);
      const vf e = exp(-magnitude);
      const vf likely = present / (1.0f + e), unlikely = e * likely;
      entropy += log1p(e) * present + magnitude * unlikely;
      float* of_channel = bits + 2 * kLfqGroup * c + m;
      store(of_channel, select(logit > 0.0f, unlikely, likely));
      store(of_channel + kLfqGroup, select(logit > 0.0f, likely, unlikely));
    }
    total += static_cast<double>(sum_lanes(entropy));
  }
  return total;
}

void lfq_entropy_tables(const LfqHalves& h, const float* bits, index_t begin, index_t end,
                        float* high, float* low, float* scratch) {
  for (index_t n = begin; n < end; ++n) {
    const float* member = bits + n / kLfqGroup * lfq_group_floats(h) + n % kLfqGroup;
    half_table(member, 0, h.low_bits, h.padded_columns, scratch);
    for (index_t c = 0; c < h.padded_columns; c += kLfqTileColumns)
      std::memcpy(low + c * kLfqBlock + n * kLfqTileColumns, scratch + c,
                  sizeof(float) * kLfqTileColumns);
    half_table(member, h.low_bits, h.high_bits, h.padded_rows, scratch);
    for (index_t r = 0; r < h.padded_rows; r += kLfqTileRows)
      std::memcpy(high + r * kLfqBlock + n * kLfqTileRows, scratch + r,
                  sizeof(float) * kLfqTileRows);
  }
}

void lfq_entropy_tiles(const LfqHalves& h, const float* high, const float* low, index_t count,
                       bool add, index_t begin, index_t end, float* probs) {
  const index_t row_tiles = h.padded_rows / kLfqTileRows;
  for (index_t t = begin; t < end; ++t) {
    const index_t row = t % row_tiles * kLfqTileRows, column = t / row_tiles * kLfqTileColumns;
    const bool whole = row + kLfqTileRows <= h.rows && column + kLfqTileColumns <= h.columns;
    float edge[kLfqTileRows * kLfqTileColumns];
    float* out = whole ? probs + row * h.columns + column : edge;
    const index_t stride = whole ? h.columns : kLfqTileColumns;
    for (index_t r = 0; r < kLfqTileRows; r += kTileRows)
      for (index_t c = 0; c < kLfqTileColumns; c += kTileColumns)
        tile(high + row * kLfqBlock + r, low + column * kLfqBlock + c, count, out + r * stride + c,
             stride, whole && add);
    if (whole) continue;
    for (index_t r = row; r < h.rows && r < row + kLfqTileRows; ++r)
      for (index_t c = column; c < h.columns && c < column + kLfqTileColumns; ++c) {
        float* to = probs + r * h.columns + c;
        const float sum = edge[(r - row) * kLfqTileColumns + c - column];
        *to = add ? *to + sum : sum;
      }
  }
}

void lfq_entropy_list(const LfqHalves& h, const float* bits, index_t count, index_t begin,
                      index_t end, float* probs, float* scratch) {
  CodeList high, low;
  high.value = scratch;
  low.value = high.value + h.padded_rows;
  high.index = reinterpret_cast<std::int32_t*>(low.value + h.padded_columns);
  low.index = high.index + h.padded_rows;
  for (index_t n = 0; n < count; ++n) {
    const float* member = bits + n / kLfqGroup * lfq_group_floats(h) + n % kLfqGroup;
    low.build(member, 0, h.low_bits);
    high.build(member, h.low_bits, h.high_bits);
    for (index_t i = 0; i < high.count; ++i) {
      if (high.index[i] < begin || high.index[i] >= end) continue;
      float* row = probs + high.index[i] * h.columns;
      for (index_t j = 0; j < low.count; ++j) row[low.index[j]] += high.value[i] * low.value[j];
    }
  }
}

// In blocks of 16 vectors: hundreds of like terms added one by one would lose a digit.
double lfq_entropy_codebook_range(const LfqEntropyCodebookParams& params, index_t begin,
                                  index_t end) {
  const float inverse = static_cast<float>(1.0 / params.stats[1]);
  const float least = params.eps <= 0.0f ? 1e-37f : params.eps;
  const bool shift = params.eps > 0.0f && !params.clamp;
  vf sum = {};
  for (index_t first = begin; first < end; first += 16 * kLanes) {
    const index_t last = end - first < 16 * kLanes ? end : first + 16 * kLanes;
    vf part = {};
    for (index_t k = first; k < last; k += kLanes) {
      const vf p = (last - k >= kLanes ? load(params.probs + k)
                                       : load_some(params.probs + k, static_cast<int>(last - k))) *
                   inverse;
      if (!any(p != 0.0f)) continue;  // most codes of a batch that is sure of its bits
      part -= p * log(shift ? p + params.eps : select(p < least, splat(least), p));
    }
    sum += part;
  }
  return static_cast<double>(sum_lanes(sum));
}

}  // namespace MF_ISA
}  // namespace magvit_fast
