// causal_conv3d, one source per instruction set: a block of pixels times a block of weights.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// A register tile is 6 target pixels x 4 vectors of channels (24 of 32 zmm; 6 x 2 below AVX-512).
// It walks over the taps; per source channel it loads 4 vectors of packed weights and broadcasts
// one number of each of the 6 pixels: 24 fused multiply-adds against 10 loads. Pixels are reached
// through pointers, so padding, strides, dilation and history cost nothing and no padded copy
// exists; frames and rows of zero padding are not in the lists at all, so a causal 3x3x3 kernel
// skips 3 of its 3 T frame taps. Weights are cut into pieces of 256 KB that stay in the L2 cache
// while up to 120 pixels pass over them.
//
// Ladder: 512->512, 3x3x3, 5x16x16, one core of Zen 4 at 3.67 GHz, CPU time, weights packed at
// every call. Floor at FMA peak without the zero taps: 118 ms float32, 59 ms bfloat16. The better
// of PyTorch's two layouts: 161 and 81 ms.
//
//   v1  tile, lists, pieces of weights                          160 ms   200 ms
//   v2  tile loops unrolled by pragma (the bfloat16 tile
//       had been kept in memory)                                160       99
//   v3  weights transposed through a buffer in L1 (rows of
//       the packed form lie a power of two apart)               138       70
//   v4  float32 in chains of 128 products that then join the
//       sums: the worst error of 3456 products fell from
//       9.2e-6 to under 5.0e-6, at about 2 % of the time        138
//   v5  narrow results (vectors along the sum): 16->3,
//       17x64x64: 9.8 -> 3.5 ms float32, 5.8 -> 3.9 bfloat16
//   v6  up to 8 channels: the taps of a row side by side (cpu_join.h); results written tile by
//       tile, bfloat16 by its instruction; planes of 1x1 kernels as one row:
//       3->16, 17x64x64 bfloat16, two threads: 2.3 -> 1.5 to 2.2 ms
//
// Counted in registers and L1, in cycles a product instruction of bfloat16: 1.0 for the tile
// without loads, 1.17 with them, 1.46 for sums of 10 channels, 2.0 for a single vector of columns
// (every product has its own broadcast, and those come one in 1.7 cycles).
//
// What is left: weights from L2 at 10 bytes a cycle, tiles of 5 and 4 pixels, packing. Winograd
// would need a quarter of the multiplications for 3x3 planes; it would take the place of the tile
// loop.
#include "causal_conv3d/gather.h"

#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kChain = 128;              // products that are added up before they join the sums
constexpr index_t kPanelBytes = 256 * 1024;  // a piece of the weights that stays in the L2 cache
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

// --- narrow results: vectors along the sum
// --------------------------------------------------------------

// acc[i][n] += a[i] * b[n] lane by lane; b is [N][reduce in whole vectors].
template <int MR, int N>
inline __attribute__((always_inline)) void multiply_lanes(vf (&acc)[MR][N],
                                                          const float* const (&a)[MR],
                                                          const float* b, index_t reduce) {
  const index_t row = round_up(reduce, index_t{kLanes});
  for (index_t k = 0; k < reduce; k += kLanes, b += kLanes) {
    const index_t left = reduce - k;
    vf weights[N];
    MF_UNROLL
    for (int n = 0; n < N; ++n) weights[n] = load(b + n * row);
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      const vf pixel =
          left >= kLanes ? load(a[i] + k) : load_some(a[i] + k, static_cast<int>(left));
      MF_UNROLL
      for (int n = 0; n < N; ++n) acc[i][n] += pixel * weights[n];
    }
  }
}

#if defined(MF_ISA_avx512_bf16)
template <int MR, int N>
inline __attribute__((always_inline)) void multiply_lanes(vf (&acc)[MR][N],
                                                          const bf16_t* const (&a)[MR],
                                                          const bf16_t* b, index_t reduce) {
  constexpr index_t kStep = 2 * kLanes;
  const index_t row = round_up(reduce, kStep);
  for (index_t k = 0; k < reduce; k += kStep, b += kStep) {
    const index_t left = reduce - k;
    const __mmask32 lanes = left >= kStep ? ~0u : (1u << left) - 1u;
    __m512bh weights[N];
    MF_UNROLL
    for (int n = 0; n < N; ++n) weights[n] = load_as<__m512bh>(b + n * row);
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      will_load(a[i] + k, static_cast<int>(left < kStep ? left : kStep));
      const __m512bh pixel = (__m512bh)_mm512_maskz_loadu_epi16(lanes, a[i] + k);
      MF_UNROLL
      for (int n = 0; n < N; ++n)
        acc[i][n] = (vf)_mm512_dpbf16_ps((__m512)acc[i][n], pixel, weights[n]);
    }
  }
}
#endif

