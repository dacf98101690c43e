// causal_conv3d, one source per instruction set: a block of pixels times one block of weight
// columns. Previous hop: cpu.cpp. Next hop: none.
#include "causal_conv3d/gather.h"

#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// Register tiles are arrays; only fully unrolled loops let the compiler keep them in registers.
#define MF_UNROLL _Pragma("GCC unroll 8")

#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr index_t kPanelBytes = 256 * 1024;  // a piece of the weights that stays in the L2 cache
constexpr index_t kChain = 128;              // products that are added up before they join the sums
// Products of bfloat16 need no such care: the rounding of the result is far coarser.
template <class T>
constexpr bool kChained = false;
template <>
constexpr bool kChained<float> = true;
constexpr int kMaxRows = 64;  // (frame, row) pairs handed to a tile at once

// A source row and the weights of its (kt, kh).
struct SourceRow {
  const void* pixels;
  const void* panel;
};

struct Tile {
  float* sums;      // [pixels][NV * kLanes]
  bool accumulate;  // add to sums (else: overwrite)
  const SourceRow* rows;
  int num_rows;
  const WidthGather* width;
  index_t first;  // in the order of width.target
  const void* zeros;
  index_t reduce;
};

// sums[i][:] (+)= sum over k of a[i][k] * b[k][:], for one tap.
template <int MR, int NV>
inline __attribute__((always_inline)) void multiply(vf (&acc)[MR][NV], const float* const (&a)[MR],
                                                    const float* b, index_t reduce) {
  for (index_t k = 0; k < reduce; ++k, b += NV * kLanes) {
    vf column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * kLanes);
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      const vf pixel = splat(a[i][k]);
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += pixel * column[j];
    }
  }
}

index_t packed_rows(index_t reduce, const float*) { return reduce; }

#if defined(MF_ISA_avx512_bf16)
// Pairs of channels: b is [ceil(reduce / 2)][columns][2]. A single last channel is paired with
// zero.
template <int MR, int NV>
inline __attribute__((always_inline)) void multiply(vf (&acc)[MR][NV], const bf16_t* const (&a)[MR],
                                                    const bf16_t* b, index_t reduce) {
  const index_t pairs = reduce / 2;
  for (index_t k = 0; k < pairs; ++k, b += NV * kLanes * 2) {
    __m512bh column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load_as<__m512bh>(b + j * kLanes * 2);
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512bh pixel = (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(a[i] + 2 * k));
      MF_UNROLL
      for (int j = 0; j < NV; ++j)
        acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], pixel, column[j]);
    }
  }
  if (reduce % 2 == 0) return;
  MF_UNROLL
  for (int i = 0; i < MR; ++i) {
    const __m512bh pixel = (__m512bh)_mm512_set1_epi32(a[i][reduce - 1].bits);
    MF_UNROLL
    for (int j = 0; j < NV; ++j)
      acc[i][j] =
          (vf)_mm512_dpbf16_ps((__m512)acc[i][j], pixel, load_as<__m512bh>(b + j * kLanes * 2));
  }
}

index_t packed_rows(index_t reduce, const bf16_t*) { return round_up(reduce, index_t{2}); }
#endif

// sums (+)= acc, and acc starts anew: short chains of additions keep float32 as exact as it can be.
template <int MR, int NV>
inline __attribute__((always_inline)) void flush(vf (&acc)[MR][NV], float* sums, bool accumulate) {
  MF_UNROLL
  for (int i = 0; i < MR; ++i) {
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* to = sums + (i * NV + j) * kLanes;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
      acc[i][j] = vf{};
    }
  }
}

