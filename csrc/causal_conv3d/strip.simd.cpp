// causal_conv3d, one source per instruction set: strips of source rows times a block of weights.
// Previous hop: cpu_strip.cpp.
// Next hop: none.
//
// A register tile is 6 target pixels x 4 vectors of channels, or 16 x 1 where there are fewer
// results (6 x 2 to 8 x 1 below AVX-512). Its pixels stand `step` elements apart, so it reaches
// three of them through one pointer, without tables. Of up to 8 channels a tap is too short a run;
// there each pixel's taps are copied side by side ("folded"), at most 24 KB of pixels at a time,
// and the sum is one run per frame.
//
// Ladder: 3->16 and 16->16, 3x3x3, 17x64x64, bfloat16, one core of Zen 4. Floor: 0.75 and 3.9 ms.
// (The first line is twice the time of two threads.)
//
//   gather engine, taps of a row side by side          2.3 ms    5.6 ms
//   v1  strips, runs of the sum, one address and step   1.95      4.6
//   v2  folded row by row, by pieces of known size      1.44      4.4
//   v3  a frame copied once for all frames that read it 1.09      4.1
//
// What is left: one vector of columns means a broadcast a product, 1.1 cycles each.
#include "causal_conv3d/strip_frames.h"
#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kChain = 128;  // float32 products that are added up before they join the sums
template <class T>
constexpr bool kChained = false;  // of bfloat16 the rounding of the result is far coarser
template <>
constexpr bool kChained<float> = true;

// --- the register tile
// ------------------------------------------------------------------------------------------

// A run of the sum: pixel i of the row at pixels + i * step.
struct Run {
  const void* pixels;
  const void* panel;
  index_t length;
};

struct Work {
  const Run* runs;
  int count;
  index_t step;          // elements from pixel to pixel
  void* y;               // the first pixel's first channel of the block
  const void* bias;      // or null
  const void* residual;  // or null
  index_t y_step;        // elements from pixel to pixel
  int rest;              // channels of the last vector
  DType y_type;
};

// Pixels a step apart, three through one pointer: what an address of x86 can add up.
template <class T, int MR>
struct Pixels {
  static constexpr int kPointers = (MR + 2) / 3;
  const T* first[kPointers];
  index_t step;

  inline __attribute__((always_inline)) Pixels(const T* pixels, index_t distance) : step(distance) {
    MF_UNROLL
    for (int i = 0; i < kPointers; ++i) first[i] = pixels + 3 * i * distance;
  }
  inline __attribute__((always_inline)) const T* operator[](int i) const {
    return first[i / 3] + i % 3 * step;
  }
  inline __attribute__((always_inline)) void advance(index_t elements) {
    MF_UNROLL
    for (int i = 0; i < kPointers; ++i) first[i] += elements;
  }
};

#define MF_UNROLL_PIXELS _Pragma("GCC unroll 16")

template <int MR, int NV>
inline __attribute__((always_inline)) void multiply(vf (&acc)[MR][NV], Pixels<float, MR>& a,
                                                    const float* b, index_t length) {
  for (index_t k = 0; k < length; ++k, b += NV * kLanes) {
    vf column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * kLanes);
    MF_UNROLL_PIXELS
    for (int i = 0; i < MR; ++i) {
      const vf pixel = splat(*a[i]);
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += pixel * column[j];
    }
    a.advance(1);
  }
}

#if defined(MF_ISA_avx512_bf16)
// b is [length / 2][columns][2].
template <int MR, int NV>
inline __attribute__((always_inline)) void multiply(vf (&acc)[MR][NV], Pixels<bf16_t, MR>& a,
                                                    const bf16_t* b, index_t length) {
  typedef int __attribute__((may_alias, aligned(2))) pair;
  for (index_t k = 0; k < length; k += 2, b += NV * kLanes * 2) {
    __m512bh column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load_as<__m512bh>(b + j * kLanes * 2);
    MF_UNROLL_PIXELS
    for (int i = 0; i < MR; ++i) {
      if constexpr (NV == 1) {  // gcc 12 cannot put the broadcast into the instruction
        const pair* pixel = reinterpret_cast<const pair*>(a[i]);
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc[i][0]) : "v"(column[0]), "m"(*pixel));
      } else {
        const __m512bh pixel = (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(a[i]));
        MF_UNROLL
        for (int j = 0; j < NV; ++j)
          acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], pixel, column[j]);
      }
    }
    a.advance(2);
  }
}
#endif

