// causal_conv3d, one source per instruction set: the weight gradient of 1x1x1 kernels.
// Previous hop: cpu_point_grad.cpp.
// Next hop: none.
//
// 64 pixels of both lists (of bfloat16 64 pairs) are packed at a time and multiplied by the
// register tile of weight_grad_tile.h, channels of an item against each other. The engine of larger
// kernels packs pixels anew for every 64 x 64 channels and pairs pixels of two rows, of which a
// plane seen as one row has none.
#include "causal_conv3d/point_grad.h"

#include "causal_conv3d/weight_grad_tile.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kColumns = kVectors * kLanes;

constexpr index_t kPiece = 16;  // scalars between one asking for memory and the next

index_t least(index_t a, index_t b) { return a < b ? a : b; }

// The channels begin .. end of the pixels first .. last in blocks of `width` [line][width], the
// last block only as wide as whole vectors if `tight`. Pixel by pixel, as memory is read best.
template <class P, class T>
void pack_pixels(const void* list, index_t step, index_t begin, index_t end, index_t first,
                 index_t last, index_t width, bool tight, typename P::Element* to) {
  const index_t padded = round_up(end - begin, tight ? index_t{kLanes} : width);
  for (index_t pixel = first; pixel < last; pixel += P::kRows, ++to) {
    const T* a = static_cast<const T*>(list) + pixel * step + begin;
    const T* b = P::kRows > 1 && pixel + 1 < last ? a + step : nullptr;
    const index_t line = (pixel - first) / P::kRows;
    for (index_t c = 0; c < padded; c += width) {
      const index_t columns = least(width, padded - c);
      P::pack(a + c, b ? b + c : nullptr, least(columns, end - begin - c),
              to + c * kPointLines + line * (columns - 1));
    }
  }
}

// Asks for the same channels ahead of their packing: products take far longer than memory, but only
// if it is not waited for.
template <class T>
void ask_for(const void* list, index_t step, index_t begin, index_t end, index_t first,
             index_t last) {
  constexpr index_t kLine = 64 / sizeof(T);
  for (index_t pixel = first; pixel < last; ++pixel)
    for (index_t c = begin; c < end; c += kLine)
      __builtin_prefetch(static_cast<const T*>(list) + pixel * step + c, 0, 2);
}

template <class T, class P>
void add_item(const PointGradParams& p, const PointGradItem& item, float* sums, float* packed) {
  typedef typename P::Element Element;
  const index_t vectors = item.vector_end - item.vector_begin;
  const index_t scalars = item.scalar_end - item.scalar_begin;
  const index_t padded = round_up(vectors, index_t{kLanes});
  auto* packed_scalars = reinterpret_cast<Element*>(packed);
  Element* packed_vectors = packed_scalars + kPointLines * round_up(scalars, kPointScalars);
  for (index_t i = 0; i < scalars * padded; ++i) sums[i] = 0.0f;
  const index_t pieces = ceil_div(vectors, kColumns) * ceil_div(scalars, kPiece);
  for (index_t first = item.pixel_begin; first < item.pixel_end; first += kPointLines * P::kRows) {
    const index_t end = least(first + kPointLines * P::kRows, item.pixel_end);
    const index_t after = least(end + kPointLines * P::kRows, item.pixel_end);
    const index_t lines = ceil_div(end - first, P::kRows);
    pack_pixels<P, T>(p.scalars, p.scalar_channels, item.scalar_begin, item.scalar_end, first, end,
                      kPointScalars, false, packed_scalars);
    pack_pixels<P, T>(p.vectors, p.vector_channels, item.vector_begin, item.vector_end, first, end,
                      kColumns, true, packed_vectors);
    index_t piece = 0;
    for (index_t v = 0; v < vectors; v += kColumns) {
      const index_t columns = least(kColumns, padded - v);
      for (index_t s = 0; s < scalars; s += kPiece, ++piece) {
        const index_t ask = end + (after - end) * piece / pieces;
        const index_t ask_end = end + (after - end) * (piece + 1) / pieces;
        ask_for<T>(p.scalars, p.scalar_channels, item.scalar_begin, item.scalar_end, ask, ask_end);
        ask_for<T>(p.vectors, p.vector_channels, item.vector_begin, item.vector_end, ask, ask_end);
        const index_t block = s / kPointScalars * kPointScalars;
        const Operands<P> o{packed_scalars + block * kPointLines + s - block,
                            packed_vectors + v * kPointLines,
                            1,
                            lines,
                            0,
                            kPointScalars,
                            0,
                            columns};
        add_products(o, columns / kLanes, least(kPiece, scalars - s),
                     sums + v * scalars + s * columns);
      }
    }
  }
}

}  // namespace

void conv3d_point_grad(const PointGradParams& p, const PointGradItem& item, float* sums,
                       float* packed) {
  switch (p.dtype) {
    case DType::f32:
      return add_item<float, Single>(p, item, sums, packed);
    case DType::bf16:
#if defined(MF_ISA_avx512_bf16)
      return add_item<bf16_t, Pair>(p, item, sums, packed);
#else
      return add_item<bf16_t, Single>(p, item, sums, packed);
#endif
    case DType::f16:
      return add_item<f16_t, Single>(p, item, sums, packed);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