template <class T, int MR, int NV>
void run_tile(const Tile& tile) {
  vf acc[MR][NV] = {};
  bool accumulate = tile.accumulate;
  const T* zeros = static_cast<const T*>(tile.zeros);
  const WidthGather& width = *tile.width;
  const index_t panel_step = packed_rows(tile.reduce, static_cast<const T*>(nullptr)) * NV * kLanes;
  index_t chain = 0;
  for (int r = 0; r < tile.num_rows; ++r) {
    const T* pixels = static_cast<const T*>(tile.rows[r].pixels);
    const T* panel = static_cast<const T*>(tile.rows[r].panel);
    const std::int32_t* offset = width.offset + tile.first;
    for (index_t slot = 0; slot < width.slots; ++slot, offset += width.width) {
      const T* a[MR];
      std::int32_t all = -1;  // stays negative if no pixel has a source here
      MF_UNROLL
      for (int i = 0; i < MR; ++i) {
        all &= offset[i];
        a[i] = offset[i] >= 0 ? pixels + offset[i] : zeros;
      }
      if (all < 0) continue;
      const T* b = panel + width.slot_tap[slot] * panel_step;
      if (!kChained<T>) {
        multiply<MR, NV>(acc, a, b, tile.reduce);
        continue;
      }
      for (index_t left = tile.reduce; left > 0;) {
        const index_t depth = left < kChain ? left : kChain;
        multiply<MR, NV>(acc, a, b, depth);
        left -= depth;
        b += depth * NV * kLanes;
        MF_UNROLL
        for (int i = 0; i < MR; ++i) a[i] += depth;
        chain += depth;
        if (chain < kChain / 2) continue;
        flush(acc, tile.sums, accumulate);
        accumulate = true;
        chain = 0;
      }
    }
  }
  if (chain || !accumulate || !kChained<T>) flush(acc, tile.sums, accumulate);
}

typedef void (*TileFunction)(const Tile&);

template <class T, int NV>
TileFunction pick_pixels(int pixels) {
  static_assert(kTilePixels == 6, "one case a size");
  switch (pixels) {
    case 1:
      return run_tile<T, 1, NV>;
    case 2:
      return run_tile<T, 2, NV>;
    case 3:
      return run_tile<T, 3, NV>;
    case 4:
      return run_tile<T, 4, NV>;
    case 5:
      return run_tile<T, 5, NV>;
    default:
      return run_tile<T, 6, NV>;
  }
}

template <class T>
TileFunction pick_tile(int vectors, int pixels) {
  switch (vectors) {
    case 1:
      return pick_pixels<T, 1>(pixels);
    case 2:
      return pick_pixels<T, 2>(pixels);
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
    case 3:
      return pick_pixels<T, 3>(pixels);
    case 4:
      return pick_pixels<T, 4>(pixels);
#endif
    default:
      return nullptr;
  }
}

template <class T>
T* row_of(const SplitTensor& s, index_t n, index_t t, index_t h) {
  const index_t row = s.width * s.channels, frame = s.height * row;
  if (t < s.early_frames)
    return static_cast<T*>(s.early) + (n * s.early_frames + t) * frame + h * row;
  return static_cast<T*>(s.late) + (n * s.late_frames + t - s.early_frames) * frame + h * row;
}

// The pixels' sums plus bias, rounded to the target's type.
template <class T>
void write_row(const GatherParams& p, const GatherItem& item, index_t h, const float* sums,
               index_t columns, index_t channel, index_t channels) {
  T* row = row_of<T>(p.target, item.n, item.t, h) + channel;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + channel : nullptr;
  const index_t first = p.w.tile_first[item.tile_begin], last = p.w.tile_first[item.tile_end];
  for (index_t i = first; i < last; ++i, sums += columns) {
    T* out = row + p.w.target[i] * p.target.channels;
    index_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      const vf v = load(sums + c);
      store(out + c, bias ? v + load(bias + c) : v);
    }
    if (c < channels) {
      const int rest = static_cast<int>(channels - c);
      const vf v = load(sums + c);
      store_some(out + c, bias ? v + load_some(bias + c, rest) : v, rest);
    }
  }
}

template <class T>
class Block {
 public:
  Block(const GatherParams& p, const GatherItem& item) : p_(p), item_(item) {
    const index_t whole = kVectors * kLanes, done = item.block * whole;
    channels_ = p.produce - done < whole ? p.produce - done : whole;
    vectors_ = static_cast<int>(ceil_div(channels_, index_t{kLanes}));
    columns_ = vectors_ * kLanes;
    pixels_ = p.w.tile_first[item.tile_end] - p.w.tile_first[item.tile_begin];
    row_panel_ = p.kernel_w * packed_rows(p.reduce, static_cast<const T*>(nullptr)) * columns_;
    const index_t taps = p.kernel_t * p.kernel_h * p.kernel_w;
    const index_t depth = taps * packed_rows(p.reduce, static_cast<const T*>(nullptr));
    const index_t padded = round_up(p.produce, index_t{kLanes});
    packed_ = static_cast<const T*>(p.packed) + (item.group * padded + done) * depth;
    for (int m = 1; m <= kTilePixels; ++m) tiles_[m] = pick_tile<T>(vectors_, m);
  }

