// causal_conv3d on the CPU: weights in the order of the engine, and widened sources.
// Previous hop: cpu.cpp.
// Next hop: none.
#include "causal_conv3d/cpu_pack.h"

#include <cstring>
#include <type_traits>

#include "causal_conv3d/causal_conv3d.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

template <class To, class From>
struct Convert {
  static To of(From x) { return from_float<To>(to_float(x)); }
};
template <class T>
struct Convert<T, T> {
  static T of(T x) { return x; }
};

// to[j][i] = from[i * stride + j] for i < columns, a multiple of 4, and j < count: 4 x 4 at a time.
void transpose(const float* from, index_t stride, index_t columns, index_t count, float* to) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef std::int32_t i4 __attribute__((vector_size(16)));
  index_t j = 0;
  for (; j + 4 <= count; j += 4)
    for (index_t i = 0; i < columns; i += 4) {
      v4 row[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&row[k], from + (i + k) * stride + j, sizeof(v4));
      const v4 low0 = __builtin_shuffle(row[0], row[1], i4{0, 4, 1, 5});
      const v4 low1 = __builtin_shuffle(row[2], row[3], i4{0, 4, 1, 5});
      const v4 high0 = __builtin_shuffle(row[0], row[1], i4{2, 6, 3, 7});
      const v4 high1 = __builtin_shuffle(row[2], row[3], i4{2, 6, 3, 7});
      const v4 out[4] = {__builtin_shuffle(low0, low1, i4{0, 1, 4, 5}),
                         __builtin_shuffle(low0, low1, i4{2, 3, 6, 7}),
                         __builtin_shuffle(high0, high1, i4{0, 1, 4, 5}),
                         __builtin_shuffle(high0, high1, i4{2, 3, 6, 7})};
      for (int k = 0; k < 4; ++k) std::memcpy(to + (j + k) * columns + i, &out[k], sizeof(v4));
    }
  for (; j < count; ++j)
    for (index_t i = 0; i < columns; ++i) to[j * columns + i] = from[i * stride + j];
}

// Transposed through a buffer in the L1 cache: rows of the packed form lie a power of two apart,
// and scattering single elements to them would fight over a few cache sets.
constexpr index_t kBuffer = 8192;
constexpr index_t kRows = 8;  // most rows of a chunk

template <class From, class To>
class Packer {
 public:
  Packer(const WeightView& w, const PackLayout& layout, To* packed)
      : w_(w),
        packed_(packed),
        taps_inside_(layout.taps_inside),
        block_(layout.block),
        unit_(layout.pairs ? 2 : 1) {
    const index_t block = layout.block;
    padded_ = round_up(w.columns, layout.lanes);
    rows_ = ceil_div(w.reduce, unit_);
    tap_step_ = w.taps < kBuffer / (block * unit_) ? w.taps : kBuffer / (block * unit_);
    row_step_ = kBuffer / (tap_step_ * block * unit_);
    if (row_step_ > kRows) row_step_ = kRows;
    blocks_ = ceil_div(padded_, block);
    row_chunks_ = ceil_div(rows_, row_step_);
    tap_chunks_ = ceil_div(w.taps, tap_step_);
  }
  index_t chunks() const { return w_.groups * blocks_ * row_chunks_ * tap_chunks_; }

