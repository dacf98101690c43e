// group_norm_silu forward, one source per instruction set: moments of a slab, and the result.
// Previous hop: cpu.cpp.
// Next hop: row_math.h.
//
// Moments: blocks of rows that fit in L1, two passes each (mean, then squared deviations from it),
// merged by Chan's formula; all of it relative to the first block's mean, so that a large mean
// costs no digits. The result: one pass, one exp and one reciprocal a value, as exact as its type.
#include "group_norm_silu/row_math.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kBlockBytes = 16384, kMaxBlockRows = 64, kMinBlockRows = 8;
constexpr int kTile = 8;  // vectors of channels whose sums stay in registers

// Sums over `rows` of kVectors vectors of channels of (x - pivot), or with kSquares of
// (x - pivot - mean)^2.
template <bool kSquares, int kVectors, bool kWhole, class T>
inline void column_sums(const T* x, index_t rows, index_t stride, int n, const float* pivot,
                        const float* mean, vf* sums) {
  vf sum[kVectors] = {}, from[kVectors];
  for (int v = 0; v < kVectors; ++v) from[v] = load(pivot + v * kLanes);
  for (index_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const vf d = get<kWhole>(x + r * stride + v * kLanes, n) - from[v];
      if constexpr (kSquares) {
        const vf e = d - load(mean + v * kLanes);
        sum[v] += e * e;
      } else {
        sum[v] += d;
      }
    }
  for (int v = 0; v < kVectors; ++v) sums[v] = sum[v];
}

// One block of one tile: its moments merged into those of the `seen` rows before it.
template <int kVectors, bool kWhole, class T>
inline void block_moments(const T* x, index_t rows, index_t stride, int n, index_t seen,
                          float* pivot, float* block_mean, float* mean, float* squares) {
  vf sum[kVectors], square[kVectors];
  const float share = 1.0f / static_cast<float>(rows);
  if (seen == 0) {
    for (int v = 0; v < kVectors; ++v) store(pivot + v * kLanes, vf{});
    column_sums<false, kVectors, kWhole>(x, rows, stride, n, pivot, nullptr, sum);
    for (int v = 0; v < kVectors; ++v) store(pivot + v * kLanes, sum[v] * share);
  }
  column_sums<false, kVectors, kWhole>(x, rows, stride, n, pivot, nullptr, sum);
  for (int v = 0; v < kVectors; ++v) store(block_mean + v * kLanes, sum[v] * share);
  column_sums<true, kVectors, kWhole>(x, rows, stride, n, pivot, block_mean, square);
  const auto before = static_cast<float>(seen), now = static_cast<float>(rows);
  const float weight = now / (before + now);
  for (int v = 0; v < kVectors; ++v) {
    float *m = mean + v * kLanes, *q = squares + v * kLanes;
    const vf old_mean = seen ? load(m) : vf{}, old_squares = seen ? load(q) : vf{};
    const vf delta = sum[v] * share - old_mean;
    store(m, old_mean + delta * weight);
    store(q, old_squares + square[v] + delta * delta * (before * weight));
  }
}

template <class T>
void moments(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t index,
             float* scratch, double* out) {
  const GroupNormSiluSlab slab(in, plan, index);
  const index_t channels = in.channels, rows = (slab.last - slab.first) * in.width;
  const T* x = static_cast<const T*>(in.x) + slab.frame * in.frame_elements() +
               slab.first * in.width * channels;
  float* pivot = scratch;
  float *block = pivot + plan.padded_channels, *mean = block + plan.padded_channels,
        *squares = mean + plan.padded_channels;
  index_t block_rows = kBlockBytes / (channels * static_cast<index_t>(sizeof(T)));
  if (block_rows < kMinBlockRows) block_rows = kMinBlockRows;
  if (block_rows > kMaxBlockRows) block_rows = kMaxBlockRows;
  for (index_t r = 0; r < rows; r += block_rows) {
    const index_t count = rows - r < block_rows ? rows - r : block_rows;
    const T* from = x + r * channels;
    index_t c = 0;
    for (; c + kTile * kLanes <= channels; c += kTile * kLanes)
      block_moments<kTile, true>(from + c, count, channels, kLanes, r, pivot + c, block + c,
                                 mean + c, squares + c);
    for (; c + kLanes <= channels; c += kLanes)
      block_moments<1, true>(from + c, count, channels, kLanes, r, pivot + c, block + c, mean + c,
                             squares + c);
    if (c < channels)
      block_moments<1, false>(from + c, count, channels, static_cast<int>(channels - c), r,
                              pivot + c, block + c, mean + c, squares + c);
  }
  const index_t size = channels / in.groups;
  for (index_t g = 0; g < in.groups; ++g) {
    double sum = 0.0, square = 0.0;
    for (index_t c = g * size; c < (g + 1) * size; ++c)
      sum += static_cast<double>(pivot[c]) + static_cast<double>(mean[c]);
    const double center = sum / static_cast<double>(size);
    for (index_t c = g * size; c < (g + 1) * size; ++c) {
      const double away = static_cast<double>(pivot[c]) + static_cast<double>(mean[c]) - center;
      square += static_cast<double>(squares[c]) + static_cast<double>(rows) * away * away;
    }
    out[2 * g] = center;
    out[2 * g + 1] = square;
  }
}

