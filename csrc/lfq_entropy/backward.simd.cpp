// lfq_entropy backward, one source per instruction set: gradients of both entropies for a group.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// With the slope S = d codebook / d P, a member's codebook gradient needs u = S low and v = high S,
// the second and third matrix product; the members are the columns, so that the tables are built
// and the bits are summed without crossing lanes. For bit d of the high half, with w = high * u:
//   d / d logit = (sum of w over codes with bit +) * P(-) - (sum over codes with bit -) * P(+).
#include "lfq_entropy/group.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileColumns = 2 * kLanes;

inline vf slope(vf p, float eps, bool clamp) {
  if (eps > 0.0f && !clamp) return -(log(p + eps) + p / (p + eps));
  if (eps <= 0.0f) return -(log(select(p < 1e-37f, splat(1e-37f), p)) + 1.0f);
  return select(p > eps, -(log(p) + 1.0f), -log(splat(eps)));
}

// table [padded][32]: the half-code table of all members at once.
void half_tables(const float* bits, int first_channel, int channels, index_t padded, float* table) {
  for (index_t m = 0; m < kLfqGroup; m += kLanes) {
    store(table + m, splat(1.0f));
    index_t size = 1;
    for (int d = 0; d < channels; ++d, size *= 2) {
      const float* of_channel = bits + 2 * kLfqGroup * (first_channel + d) + m;
      const vf minus = load(of_channel), plus = load(of_channel + kLfqGroup);
      for (index_t k = 0; k < size; ++k) {
        const vf t = load(table + k * kLfqGroup + m);
        store(table + (size + k) * kLfqGroup + m, t * plus);
        store(table + k * kLfqGroup + m, t * minus);
      }
    }
    for (index_t k = size; k < padded; ++k) store(table + k * kLfqGroup + m, vf{});
  }
}

constexpr index_t kDepth =
    128;  // rows of a table, 16 KiB, that stay in L1 while all slopes pass by