template <class To, int MR, int NV>
inline __attribute__((always_inline)) void write(const Work& w, index_t pixel,
                                                 const vf (&acc)[MR][NV]) {
  To* y = static_cast<To*>(w.y) + pixel * w.y_step;
  const To* bias = static_cast<const To*>(w.bias);
  const To* residual = w.residual ? static_cast<const To*>(w.residual) + pixel * w.y_step : nullptr;
  MF_UNROLL
  for (int j = 0; j < NV; ++j) {
    const index_t c = j * kLanes;
    const bool part = j == NV - 1 && w.rest < kLanes;
    vf added{};
    if (bias) added = part ? load_some(bias + c, w.rest) : load(bias + c);
    MF_UNROLL_PIXELS
    for (int i = 0; i < MR; ++i) {
      const index_t at = i * w.y_step + c;
      vf v = acc[i][j] + added;
      if (residual) v += part ? load_some(residual + at, w.rest) : load(residual + at);
      if (part)
        store_some(y + at, v, w.rest);
      else
        store(y + at, v);
    }
  }
}

template <class T, int NV, int MR>
void run_tile(const Work& w, index_t pixel) {
  vf acc[MR][NV] = {};
  float sums[MR * NV * kLanes];
  bool summed = false;
  index_t chain = 0;
  for (int r = 0; r < w.count; ++r) {
    Pixels<T, MR> a(static_cast<const T*>(w.runs[r].pixels) + pixel * w.step, w.step);
    const T* b = static_cast<const T*>(w.runs[r].panel);
    for (index_t left = w.runs[r].length; left > 0;) {
      const index_t depth = kChained<T> && left > kChain ? kChain : left;
      multiply<MR, NV>(acc, a, b, depth);
      left -= depth;
      b += depth * NV * kLanes;
      chain += depth;
      if (!kChained<T> || chain < kChain / 2 || (left == 0 && r == w.count - 1)) continue;
      flush(acc, sums, summed);
      summed = true;
      chain = 0;
    }
  }
  if (summed) {
    MF_UNROLL_PIXELS
    for (int i = 0; i < MR; ++i) {
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += load(sums + (i * NV + j) * kLanes);
    }
  }
  if constexpr (!kChained<T>)
    return write<bf16_t>(w, pixel, acc);
  else if (w.y_type == DType::f32)
    return write<float>(w, pixel, acc);
  else if (w.y_type == DType::bf16)
    return write<bf16_t>(w, pixel, acc);
  else
    return write<f16_t>(w, pixel, acc);
}

constexpr int most_pixels(int vectors) {  // what the registers hold
  if (kVectors == 2) return vectors == 1 ? 8 : 6;
  return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
}
constexpr int fewer_pixels(int pixels) { return pixels == 12 ? 8 : pixels == 6 ? 4 : pixels / 2; }

template <class T, int NV, int MR>
void run_tiles(const Work& w, index_t pixel, index_t end) {
  for (; pixel + MR <= end; pixel += MR) run_tile<T, NV, MR>(w, pixel);
  if constexpr (MR > 1)
    if (pixel < end) run_tiles<T, NV, fewer_pixels(MR)>(w, pixel, end);
}

template <class T>
void run_tiles(int vectors, const Work& w, index_t end) {
  switch (vectors) {
    case 1:
      return run_tiles<T, 1, most_pixels(1)>(w, 0, end);
    case 2:
      return run_tiles<T, 2, most_pixels(2)>(w, 0, end);
#if defined(MF_ISA_avx512) || defined(MF_ISA_avx512_bf16)
    case 3:
      return run_tiles<T, 3, most_pixels(3)>(w, 0, end);
    default:
      return run_tiles<T, 4, most_pixels(4)>(w, 0, end);
#endif
  }
}

// --- copies
// -----------------------------------------------------------------------------------------------------

template <class From>
void copy_values(const From* from, index_t count, float* to) {
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count)
    store_some(to + i, load_some(from + i, static_cast<int>(count - i)),
               static_cast<int>(count - i));
}

#if defined(MF_ISA_avx512_bf16)
void copy_values(const bf16_t* from, index_t count, bf16_t* to) {
  constexpr index_t kStep = 32;
  index_t i = 0;
  for (; i + kStep <= count; i += kStep) store_as(to + i, load_as<__m512i>(from + i));
  const __mmask32 rest = (1u << (count - i)) - 1u;
  will_load(from + i, static_cast<int>(count - i));
  will_store(to + i, static_cast<int>(count - i));
  _mm512_mask_storeu_epi16(to + i, rest, _mm512_maskz_loadu_epi16(rest, from + i));
}
#endif

template <class From, class T>
void copy_row(const From* row, const std::int32_t* source, index_t columns, index_t channels,
              T* to) {
  for (index_t q = 0; q < columns;) {
    index_t end = q + 1;
    if (source[q] < 0) {
      while (end < columns && source[end] < 0) ++end;
      for (index_t i = q * channels; i < end * channels; ++i) to[i] = T{};
    } else {
      while (end < columns && source[end] == source[q] + (end - q)) ++end;
      copy_values(row + source[q] * channels, (end - q) * channels, to + q * channels);
    }
    q = end;
  }
}