template <bool kSilu, class T>
void apply_plain(const GroupNormSiluInput& in, const Affine& table, const T* x, T* y,
                 index_t positions) {
  const index_t channels = in.channels;
  over_tiles(positions, channels, [&](index_t row, index_t rows, index_t c, int n, auto tile) {
    using Shape = decltype(tile);
    const TileTable<Shape> center(table.center + c), gain(table.gain + c), offset(table.offset + c);
    const T* from = x + row * channels + c;
    T* to = y + row * channels + c;
    for (index_t r = 0; r < rows; ++r, from += channels, to += channels)
#pragma GCC unroll 4
      for (int v = 0; v < Shape::vectors; ++v) {
        const vf u =
            (get<Shape::whole>(from + v * kLanes, n) - center.at[v]) * gain.at[v] + offset.at[v];
        put<Shape::whole>(to + v * kLanes, activate<kSilu, T>(u), n);
      }
  });
}

template <bool kSilu, class T>
void apply_adaptive(const GroupNormSiluInput& in, const Affine& table,
                    const GroupNormSiluSlab& slab, const T* x, T* y) {
  const Condition<T> condition(in, slab);
  const index_t channels = in.channels;
  for (index_t h = slab.first; h < slab.last; ++h)
    for (index_t w = 0; w < in.width; ++w, x += channels, y += channels) {
      const T *scale = condition.scale_at(h, w), *shift = condition.shift_at(h, w);
      over_channels(channels, [&](index_t c, int n, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        const vf normed = (get<kWhole>(x + c, n) - load(table.center + c)) * load(table.gain + c) +
                          load(table.offset + c);
        const vf u = normed * (1.0f + get<kWhole>(scale + c, n)) + get<kWhole>(shift + c, n);
        put<kWhole>(y + c, activate<kSilu, T>(u), n);
      });
    }
}

template <class T>
void apply(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t index,
           const GroupStats* stats, float* scratch, void* y) {
  const GroupNormSiluSlab slab(in, plan, index);
  const Affine table(in, plan, stats, scratch);
  const index_t first = slab.frame * in.frame_elements() + slab.first * in.width * in.channels;
  const T* from = static_cast<const T*>(in.x) + first;
  T* to = static_cast<T*>(y) + first;
  const index_t rows = (slab.last - slab.first) * in.width;
  if (in.adaptive())
    return in.silu ? apply_adaptive<true>(in, table, slab, from, to)
                   : apply_adaptive<false>(in, table, slab, from, to);
  return in.silu ? apply_plain<true>(in, table, from, to, rows)
                 : apply_plain<false>(in, table, from, to, rows);
}

}  // namespace

void group_norm_silu_rows_moments(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan,
                                  index_t slab, float* scratch, double* out) {
  switch (in.dtype) {
    case DType::f32:
      return moments<float>(in, plan, slab, scratch, out);
    case DType::bf16:
      return moments<bf16_t>(in, plan, slab, scratch, out);
    case DType::f16:
      return moments<f16_t>(in, plan, slab, scratch, out);
  }
}

void group_norm_silu_rows_apply(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan,
                                index_t slab, const GroupStats* stats, float* scratch, void* y) {
  switch (in.dtype) {
    case DType::f32:
      return apply<float>(in, plan, slab, stats, scratch, y);
    case DType::bf16:
      return apply<bf16_t>(in, plan, slab, stats, scratch, y);
    case DType::f16:
      return apply<f16_t>(in, plan, slab, stats, scratch, y);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
