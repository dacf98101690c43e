// causal_conv3d, one source per instruction set: the weight gradient of a block of channels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: none.
//
// Blocks of 96 output pixels are packed (in pairs for bfloat16 products), dy once and x once per
// tap; a register tile of 6 scalar channels x 4 vectors then sums over the pixels. An item keeps
// the sums of its taps in the L2 cache. Each block is a chain of its own, so float32 errors do not
// grow with the number of all pixels.
//
// Ladder: 512->512, 3x3x3, 5x16x16, one core of Zen 4, CPU time. Floor 118 ms float32, 59 bfloat16.
// The better of PyTorch's two layouts: 184 and 94 ms.
//
//   v1  packed blocks, tile of 6 x 4                            172 ms    92 ms
//   v2  narrow layers: taps side by side in one product,
//       masked loads; 3->16, 17x64x64:                          17.5 -> 7.9   18 -> 6.3
//
// What is left: for images (3 channels) the packing, tap by tap, costs more than the products.
#include "causal_conv3d/weight_grad.h"

#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kScalars = 6;  // register tile: 6 scalar channels x kVectors vectors

// --- packing: pixels in the order in which the products read them
// -----------------------------------

// to[pixel * stride + 0 .. width) in float32, width in whole vectors; a null pixel is zero, and so
// is what lies beyond `channels`.
template <class T>
void pack_pixels(const T* const* pixels, index_t count, index_t channels, index_t width, float* to,
                 index_t stride) {
  for (index_t p = 0; p < count; ++p, to += stride) {
    const T* from = pixels[p];
    for (index_t c = 0; c < width; c += kLanes) {
      const index_t left = channels - c;
      vf v = {};
      if (from && left >= kLanes) v = load(from + c);
      if (from && left > 0 && left < kLanes) v = load_some(from + c, static_cast<int>(left));
      store(to + c, v);
    }
  }
}

struct Single {  // float32 products
  typedef float Element;
  static constexpr index_t kPixels = 1;  // of one packed element
  template <class T>
  static void pack(const T* const* pixels, index_t count, index_t channels, index_t width,
                   float* to, index_t stride) {
    pack_pixels(pixels, count, channels, width, to, stride);
  }
  typedef vf Vector;
  static Vector vector(const float* p) { return load(p); }
  static Vector scalar(const float* p) { return splat(*p); }
  static vf multiply_add(Vector a, Vector b, vf sum) { return sum + a * b; }
};