// Runs of `length` elements, one a pixel, in whole pieces of 32 bytes: more is read and written.
template <int kPieces, class T>
void copy_runs(const T* from, index_t step, index_t pixels, T* to, index_t to_step) {
  typedef std::uint8_t piece __attribute__((vector_size(32)));
  constexpr index_t kPiece = 32 / sizeof(T);
  for (index_t i = 0; i < pixels; ++i, from += step, to += to_step) MF_UNROLL
  for (int k = 0; k < kPieces; ++k) store_as(to + k * kPiece, load_as<piece>(from + k * kPiece));
}

template <class T>
void copy_runs(const T* from, index_t step, index_t length, index_t pixels, T* to,
               index_t to_step) {
  constexpr index_t kPiece = 32 / sizeof(T);
  for (; length > 2 * kPiece; length -= 2 * kPiece, from += 2 * kPiece, to += 2 * kPiece)
    copy_runs<2>(from, step, pixels, to, to_step);
  if (length > kPiece)
    copy_runs<2>(from, step, pixels, to, to_step);
  else
    copy_runs<1>(from, step, pixels, to, to_step);
}

// --- an item
// ----------------------------------------------------------------------------------------------------

template <class T>
class Item {
 public:
  Item(const StripParams& p, const StripItem& item, void* memory)
      : p_(p), item_(item), frames_(p.t), strips_(static_cast<T*>(memory)) {
    frame_ = strip_span(p.h, p.rows) * p.strip_length;
    rows_ = item.row_end - item.row_begin;
    columns_ = item.column_end - item.column_begin;
    tap_runs_ = p.run == StripRun::channels ? p.h.kernel * p.w.kernel
                : p.run == StripRun::row    ? p.h.kernel
                                            : 1;
    zeros_ = strips_ + frame_;
    folded_ = zeros_ + p.strip_length;
    if (p.run == StripRun::frame)
      for (index_t i = 0; i < p.strip_length; ++i) zeros_[i] = T{};
  }

  void run() {
    for (t_ = item_.t_begin; t_ < item_.t_end; ++t_) {
      if (p_.copied)
        frames_.meet(t_, [this](index_t slot, index_t frame) { copy(slot, frame); });
      else
        frames_.look_at(t_);
      for (index_t block = 0; block < ceil_div(p_.produce, kColumns); ++block) multiply(block);
    }
  }

 private:
  static constexpr index_t kColumns = kVectors * kLanes;

  // --- sources

  void copy(index_t slot, index_t frame) {
    T* strips = p_.run == StripRun::frame ? strips_ : strips_ + slot * frame_;
    const index_t columns = strip_span(p_.w, columns_);
    for (index_t q = 0; q < strip_span(p_.h, rows_); ++q)
      if (row(q) >= 0) copy_strip(frame, row(q), columns, strips + q * p_.strip_length);
    if (p_.run == StripRun::frame) fold(folded(slot));
  }
  // Of the q-th padded row of the item.
  std::int32_t row(index_t q) const { return p_.h.source[item_.row_begin * p_.h.stride + q]; }
  T* folded(index_t slot) const { return folded_ + slot * p_.rows * p_.columns * p_.fold_length; }

  void copy_strip(index_t t, index_t h, index_t columns, T* to) {
    const std::int32_t* source = p_.w.source + item_.column_begin * p_.w.stride;
    if constexpr (kChained<T>) {
      if (p_.source_type == DType::f32)
        copy_row(row_of<const float>(p_.source, item_.n, t, h), source, columns, p_.reduce, to);
      else if (p_.source_type == DType::bf16)
        copy_row(row_of<const bf16_t>(p_.source, item_.n, t, h), source, columns, p_.reduce, to);
      else
        copy_row(row_of<const f16_t>(p_.source, item_.n, t, h), source, columns, p_.reduce, to);
    } else {
      copy_row(row_of<const T>(p_.source, item_.n, t, h), source, columns, p_.reduce, to);
    }
  }

  // Each pixel's rows of taps side by side, in rising order: copies reach beyond their end.
  void fold(T* to) {
    const index_t length = p_.w.kernel * p_.reduce, step = p_.w.stride * p_.reduce;
    const bool odd =
        p_.h.kernel * length < p_.run_length;  // of pairs: the last one's second is zero
    for (index_t r = 0; r < rows_; ++r, to += columns_ * p_.fold_length) {
      for (index_t kh = 0; kh < p_.h.kernel; ++kh) {
        const index_t q = r * p_.h.stride + kh * p_.h.dilation;
        copy_runs(row(q) < 0 ? zeros_ : strips_ + q * p_.strip_length, step, length, columns_,
                  to + kh * length, p_.fold_length);
      }
      for (index_t i = 0; odd && i < columns_; ++i)
        to[i * p_.fold_length + p_.run_length - 1] = T{};
    }
  }

