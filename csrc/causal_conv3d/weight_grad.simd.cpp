// causal_conv3d, one source per instruction set: the weight gradient of a block of channels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: none.
//
// A block is about 64 output pixels, of two rows each for bfloat16 products. The fixed side of a
// block is packed once, the moving side once for each (kt, kh): the taps of a row are the same
// packed line read from different columns. A register tile of 6 scalar channels x 4 vectors (16 x 1
// where the vector channels are few) then sums over the pixels. An item keeps the sums of its taps
// in the L2 cache. Each block is a chain of its own, so float32 errors do not grow with the number
// of all pixels.
//
// Ladder: 512->512, 3x3x3, 5x16x16, one core of Zen 4, CPU time. Floor 118 ms float32, 59 bfloat16.
// The better of PyTorch's two layouts: 184 and 94 ms.
//
//   v1  packed blocks, tile of 6 x 4                            172 ms    92 ms
//   v2  narrow layers: taps side by side in one product,
//       masked loads; 3->16, 17x64x64:                          17.5 -> 7.9   18 -> 6.3
//   v3  packed lines shared by the taps of a row, the side with few
//       channels moved over the other, blocks of pixels shared out
//       where the sums are small; 17x64x64, two threads:
//         3->128                                                53 -> 14     32 -> 8.7
//         128->3                                                58 -> 15.5   51 -> 7.6
//         16->16                                                             6.3 -> 4.0
//
// What is left: 3->128 in bfloat16 waits for dy from memory (44 % of its time, as long as the
// products take); asking for the next block's lines ahead, all at once or with every row of taps,
// changed nothing.
#include "causal_conv3d/weight_grad.h"

#include "causal_conv3d/weight_grad_tile.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// --- one item
// ---------------------------------------------------------------------------------------

template <class T, class P>
class Item {
 public:
  typedef typename P::Element Element;

  Item(const WeightGradParams& p, const WeightGradItem& item, float* sums, float* packed)
      : p_(p), item_(item), sums_(sums) {
    scalars_ = item.scalar_end - item.scalar_begin;
    columns_ = round_up(item.vector_end - item.vector_begin, index_t{kLanes});
    line_sources_ = grad_line_sources(p);
    const index_t vectors = item.vector_end - item.vector_begin;
    const bool over_output = p.vector_is_output;
    fixed_ = {over_output ? vectors : scalars_, over_output ? columns_ : scalars_,
              item.group * p.out_group + (over_output ? item.vector_begin : item.scalar_begin),
              reinterpret_cast<Element*>(packed)};
    Element* rest = fixed_.packed + p.block_lines * p.block_columns * fixed_.step + 2 * kLanes;
    moving_ = {over_output ? scalars_ : vectors, over_output ? scalars_ : columns_,
               item.group * p.in_group + (over_output ? item.scalar_begin : item.vector_begin),
               rest};
    const index_t taps = (item.tap_row_end - item.tap_row_begin) * p.kernel_w;
    for (index_t i = 0; i < taps * scalars_ * columns_; ++i) sums_[i] = 0.0f;
  }

  void run() {
    const index_t rows = p_.block_lines * P::kRows;
    const index_t across = ceil_div(p_.output.width, p_.block_columns);
    const index_t down = ceil_div(p_.output.height, rows);
    const index_t frames = p_.output.early_frames + p_.output.late_frames;
    for (index_t block = item_.block_begin; block < item_.block_end; ++block) {
      const index_t frame = block / across / down;
      const index_t h = block / across % down * rows, w = block % across * p_.block_columns;
      add_block({frame / frames, frame % frames, h, least(h + rows, p_.output.height), w,
                 least(w + p_.block_columns, p_.output.width)});
    }
  }

 private:
  struct Side {
    index_t channels, step;  // of a packed pixel; step: elements from one to the next
    index_t first;           // channel of the tensor
    Element* packed;
  };
  struct Pixels {
    index_t n, t, h0, h1, w0, w1;
  };
  static index_t least(index_t a, index_t b) { return a < b ? a : b; }

  void add_block(const Pixels& b) {
    const index_t lines = ceil_div(b.h1 - b.h0, P::kRows), width = b.w1 - b.w0;
    for (index_t line = 0; line < lines; ++line) pack_output(b, line);
    for (index_t row = item_.tap_row_begin; row < item_.tap_row_end; ++row) {
      const index_t kt = row / p_.kernel_h, kh = row % p_.kernel_h;
      const index_t frames = p_.output.early_frames + p_.output.late_frames;
      const std::int32_t frame = p_.t_source[kt * frames + b.t];
      if (frame < 0) continue;
      bool any = false;
      for (index_t line = 0; line < lines; ++line) any |= pack_sources(b, line, frame, kh);
      if (any) add_taps(lines, width, sums_ + (row - item_.tap_row_begin) * p_.kernel_w * tap());
    }
  }

  index_t tap() const { return scalars_ * columns_; }  // floats of the sums

