// causal_conv3d on the CPU: weights in the order in which the engine reads them, and widened
// sources. Previous hop: cpu.cpp. Next hop: none.
#include "causal_conv3d/cpu_pack.h"

#include <cstring>

#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kChunk =
    4;  // channels packed together: the lines they are scattered to stay in L1

// Channels [k0, k0 + kChunk) of one block of columns; to = packed + position(tap, k, column).
template <class From, class To, class Position>
void pack_chunk(const From* from, const WeightView& w, index_t k0, index_t padded_reduce,
                index_t columns, index_t padded_columns, To* packed, const Position& position) {
  for (index_t k = k0; k < k0 + kChunk && k < padded_reduce; ++k)
    for (index_t c = 0; c < padded_columns; ++c) {
      const bool inside = k < w.reduce && c < columns;
      const From* source = from + k * w.reduce_stride + c * w.column_stride;
      for (index_t tap = 0; tap < w.taps; ++tap)
        packed[position(tap, k, c)] =
            inside ? from_float<To>(to_float(source[tap])) : from_float<To>(0.0f);
    }
}

template <class From, class To>
void pack(const WeightView& w, To* packed, index_t block, index_t lanes, bool pairs, int threads) {
  const index_t reduce = pairs ? round_up(w.reduce, index_t{2}) : w.reduce;
  const index_t padded = round_up(w.columns, lanes);
  const index_t blocks = ceil_div(padded, block), chunks = ceil_div(reduce, kChunk);
  parallel_ranges(w.groups * blocks * chunks, threads, [&](index_t begin, index_t end, int) {
    for (index_t i = begin; i < end; ++i) {
      const index_t chunk = i % chunks, b = i / chunks % blocks, g = i / chunks / blocks;
      const index_t first = b * block;
      const index_t padded_columns = padded - first < block ? padded - first : block;
      const index_t columns = w.columns - first < block ? w.columns - first : block;
      const From* from =
          static_cast<const From*>(w.data) + g * w.group_stride + first * w.column_stride;
      To* to = packed + (g * padded + first) * w.taps * reduce;
      if (pairs)
        pack_chunk(from, w, chunk * kChunk, reduce, columns, padded_columns, to,
                   [&](index_t tap, index_t k, index_t c) {
                     return ((tap * (reduce / 2) + k / 2) * padded_columns + c) * 2 + k % 2;
                   });
      else
        pack_chunk(from, w, chunk * kChunk, reduce, columns, padded_columns, to,
                   [&](index_t tap, index_t k, index_t c) {
                     return (tap * reduce + k) * padded_columns + c;
                   });
    }
  });
}

}  // namespace

index_t packed_size(const WeightView& w, index_t lanes, bool pairs) {
  const index_t reduce = pairs ? round_up(w.reduce, index_t{2}) : w.reduce;
  return w.groups * w.taps * reduce * round_up(w.columns, lanes);
}

void pack_weights(const WeightView& w, void* packed, index_t block, index_t lanes, bool pairs,
                  int num_threads) {
  if (pairs) return pack<bf16_t>(w, static_cast<bf16_t*>(packed), block, lanes, true, num_threads);
  float* to = static_cast<float*>(packed);
  switch (w.dtype) {
    case DType::f32:
      return pack<float>(w, to, block, lanes, false, num_threads);
    case DType::bf16:
      return pack<bf16_t>(w, to, block, lanes, false, num_threads);
    case DType::f16:
      return pack<f16_t>(w, to, block, lanes, false, num_threads);
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

}  // namespace magvit_fast::cpu