inline float add_lanes(vf v) {
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum_lanes(v);
#endif
}

template <class T>
index_t narrow_row(index_t reduce) {  // packed elements of one tap and result channel
  return round_up(reduce, index_t{kLanes} * (kChained<T> ? 1 : 2));
}

template <class T, int MR, int N>
void run_narrow_tile(const Tile& tile) {
  vf acc[MR][N] = {};
  const T* zeros = static_cast<const T*>(tile.zeros);
  const WidthGather& width = *tile.width;
  const index_t panel_step = narrow_row<T>(tile.reduce) * N;
  for (int r = 0; r < tile.num_rows; ++r) {
    const T* pixels = static_cast<const T*>(tile.rows[r].pixels);
    const T* panel = static_cast<const T*>(tile.rows[r].panel);
    const std::int32_t* offset = width.offset + tile.first;
    for (index_t slot = 0; slot < width.slots; ++slot, offset += width.width) {
      const T* a[MR];
      MF_UNROLL
      for (int i = 0; i < MR; ++i) a[i] = offset[i] >= 0 ? pixels + offset[i] : zeros;
      multiply_lanes<MR, N>(acc, a, panel + width.slot_tap[slot] * panel_step, tile.reduce);
    }
  }
  MF_UNROLL
  for (int i = 0; i < MR; ++i) {
    MF_UNROLL
    for (int n = 0; n < N; ++n) {
      float* to = tile.sums + i * kLanes + n;
      *to = (tile.accumulate ? *to : 0.0f) + add_lanes(acc[i][n]);
    }
  }
}

// --- the tile for a number of vectors (narrow: of result channels) and of pixels
// -------------------------

typedef void (*TileFunction)(const Tile&);

template <class T, int N, bool kIsNarrow, int MR>
TileFunction tile_function() {
  if constexpr (kIsNarrow)
    return run_narrow_tile<T, MR, N>;
  else
    return run_tile<T, MR, N>;
}

template <class T, int N, bool kIsNarrow>
TileFunction pick_pixels(int pixels) {
  static_assert(kTilePixels == 6, "one case a size");
  switch (pixels) {
    case 1:
      return tile_function<T, N, kIsNarrow, 1>();
    case 2:
      return tile_function<T, N, kIsNarrow, 2>();
    case 3:
      return tile_function<T, N, kIsNarrow, 3>();
    case 4:
      return tile_function<T, N, kIsNarrow, 4>();
    case 5:
      return tile_function<T, N, kIsNarrow, 5>();
    default:
      return tile_function<T, N, kIsNarrow, 6>();
  }
}

template <class T, bool kIsNarrow>
TileFunction pick_tile(int vectors, int pixels) {
  switch (vectors) {
    case 1:
      return pick_pixels<T, 1, kIsNarrow>(pixels);
    case 2:
      return pick_pixels<T, 2, kIsNarrow>(pixels);
    default:
      break;
  }
  if constexpr (kIsNarrow || kVectors == 4)
    return vectors == 3 ? pick_pixels<T, 3, kIsNarrow>(pixels)
                        : pick_pixels<T, 4, kIsNarrow>(pixels);
  return nullptr;
}

// The tiles' sums plus bias and residual, rounded to the target's type.
struct Results {
  const float* sums;  // [pixels][columns]
  index_t columns, channel, channels;
  index_t tile_begin, tile_end;
};

template <class T>
void write_row(const GatherParams& p, const GatherItem& item, index_t h, const Results& results) {
  const auto [sums_begin, columns, channel, channels, tile_begin, tile_end] = results;
  const float* sums = sums_begin;
  T* row = row_of<T>(p.target, item.n, item.t, h) + channel;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + channel : nullptr;
  const T* residual =
      p.residual.late ? row_of<const T>(p.residual, item.n, item.t, h) + channel : nullptr;
  const index_t first = p.w.tile_first[tile_begin], last = p.w.tile_first[tile_end];
  for (index_t i = first; i < last; ++i, sums += columns) {
    const index_t pixel = p.w.target[i] * p.target.channels;
    T* out = row + pixel;
    index_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      vf v = load(sums + c);
      if (bias) v += load(bias + c);
      store(out + c, residual ? v + load(residual + pixel + c) : v);
    }
    if (c < channels) {
      const int rest = static_cast<int>(channels - c);
      vf v = load(sums + c);
      if (bias) v += load_some(bias + c, rest);
      store_some(out + c, residual ? v + load_some(residual + pixel + c, rest) : v, rest);
    }
  }
}