#if defined(MF_ISA_avx512_bf16)
struct Pair {  // bfloat16 products, two pixels at a time: the packed element holds both
  typedef std::uint32_t Element;
  static constexpr index_t kPixels = 2;
  static vu bits(const bf16_t* from, index_t left) {
    if (!from || left <= 0) return vu{};
    if (left >= kLanes) return __builtin_convertvector(load_as<vh>(from), vu);
    const __m256i some = _mm256_maskz_loadu_epi16(first_lanes(static_cast<int>(left)), from);
    return (vu)_mm512_cvtepu16_epi32(some);
  }
  static void pack(const bf16_t* const* pixels, index_t count, index_t channels, index_t width,
                   std::uint32_t* to, index_t stride) {
    for (index_t p = 0; p < count; p += 2, to += stride) {
      const bf16_t* second = p + 1 < count ? pixels[p + 1] : nullptr;
      for (index_t c = 0; c < width; c += kLanes) {
        const bf16_t* low = pixels[p] ? pixels[p] + c : nullptr;
        const bf16_t* high = second ? second + c : nullptr;
        store_as(to + c, bits(low, channels - c) | (bits(high, channels - c) << 16));
      }
    }
  }
  typedef __m512bh Vector;
  static Vector vector(const std::uint32_t* p) { return load_as<__m512bh>(p); }
  static Vector scalar(const std::uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p));
  }
  static vf multiply_add(Vector a, Vector b, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

// --- products: sums[scalar][vector] += over pixels of scalar * vector
// ---------------------------------

template <class P>
struct Operands {
  const typename P::Element* scalars;  // [count][scalar_stride]
  const typename P::Element* vectors;  // [count][NV * kLanes]
  index_t count, scalar_stride;
};

template <class P, int MS, int NV>
void add_tile(const Operands<P>& o, float* sums) {
  constexpr int kColumns = NV * kLanes;
  vf acc[MS][NV] = {};
  const typename P::Element* scalars = o.scalars;
  const typename P::Element* vectors = o.vectors;
  for (index_t p = 0; p < o.count; ++p, scalars += o.scalar_stride, vectors += kColumns) {
    typename P::Vector column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = P::vector(vectors + j * kLanes);
    MF_UNROLL
    for (int i = 0; i < MS; ++i) {
      const typename P::Vector scalar = P::scalar(scalars + i);
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(scalar, column[j], acc[i][j]);
    }
  }
  MF_UNROLL
  for (int i = 0; i < MS; ++i) {
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {  // one short chain of additions a block of pixels
      float* to = sums + i * kColumns + j * kLanes;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <class P, int NV>
void add_products(Operands<P> o, index_t scalars, float* sums) {
  const index_t tiles = ceil_div(scalars, index_t{kScalars});
  for (index_t t = 0; t < tiles; ++t) {
    const index_t first = scalars * t / tiles;
    Operands<P> part = o;
    part.scalars += first;
    float* to = sums + first * NV * kLanes;
    switch (scalars * (t + 1) / tiles - first) {
      case 1:
        add_tile<P, 1, NV>(part, to);
        break;
      case 2:
        add_tile<P, 2, NV>(part, to);
        break;
      case 3:
        add_tile<P, 3, NV>(part, to);
        break;
      case 4:
        add_tile<P, 4, NV>(part, to);
        break;
      case 5:
        add_tile<P, 5, NV>(part, to);
        break;
      default:
        add_tile<P, 6, NV>(part, to);
        break;
    }
  }
}

template <class P>
void add_products(const Operands<P>& o, int vectors, index_t scalars, float* sums) {
  switch (vectors) {
    case 1:
      return add_products<P, 1>(o, scalars, sums);
    case 2:
      return add_products<P, 2>(o, scalars, sums);
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
    case 3:
      return add_products<P, 3>(o, scalars, sums);
    default:
      return add_products<P, 4>(o, scalars, sums);
#endif
  }
}

// --- one item
// ---------------------------------------------------------------------------------------

template <class T, class P>
class Item {
 public:
  typedef typename P::Element Element;

  Item(const WeightGradParams& p, const WeightGradItem& item, float* memory) : p_(p), item_(item) {
    vectors_ = item.vector_end - item.vector_begin;
    scalars_ = item.scalar_end - item.scalar_begin;
    columns_ = round_up(vectors_, index_t{kLanes});
    // Taps that share a product, side by side on the axis of the moving side, so that it is long
    // enough.
    const index_t taps = item.tap_end - item.tap_begin;
    chunk_ = p.vector_is_output ? kScalarRows / scalars_ : kVectors * kLanes / columns_;
    if (chunk_ < 1) chunk_ = 1;
    if (chunk_ > taps) chunk_ = taps;
    sums_ = memory;
    packed_scalars_ =
        reinterpret_cast<Element*>(sums_ + weight_grad_sums(taps, static_cast<index_t>(kLevel)));
    packed_vectors_ = packed_scalars_ + kGradPixels * kScalarStride;
    for (index_t i = 0; i < taps * scalars_ * columns_; ++i) sums_[i] = 0.0f;
  }

  void run() {
    const index_t width = p_.output.width, height = p_.output.height;
    const index_t columns = width < kGradPixels ? width : kGradPixels;
    const index_t rows = kGradPixels / columns;
    for (index_t n = 0; n < p_.batch; ++n)
      for (index_t t = 0; t < p_.output.late_frames; ++t)
        for (index_t h = 0; h < height; h += rows)
          for (index_t w = 0; w < width; w += columns)
            add_block(n, t, h, h + rows < height ? h + rows : height, w,
                      w + columns < width ? w + columns : width);
    write();
  }

 private:
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  static constexpr int kLevel = 2;
#elif defined(MF_ISA_avx2)
  static constexpr int kLevel = 1;
#else
  static constexpr int kLevel = 0;
#endif

  // Row stride of the packed scalars when `taps` of them stand side by side.
  index_t scalar_stride(index_t taps) const {
    return (taps - 1) * scalars_ + round_up(scalars_, index_t{kLanes});
  }

  // One tap (the `place`-th of `taps`) of one side. A scalar tap is written in whole vectors; the
  // zeros behind it are overwritten by the next tap, so taps must come in order.
  void pack_side(bool output, const T* const* pixels, index_t count, index_t place, index_t taps) {
    if (output == p_.vector_is_output)
      P::pack(pixels, count, vectors_, columns_, packed_vectors_ + place * columns_,
              taps * columns_);
    else
      P::pack(pixels, count, scalars_, round_up(scalars_, index_t{kLanes}),
              packed_scalars_ + place * scalars_, scalar_stride(taps));
  }

  // Output pixels [h0, h1) x [w0, w1) of frame t, against every tap of the item.
  void add_block(index_t n, index_t t, index_t h0, index_t h1, index_t w0, index_t w1) {
    const T* pixels[kGradPixels];
    const index_t count = (h1 - h0) * (w1 - w0), taps = item_.tap_end - item_.tap_begin;
    const index_t channel = p_.vector_is_output ? item_.vector_begin : item_.scalar_begin;
    const T* out = row_of<const T>(p_.output, n, t, 0) + item_.group * p_.out_group + channel;
    index_t i = 0;
    for (index_t h = h0; h < h1; ++h)
      for (index_t w = w0; w < w1; ++w)
        pixels[i++] = out + (h * p_.output.width + w) * p_.output.channels;
    pack_side(true, pixels, count, 0, 1);
    for (index_t first = 0; first < taps; first += chunk_) {
      const index_t some = first + chunk_ < taps ? chunk_ : taps - first;
      bool any = false;
      for (index_t place = 0; place < some; ++place) {
        any |= find_sources(n, t, h0, h1, w0, w1, item_.tap_begin + first + place, pixels);
        if (any || some > 1) pack_side(false, pixels, count, place, some);
      }
      if (!any) continue;
      const bool scalars_move = p_.vector_is_output;
      add_products<P>({packed_scalars_, packed_vectors_, ceil_div(count, P::kPixels),
                       scalar_stride(scalars_move ? some : 1)},
                      static_cast<int>((scalars_move ? 1 : some) * columns_ / kLanes),
                      (scalars_move ? some : 1) * scalars_, sums_ + first * scalars_ * columns_);
    }
  }

  // The source pixels that a tap meets at these output pixels, null where it meets padding with
  // zeros.
  bool find_sources(index_t n, index_t t, index_t h0, index_t h1, index_t w0, index_t w1,
                    index_t tap, const T** pixels) const {
    const index_t kw = tap % p_.kernel_w, kh = tap / p_.kernel_w % p_.kernel_h;
    const index_t kt = tap / p_.kernel_w / p_.kernel_h;
    const std::int32_t frame = p_.t_source[kt * p_.output.late_frames + t];
    const index_t channel = p_.vector_is_output ? item_.scalar_begin : item_.vector_begin;
    const T* in = row_of<const T>(p_.source, n, frame < 0 ? 0 : frame, 0) +
                  item_.group * p_.in_group + channel;
    const std::int32_t* columns = p_.w_source + kw * p_.output.width;
    bool any = false;
    for (index_t h = h0; h < h1; ++h) {
      const std::int32_t row = p_.h_source[kh * p_.output.height + h];
      const T* base = in + row * p_.source.width * p_.source.channels;
      for (index_t w = w0; w < w1; ++w) {
        const bool inside = frame >= 0 && row >= 0 && columns[w] >= 0;
        *pixels++ = inside ? base + columns[w] : nullptr;
        any |= inside;
      }
    }
    return any;
  }

  // Where sums_ keeps a tap's product of a scalar and a vector channel.
  index_t place_of(index_t tap, index_t scalar, index_t vector) const {
    if (p_.vector_is_output) return (tap * scalars_ + scalar) * columns_ + vector;
    const index_t first = tap / chunk_ * chunk_, taps = item_.tap_end - item_.tap_begin;
    const index_t some = first + chunk_ < taps ? chunk_ : taps - first;
    return first * scalars_ * columns_ + (scalar * some + tap - first) * columns_ + vector;
  }

  void write() const {
    const index_t all_taps = p_.kernel_t * p_.kernel_h * p_.kernel_w;
    const index_t taps = item_.tap_end - item_.tap_begin;
    for (index_t s = 0; s < scalars_; ++s)
      for (index_t v = 0; v < vectors_; ++v) {
        const index_t scalar = item_.scalar_begin + s, vector = item_.vector_begin + v;
        const index_t co = item_.group * p_.out_group + (p_.vector_is_output ? vector : scalar);
        const index_t ci = p_.vector_is_output ? scalar : vector;
        T* to = static_cast<T*>(p_.dweight) + (co * p_.in_group + ci) * all_taps + item_.tap_begin;
        for (index_t tap = 0; tap < taps; ++tap)
          to[tap] = from_float<T>(sums_[place_of(tap, s, v)]);
      }
  }

  const WeightGradParams& p_;
  const WeightGradItem& item_;
  index_t vectors_, scalars_, columns_, chunk_;
  float* sums_;              // by place_of
  Element* packed_scalars_;  // [pixels][scalar_stride(taps)]
  Element* packed_vectors_;  // [pixels][taps][columns]
};

}  // namespace

void conv3d_weight_grad(const WeightGradParams& params, const WeightGradItem& item, float* memory) {
  switch (params.dtype) {
    case DType::f32:
      return Item<float, Single>(params, item, memory).run();
#if defined(MF_ISA_avx512_bf16)
    case DType::bf16:
      return Item<bf16_t, Pair>(params, item, memory).run();
#else
    case DType::bf16:
      return Item<bf16_t, Single>(params, item, memory).run();
#endif
    case DType::f16:
      return Item<f16_t, Single>(params, item, memory).run();
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