// A tile of the product over `depth` rows of the table, added to what is there unless first.
inline void product_tile(const float* s, const float* t, index_t depth, bool first, float* out) {
  vf sum[kTileRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
    for (int half = 0; half < 2; ++half)
      sum[i][half] = first ? vf{} : load(out + i * kLfqGroup + half * kLanes);
  for (index_t k = 0; k < depth; ++k, s += kLfqTileRows, t += kLfqGroup) {
    const vf t0 = load(t), t1 = load(t + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      sum[i][0] += s[i] * t0;
      sum[i][1] += s[i] * t1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
    for (int half = 0; half < 2; ++half) store(out + i * kLfqGroup + half * kLanes, sum[i][half]);
}

// out [rows][32] = slopes [rows / 8][depth][8] times table [depth][32].
void product(const float* slopes, const float* table, index_t rows, index_t depth, float* out) {
  for (index_t k = 0; k < depth; k += kDepth) {
    const index_t part = depth - k < kDepth ? depth - k : kDepth;
    for (index_t row = 0; row < rows; row += kLfqTileRows)
      for (index_t r = 0; r < kLfqTileRows; r += kTileRows)
        for (index_t c = 0; c < kLfqGroup; c += kTileColumns)
          product_tile(slopes + row * depth + k * kLfqTileRows + r, table + k * kLfqGroup + c, part,
                       k == 0, out + (row + r) * kLfqGroup + c);
  }
}

// grad [channels][32] of the half's logits, from its table and the product; `weights` is used up.
void half_gradient(const float* bits, const float* table, int first_channel, int channels,
                   float* weights, float* grad) {
  for (index_t m = 0; m < kLfqGroup; m += kLanes) {
    for (index_t k = 0; k < index_t{1} << channels; ++k) {
      float* w = weights + k * kLfqGroup + m;
      store(w, load(w) * load(table + k * kLfqGroup + m));
    }
    for (int d = channels - 1; d >= 0; --d) {  // the top bit splits what is left in two
      const index_t half = index_t{1} << d;
      vf minus_sum = {}, plus_sum = {};
      for (index_t k = 0; k < half; ++k) {
        float* w = weights + k * kLfqGroup + m;
        const vf of_minus = load(w), of_plus = load(w + half * kLfqGroup);
        minus_sum += of_minus;
        plus_sum += of_plus;
        store(w, of_minus + of_plus);
      }
      const float* of_channel = bits + 2 * kLfqGroup * (first_channel + d) + m;
      store(grad + (first_channel + d) * kLfqGroup + m,
            plus_sum * load(of_channel) - minus_sum * load(of_channel + kLfqGroup));
    }
  }
}

void dense_gradient(const LfqHalves& h, const float* bits, const float* by_row,
                    const float* by_column, float* scratch, float* grad) {
  float* high = scratch;
  float* low = high + h.padded_rows * kLfqGroup;
  float* weights = low + h.padded_columns * kLfqGroup;
  half_tables(bits, 0, h.low_bits, h.padded_columns, low);
  half_tables(bits, h.low_bits, h.high_bits, h.padded_rows, high);
  product(by_row, low, h.padded_rows, h.padded_columns, weights);
  half_gradient(bits, high, h.low_bits, h.high_bits, weights, grad);
  product(by_column, high, h.padded_columns, h.padded_rows, weights);
  half_gradient(bits, low, 0, h.low_bits, weights, grad);
}

// half_gradient for one member's list.
void list_gradient(const CodeList& list, const float* member, float* weights, float* grad) {
  for (index_t e = 0; e < list.count; ++e) weights[e] *= list.value[e];
  for (int r = list.undecided - 1; r >= 0; --r) {
    const index_t half = index_t{1} << r;
    float minus_sum = 0.0f, plus_sum = 0.0f;
    for (index_t e = 0; e < half; ++e) {
      minus_sum += weights[e];
      plus_sum += weights[half + e];
      weights[e] += weights[half + e];
    }
    const int channel = list.channel[r];
    const float* of_channel = member + 2 * kLfqGroup * channel;
    grad[channel * kLfqGroup] = plus_sum * of_channel[0] - minus_sum * of_channel[kLfqGroup];
  }
}

void sparse_gradient(const LfqEntropyBackwardParams& p, const LfqHalves& h, const float* member,
                     float inverse, float* scratch, float* grad) {
  CodeList high, low;
  float* high_weights = scratch;
  float* low_weights = high_weights + h.padded_rows;
  float* slopes = low_weights + h.padded_columns;
  high.value = slopes + h.padded_columns;
  low.value = high.value + h.padded_rows;
  high.index = reinterpret_cast<std::int32_t*>(low.value + h.padded_columns);
  low.index = high.index + h.padded_rows;
  low.build(member, 0, h.low_bits);
  high.build(member, h.low_bits, h.high_bits);
  for (index_t j = 0; j < low.count; ++j) low_weights[j] = 0.0f;
  for (index_t i = 0; i < high.count; ++i) {
    const float* row = p.probs + high.index[i] * h.columns;
    for (index_t j = 0; j < low.count; ++j) slopes[j] = row[low.index[j]] * inverse;
    for (index_t j = low.count; j < round_up(low.count, index_t{kLanes}); ++j) slopes[j] = 1.0f;
    for (index_t j = 0; j < low.count; j += kLanes)
      store(slopes + j, slope(load(slopes + j), p.eps, p.clamp));
    float sum = 0.0f;
    for (index_t j = 0; j < low.count; ++j) {
      sum += slopes[j] * low.value[j];
      low_weights[j] += slopes[j] * high.value[i];
    }
    high_weights[i] = sum;
  }
  list_gradient(high, member, high_weights, grad);
  list_gradient(low, member, low_weights, grad);
}

template <class T>
void write(const LfqEntropyBackwardParams& p, const index_t* order, const float* grad) {
  T* out = static_cast<T*>(p.grad_z);
  for (index_t m = 0; m < kLfqGroup && order[m] >= 0; ++m) {
    T* at = out + offset_of(p.in, order[m]);
    for (index_t c = 0; c < p.in.channels; ++c)
      at[c * p.in.channel_stride] = from_float<T>(grad[c * kLfqGroup + m]);
  }
}

}  // namespace

void lfq_entropy_slopes(const LfqEntropyBackwardParams& params, const LfqHalves& h, index_t begin,
                        index_t end, float* by_row, float* by_column) {
  const float inverse = static_cast<float>(1.0 / params.stats[1]);
  for (index_t tile = begin; tile < end; ++tile)
    for (index_t c = 0; c < h.padded_columns; c += kLanes) {
      float block[kLfqTileRows][kLanes] = {};
      const index_t present = h.columns - c < kLanes ? h.columns - c : kLanes;
      for (index_t r = 0; r < kLfqTileRows && tile * kLfqTileRows + r < h.rows; ++r) {
        const float* from = params.probs + (tile * kLfqTileRows + r) * h.columns + c;
        if (present == kLanes)
          store(block[r], slope(load(from) * inverse, params.eps, params.clamp));
        else if (present > 0)
          store_some(
              block[r],
              slope(load_some(from, static_cast<int>(present)) * inverse, params.eps, params.clamp),
              static_cast<int>(present));
      }
      for (index_t i = 0; i < kLanes; ++i)
        for (index_t r = 0; r < kLfqTileRows; ++r) {
          const index_t row = tile * kLfqTileRows + r, column = c + i;
          by_row[(tile * h.padded_columns + column) * kLfqTileRows + r] = block[r][i];
          by_column[(column / kLfqTileRows * h.padded_rows + row) * kLfqTileRows +
                    column % kLfqTileRows] = block[r][i];
        }
    }
}

void lfq_entropy_group_backward(const LfqEntropyBackwardParams& params, const LfqHalves& h,
                                const index_t* order, const float* bits, const float* by_row,
                                const float* by_column, float* scratch) {
  float grad[kLfqEntropyMaxChannels * kLfqGroup] = {};
  const float inverse = static_cast<float>(1.0 / params.stats[1]);
  if (by_row) {
    dense_gradient(h, bits, by_row, by_column, scratch, grad);
  } else {
    for (index_t m = 0; m < kLfqGroup && order[m] >= 0; ++m)
      sparse_gradient(params, h, bits + m, inverse, scratch, grad + m);
  }
  float x[kLfqEntropyMaxChannels * kLfqGroup];
  read_logits(params.in, order, x);
  const float unit = params.in.scale * inverse;
  for (index_t c = 0; c < params.in.channels; ++c)
    for (index_t m = 0; m < kLfqGroup; m += kLanes) {
      const float* of_channel = bits + 2 * kLfqGroup * c + m;
      const vf logit = load(x + c * kLfqGroup + m), magnitude = bounded_magnitude(logit);
      // d (binary entropy) / d logit = -logit P(+) P(-)
      const vf sample = select(logit > 0.0f, -magnitude, magnitude) * load(of_channel) *
                        load(of_channel + kLfqGroup);
      float* g = grad + c * kLfqGroup + m;
      store(g, unit * (*params.grad_codebook * load(g) + *params.grad_sample * sample));
    }
  switch (params.in.dtype) {
    case DType::f32:
      return write<float>(params, order, grad);
    case DType::bf16:
      return write<bf16_t>(params, order, grad);
    case DType::f16:
      return write<f16_t>(params, order, grad);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