template <class T>
class Block {
 public:
  Block(const GatherParams& p, const GatherItem& item) : p_(p), item_(item) {
    const index_t whole = kVectors * kLanes, done = item.block * whole;
    const index_t taps = p.kernel_t * p.kernel_h * p.kernel_w;
    channels_ = p.narrow || p.produce - done < whole ? p.produce - done : whole;
    const int vectors = static_cast<int>(ceil_div(channels_, index_t{kLanes}));
    columns_ = vectors * kLanes;
    pixels_ = p.w.tile_first[item.tile_end] - p.w.tile_first[item.tile_begin];
    index_t tap_panel, group_panel;  // elements of one tap, and of one group
    if (p.narrow) {
      tap_panel = p.produce * narrow_row<T>(p.reduce);
      group_panel = tap_panel * taps;
    } else {
      tap_panel = packed_rows(p.reduce, static_cast<const T*>(nullptr)) * columns_;
      group_panel = tap_panel / columns_ * taps * round_up(p.produce, index_t{kLanes});
    }
    row_panel_ = p.kernel_w * tap_panel;
    packed_ = static_cast<const T*>(p.packed) + item.group * group_panel +
              done * (tap_panel / columns_) * taps;
    for (int m = 1; m <= kTilePixels; ++m)
      tiles_[m] = p.narrow ? pick_tile<T, true>(static_cast<int>(p.produce), m)
                           : pick_tile<T, false>(vectors, m);
  }

  void run() {
    // Cut the weights along (kt, kh) into pieces that stay in cache while all pixels pass over
    // them.
    const index_t row_bytes = row_panel_ * static_cast<index_t>(sizeof(T));
    const index_t fits = row_bytes < kPanelBytes ? kPanelBytes / row_bytes : 1;
    const index_t step_h = fits < p_.kernel_h ? fits : p_.kernel_h;
    const index_t step_t = fits < p_.kernel_h ? 1 : fits / p_.kernel_h;
    // In one piece: a tile's sums are written while they are in the L1 cache.
    const bool one_piece = step_t >= p_.kernel_t && step_h >= p_.kernel_h;
    at_once_ = one_piece && p_.t.begin[item_.t + 1] > p_.t.begin[item_.t];
    for (index_t kt = 0; kt < p_.kernel_t; kt += step_t)
      for (index_t kh = 0; kh < p_.kernel_h; kh += step_h)
        for (index_t h = item_.row_begin; h < item_.row_end; ++h)
          add_row(h, kt, kt + step_t, kh, kh + step_h);
    for (index_t h = item_.row_begin; h < item_.row_end; ++h) {
      const index_t r = h - item_.row_begin;
      if (at_once_ && started_[r]) continue;
      if (!started_[r])  // nothing but padding
        for (index_t i = 0; i < pixels_ * columns_; ++i) sums(r)[i] = 0.0f;
      write(h, sums(r), item_.tile_begin, item_.tile_end);
    }
  }

 private:
  float* sums(index_t r) { return sums_ + r * pixels_ * columns_; }

  void write(index_t h, const float* sums, index_t tile_begin, index_t tile_end) {
    const index_t channel = item_.group * p_.produce + item_.block * kVectors * kLanes;
    const Results results{sums, columns_, channel, channels_, tile_begin, tile_end};
    switch (p_.target_type) {
      case DType::f32:
        return write_row<float>(p_, item_, h, results);
      case DType::bf16:
        return write_row<bf16_t>(p_, item_, h, results);
      case DType::f16:
        return write_row<f16_t>(p_, item_, h, results);
    }
  }

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
        if (count == kMaxRows) {
          run_tiles(h, rows, count, false);
          count = 0;
        }
        const T* pixels =
            row_of<const T>(p_.source, item_.n, in_t.source, in_h.source) + item_.group * p_.reduce;
        rows[count++] = {pixels, packed_ + (in_t.tap * p_.kernel_h + in_h.tap) * row_panel_};
      }
    }
    if (count) run_tiles(h, rows, count, at_once_);
  }

  void run_tiles(index_t h, const SourceRow* rows, int count, bool last) {
    const index_t r = h - item_.row_begin;
    const bool one_tile = last && !started_[r];  // memory of one tile is enough
    float* out = sums(r);
    for (index_t i = item_.tile_begin; i < item_.tile_end; ++i) {
      const index_t first = p_.w.tile_first[i], pixels = p_.w.tile_first[i + 1] - first;
      tiles_[pixels]({out, started_[r], rows, count, &p_.w, first, p_.zeros, p_.reduce});
      if (last) write(h, out, i, i + 1);
      if (!one_tile) out += pixels * columns_;
    }
    started_[r] = true;
  }

  const GatherParams& p_;
  const GatherItem& item_;
  index_t channels_, columns_, pixels_, row_panel_;
  const T* packed_;
  TileFunction tiles_[kTilePixels + 1] = {};
  bool at_once_ = false;
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