  // The taps of a row: scalars of neighbors are one longer row of scalars.
  void add_taps(index_t lines, index_t width, float* sums) {
    const bool over_output = p_.vector_is_output;
    const index_t fixed_line = p_.block_columns * fixed_.step;
    const index_t moving_line = line_sources_ * moving_.step, step = p_.stride_w * moving_.step;
    Operands<P> o{fixed_.packed, moving_.packed, lines,       width,
                  fixed_line,    fixed_.step,    moving_line, step};
    if (over_output)
      o = {moving_.packed, fixed_.packed, lines, width, moving_line, step, fixed_line, fixed_.step};
    if (over_output && p_.dilation_w == 1)
      return add_products(o, columns_ / kLanes, p_.kernel_w * scalars_, sums);
    for (index_t kw = 0; kw < p_.kernel_w; ++kw, sums += tap()) {
      add_products(o, columns_ / kLanes, scalars_, sums);
      (over_output ? o.scalars : o.vectors) += p_.dilation_w * moving_.step;
    }
  }

  void pack_output(const Pixels& b, index_t line) {
    const index_t channels = p_.output.channels, h = b.h0 + line * P::kRows;
    const T* first = row_of<const T>(p_.output, b.n, b.t, h) + fixed_.first;
    const T* second = nullptr;
    if (P::kRows > 1 && h + 1 < b.h1) second = first + p_.output.width * channels;
    Element* to = fixed_.packed + line * p_.block_columns * fixed_.step;
    pack_run(first, second, b.w0, b.w1 - b.w0, channels, fixed_, to);
  }

  // Whether there is anything but zeros.
  bool pack_sources(const Pixels& b, index_t line, std::int32_t frame, index_t kh) {
    const T* row[2] = {nullptr, nullptr};
    for (index_t r = 0; r < P::kRows; ++r) {
      const index_t h = b.h0 + line * P::kRows + r;
      const std::int32_t source = h < b.h1 ? p_.h_source[kh * p_.output.height + h] : -1;
      if (source >= 0) row[r] = row_of<const T>(p_.source, b.n, frame, source) + moving_.first;
    }
    const index_t channels = p_.source.channels;
    const std::int32_t* source = p_.w_source + b.w0 * p_.stride_w;
    const std::int32_t* runs = p_.w_run + b.w0 * p_.stride_w;
    const index_t count = (b.w1 - b.w0 - 1) * p_.stride_w + (p_.kernel_w - 1) * p_.dilation_w + 1;
    Element* to = moving_.packed + line * line_sources_ * moving_.step;
    for (index_t q = 0; q < count;) {  // runs of neighbors, or of zeros
      const index_t run = least(runs[q], count - q);
      const bool inside = source[q] >= 0;
      pack_run(inside ? row[0] : nullptr, inside ? row[1] : nullptr, source[q], run, channels,
               moving_, to + q * moving_.step);
      q += run;
    }
    return row[0] || row[1];
  }

  // Columns [begin, begin + count) of one or two rows. Whole vectors are written: what lies behind
  // the last channel is overwritten by the next pixel, so pixels must come in order.
  static void pack_run(const T* first, const T* second, index_t begin, index_t count,
                       index_t channels, const Side& side, Element* to) {
    const T* a = first ? first + begin * channels : nullptr;
    const T* b = second ? second + begin * channels : nullptr;
    if (side.channels == side.step && (side.channels == channels || (!a && !b)))
      return P::pack(a, b, count * side.channels, to);
    for (index_t i = 0; i < count; ++i, to += side.step) {
      P::pack(a, b, side.channels, to);
      if (a) a += channels;
      if (b) b += channels;
    }
  }

  const WeightGradParams& p_;
  const WeightGradItem& item_;
  index_t scalars_, columns_, line_sources_;
  Side fixed_, moving_;
  float* sums_;
};

}  // namespace

void conv3d_weight_grad(const WeightGradParams& params, const WeightGradItem& item, float* sums,
                        float* packed) {
  switch (params.dtype) {
    case DType::f32:
      return Item<float, Single>(params, item, sums, packed).run();
#if defined(MF_ISA_avx512_bf16)
    case DType::bf16:
      return Item<bf16_t, Pair>(params, item, sums, packed).run();
#else
    case DType::bf16:
      return Item<bf16_t, Single>(params, item, sums, packed).run();
#endif
    case DType::f16:
      return Item<f16_t, Single>(params, item, sums, packed).run();
  }
}

void conv3d_round_sums(float* sums, index_t count, DType type) {
  const auto round = [&](auto* to) {
    for (index_t i = 0; i < count; i += kLanes) store(to + i, load(sums + i));
  };
  if (type == DType::bf16) round(reinterpret_cast<bf16_t*>(sums));
  if (type == DType::f16) round(reinterpret_cast<f16_t*>(sums));
}

void conv3d_add_sums(float* to, const float* from, index_t count) {
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

}  // namespace MF_ISA
}  // namespace magvit_fast