  // --- runs and their weights

  index_t block_columns(index_t block) const {
    const index_t left = round_up(p_.produce, index_t{kLanes}) - block * kColumns;
    return left < kColumns ? left : kColumns;
  }
  const T* panel(index_t block, index_t run) const {
    return static_cast<const T*>(p_.packed) +
           (block * kColumns * p_.t.kernel * tap_runs_ + run * block_columns(block)) *
               p_.run_length;
  }
  index_t tap(const StripAxis& a, index_t k) const { return p_.mirrored ? a.kernel - 1 - k : k; }

  void multiply(index_t block) {
    Run runs[kMostStripRuns];
    if (p_.run == StripRun::frame) {
      int count = 0;
      for (index_t kt = 0; kt < p_.t.kernel; ++kt)
        if (frames_.source(kt) >= 0)
          runs[count++] = {folded(frames_.slot(kt)), panel(block, tap(p_.t, kt)), p_.run_length};
      // Rows are one where their results are neighbors, too.
      if (columns_ == p_.target.width)
        return multiply(block, runs, count, p_.fold_length, 0, rows_ * columns_);
      for (index_t r = 0; r < rows_; ++r) {
        multiply(block, runs, count, p_.fold_length, r, columns_);
        for (int i = 0; i < count; ++i)
          runs[i].pixels = static_cast<const T*>(runs[i].pixels) + columns_ * p_.fold_length;
      }
      return;
    }
    for (index_t r = 0; r < rows_; ++r) {
      const int count = row_runs(r, block, runs);
      multiply(block, runs, count, p_.w.stride * p_.reduce, r, columns_);
    }
  }

  // The runs that meet target row r.
  int row_runs(index_t r, index_t block, Run* runs) const {
    int count = 0;
    const bool by_taps = p_.run == StripRun::channels;
    const index_t across = by_taps ? p_.w.kernel : 1;
    for (index_t kt = 0; kt < p_.t.kernel; ++kt)
      for (index_t kh = 0; kh < p_.h.kernel && frames_.source(kt) >= 0; ++kh) {
        const index_t q = r * p_.h.stride + kh * p_.h.dilation;
        if (row(q) < 0) continue;
        const T* pixels = p_.copied
                              ? strips_ + frames_.slot(kt) * frame_ + q * p_.strip_length
                              : row_of<const T>(p_.source, item_.n, frames_.source(kt), row(q)) +
                                    p_.w.source[item_.column_begin * p_.w.stride] * p_.reduce;
        const index_t first = (tap(p_.t, kt) * p_.h.kernel + tap(p_.h, kh)) * across;
        for (index_t kw = 0; kw < across; ++kw)
          runs[count++] = {pixels + kw * p_.w.dilation * p_.reduce,
                           panel(block, first + (by_taps ? tap(p_.w, kw) : 0)), p_.run_length};
      }
    return count;
  }

  // --- products

  void multiply(index_t block, const Run* runs, int count, index_t step, index_t r,
                index_t pixels) const {
    const index_t lanes = block_columns(block), channel = block * kColumns;
    const index_t channels = p_.produce - channel < lanes ? p_.produce - channel : lanes;
    Work w{runs, count, step, nullptr, nullptr, nullptr, p_.target.channels, 0, p_.target_type};
    w.rest = static_cast<int>(channels - (lanes - kLanes));
    const index_t h = item_.row_begin + r;
    const index_t at = item_.column_begin * p_.target.channels + channel;
    switch (p_.target_type) {
      case DType::f32:
        place<float>(w, h, at, channel);
        break;
      case DType::bf16:
        place<bf16_t>(w, h, at, channel);
        break;
      case DType::f16:
        place<f16_t>(w, h, at, channel);
        break;
    }
    run_tiles<T>(static_cast<int>(lanes / kLanes), w, pixels);
  }

  template <class To>
  void place(Work& w, index_t h, index_t at, index_t channel) const {
    w.y = row_of<To>(p_.target, item_.n, t_, h) + at;
    if (p_.bias) w.bias = static_cast<const To*>(p_.bias) + channel;
    if (p_.residual.late) w.residual = row_of<const To>(p_.residual, item_.n, t_, h) + at;
  }

  const StripParams& p_;
  const StripItem& item_;
  Frames frames_;
  T *strips_, *zeros_, *folded_;
  index_t frame_, rows_, columns_, tap_runs_;
  index_t t_ = 0;
};

}  // namespace

void conv3d_strip(const StripParams& params, const StripItem& item, void* memory) {
#if defined(MF_ISA_avx512_bf16)
  if (params.work_type == DType::bf16) return Item<bf16_t>(params, item, memory).run();
#endif
  Item<float>(params, item, memory).run();
}

}  // namespace MF_ISA
}  // namespace magvit_fast