  void run(index_t chunk) const {
    const index_t tap0 = chunk % tap_chunks_ * tap_step_;
    const index_t row0 = chunk / tap_chunks_ % row_chunks_ * row_step_;
    const index_t first = chunk / tap_chunks_ / row_chunks_ % blocks_ * block_;
    const index_t group = chunk / tap_chunks_ / row_chunks_ / blocks_;
    const index_t taps = least(tap_step_, w_.taps - tap0), rows = least(row_step_, rows_ - row0);
    const index_t columns = least(block_, padded_ - first), width = columns * unit_;
    const From* from = static_cast<const From*>(w_.data) + group * w_.group_stride +
                       first * w_.column_stride + tap0 * w_.joined;
    To* block = packed_ + (group * padded_ + first) * w_.taps * rows_ * unit_;
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>)
      if (taps_inside_ && w_.joined == 1 && taps == w_.taps && first + columns <= w_.columns) {
        for (index_t r = row0; r < row0 + rows; ++r)
          transpose(from + r * w_.reduce_stride, w_.column_stride, columns, taps,
                    block + r * taps * columns);
        return;
      }
    index_t offset[2 * kRows];  // of the channels of the chunk's rows
    for (index_t r = 0; r < rows * unit_; ++r) offset[r] = w_.row(row0 * unit_ + r);
    To buffer[kBuffer];
    for (index_t c = 0; c < columns; ++c)
      for (index_t r = 0; r < rows * unit_; ++r) {  // channel row0 * unit + r
        const index_t k = row0 * unit_ + r;
        const bool inside = k < w_.reduce && first + c < w_.columns;
        const From* source = from + offset[r] + c * w_.column_stride;
        To* to = buffer + r / unit_ * taps * width + c * unit_ + r % unit_;
        if (inside)
          for (index_t tap = 0; tap < taps; ++tap)
            to[tap * width] = Convert<To, From>::of(source[tap * w_.joined]);
        else
          for (index_t tap = 0; tap < taps; ++tap) to[tap * width] = To{};
      }
    for (index_t r = 0; r < rows; ++r)
      for (index_t tap = 0; tap < taps; ++tap)
        std::memcpy(block + place(tap0 + tap, row0 + r) * width, buffer + (r * taps + tap) * width,
                    sizeof(To) * static_cast<std::size_t>(width));
  }

 private:
  index_t place(index_t tap, index_t row) const {
    return taps_inside_ ? row * w_.taps + tap : tap * rows_ + row;
  }
  static index_t least(index_t a, index_t b) { return a < b ? a : b; }

  const WeightView& w_;
  To* packed_;
  bool taps_inside_;
  index_t block_, unit_;  // unit: channels side by side in a packed row
  index_t padded_, rows_, tap_step_, row_step_, blocks_, row_chunks_, tap_chunks_;
};

template <class From, class To>
void pack(const WeightView& w, const PackLayout& layout, void* packed, int threads) {
  const Packer<From, To> packer(w, layout, static_cast<To*>(packed));
  parallel_ranges(packer.chunks(), threads, [&](index_t begin, index_t end, int) {
    for (index_t i = begin; i < end; ++i) packer.run(i);
  });
}

}  // namespace

index_t packed_size(const WeightView& w, const PackLayout& layout) {
  const index_t reduce = layout.pairs ? round_up(w.reduce, index_t{2}) : w.reduce;
  return w.groups * w.taps * reduce * round_up(w.columns, layout.lanes);
}

void pack_weights(const WeightView& w, const PackLayout& layout, void* packed, int num_threads) {
  if (layout.type == DType::bf16) return pack<bf16_t, bf16_t>(w, layout, packed, num_threads);
  switch (w.dtype) {
    case DType::f32:
      return pack<float, float>(w, layout, packed, num_threads);
    case DType::bf16:
      return pack<bf16_t, float>(w, layout, packed, num_threads);
    case DType::f16:
      return pack<f16_t, float>(w, layout, packed, num_threads);
  }
}

void widen(const void* from, DType dtype, float* to, index_t count, int num_threads) {
  parallel_ranges(count, num_threads, [&](index_t begin, index_t end, int) {
    if (dtype == DType::bf16)
      for (index_t i = begin; i < end; ++i) to[i] = to_float(static_cast<const bf16_t*>(from)[i]);
    else
      for (index_t i = begin; i < end; ++i) to[i] = to_float(static_cast<const f16_t*>(from)[i]);
  });
}

std::uint64_t causal_conv3d_weight_mark(const void* weight, std::size_t bytes, const ExecContext&) {
  constexpr std::size_t kWhole = 4096, kSamples = 64, kWord = sizeof(std::uint64_t);
  const char* from = static_cast<const char*>(weight);
  std::uint64_t mark = bytes;
  const auto mix = [&](std::size_t offset, std::size_t size) {
    std::uint64_t word = 0;
    std::memcpy(&word, from + offset, size);
    mark = (mark ^ word) * 0x9e3779b97f4a7c15u;
    mark ^= mark >> 29;
  };
  const std::size_t words = bytes / kWord, rest = bytes % kWord;
  const bool whole = bytes <= kWhole;
  const std::size_t count = whole ? words : kSamples;
  for (std::size_t i = 0; i < count; ++i)
    mix((whole ? i : i * (words - 1) / (kSamples - 1)) * kWord, kWord);
  if (rest != 0) mix(words * kWord, rest);
  return mark;
}

}  // namespace magvit_fast::cpu