  void run() {
    // Cut the weights along (kt, kh) into pieces that stay in cache while all pixels pass over
    // them.
    const index_t row_bytes = row_panel_ * static_cast<index_t>(sizeof(T));
    const index_t fits = row_bytes < kPanelBytes ? kPanelBytes / row_bytes : 1;
    const index_t step_h = fits < p_.kernel_h ? fits : p_.kernel_h;
    const index_t step_t = fits < p_.kernel_h ? 1 : fits / p_.kernel_h;
    for (index_t kt = 0; kt < p_.kernel_t; kt += step_t)
      for (index_t kh = 0; kh < p_.kernel_h; kh += step_h)
        for (index_t h = item_.row_begin; h < item_.row_end; ++h)
          add_row(h, kt, kt + step_t, kh, kh + step_h);
    const index_t channel = item_.group * p_.produce + item_.block * kVectors * kLanes;
    for (index_t h = item_.row_begin; h < item_.row_end; ++h) {
      const index_t r = h - item_.row_begin;
      if (!started_[r])  // nothing but padding
        for (index_t i = 0; i < pixels_ * columns_; ++i) sums(r)[i] = 0.0f;
      switch (p_.target_type) {
        case DType::f32:
          write_row<float>(p_, item_, h, sums(r), columns_, channel, channels_);
          break;
        case DType::bf16:
          write_row<bf16_t>(p_, item_, h, sums(r), columns_, channel, channels_);
          break;
        case DType::f16:
          write_row<f16_t>(p_, item_, h, sums(r), columns_, channel, channels_);
          break;
      }
    }
  }

 private:
  float* sums(index_t r) { return sums_ + r * pixels_ * columns_; }

  // Target row h: the taps of kt in [t0, t1) and kh in [h0, h1).
  void add_row(index_t h, index_t t0, index_t t1, index_t h0, index_t h1) {
    SourceRow rows[kMaxRows];
    int count = 0;
    for (index_t i = p_.t.begin[item_.t]; i < p_.t.begin[item_.t + 1]; ++i) {
      const TapSource in_t = p_.t.taps[i];
      if (in_t.tap < t0 || in_t.tap >= t1) continue;
      for (index_t j = p_.h.begin[h]; j < p_.h.begin[h + 1]; ++j) {
        const TapSource in_h = p_.h.taps[j];
        if (in_h.tap < h0 || in_h.tap >= h1) continue;
        const T* pixels =
            row_of<const T>(p_.source, item_.n, in_t.source, in_h.source) + item_.group * p_.reduce;
        rows[count++] = {pixels, packed_ + (in_t.tap * p_.kernel_h + in_h.tap) * row_panel_};
        if (count == kMaxRows) {
          run_tiles(h, rows, count);
          count = 0;
        }
      }
    }
    if (count) run_tiles(h, rows, count);
  }

  void run_tiles(index_t h, const SourceRow* rows, int count) {
    const index_t r = h - item_.row_begin;
    float* out = sums(r);
    for (index_t i = item_.tile_begin; i < item_.tile_end; ++i) {
      const index_t first = p_.w.tile_first[i], pixels = p_.w.tile_first[i + 1] - first;
      tiles_[pixels]({out, started_[r], rows, count, &p_.w, first, p_.zeros, p_.reduce});
      out += pixels * columns_;
    }
    started_[r] = true;
  }

  const GatherParams& p_;
  const GatherItem& item_;
  index_t channels_, columns_, pixels_, row_panel_;
  int vectors_;
  const T* packed_;
  TileFunction tiles_[kTilePixels + 1] = {};
  bool started_[kBlockPixels] = {};
  float sums_[kBlockPixels * kVectors * kLanes];
};

}  // namespace

void conv3d_gather(const GatherParams& params, const GatherItem& item) {
#if defined(MF_ISA_avx512_bf16)
  if (params.source_type == DType::bf16) return Block<bf16_t>(params, item).run();
#endif
  Block<float>(params, item).run();
}

}  // namespace MF_ISA
}  // namespace magvit_fast
