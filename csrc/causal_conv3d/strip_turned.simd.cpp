// causal_conv3d, for AVX-512-bf16: few results of bfloat16, with neighboring pixels along vectors.
// Previous hop: cpu_strip.cpp.
// Next hop: none.
//
// Up to 4 results fill no vector, so here pixels do: source rows are turned to [pairs of channels]
// [pixels][2], a register tile is up to 4 results x 4 vectors of pixels, and each pair of weights
// is broadcast. A tap along the row is the same strip read from the next pixel.
//
// 16->3, 3x3x3, 17x64x64, two threads: floor 0.36 ms; vectors along the sum (gather.simd.cpp) 1.9,
// this 0.53. 128->3: floor 2.9; 5.8 and 4.6. In float32 it was no faster (16->3: 1.6 and 1.8) or
// slower (128->3: 11 and 16), so it is not there: strips are twice as large and leave the L1 cache.
#include "causal_conv3d/strip_frames.h"
#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
#if defined(MF_ISA_avx512_bf16)
namespace {

// --- turning
// ----------------------------------------------------------------------------------------------------

// to[c * to_step + i] = from[i * from_step + c], elements of 4 bytes at any address; 4 x 4 at a
// time.
void turn(const char* from, index_t from_step, index_t rows, index_t count, std::uint32_t* to,
          index_t to_step) {
  typedef std::uint32_t v4 __attribute__((vector_size(16)));
  index_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const char* row = from + i * from_step;
    index_t c = 0;
    for (; c + 4 <= count; c += 4) {
      v4 in[4];
      for (int k = 0; k < 4; ++k) in[k] = load_as<v4>(row + k * from_step + c * 4);
      const v4 low0 = __builtin_shuffle(in[0], in[1], v4{0, 4, 1, 5});
      const v4 low1 = __builtin_shuffle(in[2], in[3], v4{0, 4, 1, 5});
      const v4 high0 = __builtin_shuffle(in[0], in[1], v4{2, 6, 3, 7});
      const v4 high1 = __builtin_shuffle(in[2], in[3], v4{2, 6, 3, 7});
      store_as(to + c * to_step + i, __builtin_shuffle(low0, low1, v4{0, 1, 4, 5}));
      store_as(to + (c + 1) * to_step + i, __builtin_shuffle(low0, low1, v4{2, 3, 6, 7}));
      store_as(to + (c + 2) * to_step + i, __builtin_shuffle(high0, high1, v4{0, 1, 4, 5}));
      store_as(to + (c + 3) * to_step + i, __builtin_shuffle(high0, high1, v4{2, 3, 6, 7}));
    }
    for (; c < count; ++c)
      for (int k = 0; k < 4; ++k)
        to[c * to_step + i + k] = load_as<std::uint32_t>(row + k * from_step + c * 4);
  }
  for (; i < rows; ++i)
    for (index_t c = 0; c < count; ++c)
      to[c * to_step + i] = load_as<std::uint32_t>(from + i * from_step + c * 4);
}

// --- an item
// ----------------------------------------------------------------------------------------------------

class TurnedItem {
 public:
  TurnedItem(const StripParams& p, const StripItem& item, void* memory)
      : p_(p), item_(item), frames_(p.t), strips_(static_cast<std::uint32_t*>(memory)) {
    rows_ = item.row_end - item.row_begin;
    columns_ = item.column_end - item.column_begin;
    pairs_ = ceil_div(p.reduce, index_t{2});
    strip_ = pairs_ * p.strip_columns;
    for (index_t i = 0; i < columns_ * p.produce; ++i)
      bias_[i] = p.bias ? to_float(static_cast<const bf16_t*>(p.bias)[i % p.produce]) : 0.0f;
  }

  void run() {
    for (t_ = item_.t_begin; t_ < item_.t_end; ++t_) {
      frames_.meet(t_, [this](index_t slot, index_t frame) { copy(slot, frame); });
      for (index_t r = 0; r < rows_; ++r) switch (p_.produce) {
          case 1:
            add_row<1>(r);
            break;
          case 2:
            add_row<2>(r);
            break;
          case 3:
            add_row<3>(r);
            break;
          default:
            add_row<4>(r);
        }
    }
  }

 private:
  static constexpr index_t kWide = kVectors * kLanes;

  std::int32_t row(index_t q) const { return p_.h.source[item_.row_begin * p_.h.stride + q]; }
  std::uint32_t* strip(index_t slot, index_t q) const {
    return strips_ + (slot * strip_span(p_.h, p_.rows) + q) * strip_;
  }
  index_t tap(const StripAxis& a, index_t k) const { return p_.mirrored ? a.kernel - 1 - k : k; }

  void copy(index_t slot, index_t frame) {
    const std::int32_t* source = p_.w.source + item_.column_begin;
    const index_t columns = strip_span(p_.w, columns_);
    for (index_t q = 0; q < strip_span(p_.h, rows_); ++q) {
      if (row(q) < 0) continue;
      const bf16_t* from = row_of<const bf16_t>(p_.source, item_.n, frame, row(q));
      std::uint32_t* to = strip(slot, q);
      for (index_t c = 0; c < columns;) {
        index_t end = c + 1;
        if (source[c] < 0) {
          for (index_t e = 0; e < pairs_; ++e) to[e * p_.strip_columns + c] = 0;
        } else {
          while (end < columns && source[end] == source[c] + (end - c)) ++end;
          copy_run(from + source[c] * p_.reduce, end - c, to + c);
        }
        c = end;
      }
    }
  }

  void copy_run(const bf16_t* from, index_t columns, std::uint32_t* to) const {
    const index_t whole = p_.reduce / 2;
    const index_t step = p_.reduce * static_cast<index_t>(sizeof(bf16_t));
    turn(reinterpret_cast<const char*>(from), step, columns, whole,
         reinterpret_cast<std::uint32_t*>(to), p_.strip_columns);
    if (whole < pairs_)  // a single last channel, with a zero
      for (index_t i = 0; i < columns; ++i)
        to[whole * p_.strip_columns + i] = from[i * p_.reduce + p_.reduce - 1].bits;
  }

  template <int N>
  void add_row(index_t r) {
    for (index_t c = 0; c < columns_;) {
      const bool wide = columns_ - c > kWide / 2;
      if (wide)
        add_pixels<N, kVectors>(r, c);
      else
        add_pixels<N, 1>(r, c);
      c += wide ? kWide : index_t{kLanes};
    }
  }

  template <int N, int V>
  __attribute__((noinline)) void add_pixels(index_t r, index_t column) {
    vf acc[N][V] = {};
    const auto* weights = static_cast<const std::uint32_t*>(p_.packed);
    for (index_t kt = 0; kt < p_.t.kernel; ++kt)
      for (index_t kh = 0; kh < p_.h.kernel && frames_.source(kt) >= 0; ++kh) {
        const index_t q = r * p_.h.stride + kh * p_.h.dilation;
        if (row(q) < 0) continue;
        const std::uint32_t* pixels = strip(frames_.slot(kt), q) + column;
        const index_t taps = (tap(p_.t, kt) * p_.h.kernel + tap(p_.h, kh)) * p_.w.kernel;
        multiply<N, V>(acc, pixels, weights + taps * pairs_ * N);
      }
    float sums[N * V * kLanes];
    flush(acc, sums, false);
    write<N, V>(r, column, sums);
  }

  template <int N, int V>
  inline __attribute__((always_inline)) void multiply(vf (&acc)[N][V], const std::uint32_t* pixels,
                                                      const std::uint32_t* weights) const {
    const index_t step = p_.strip_columns;
    for (index_t kw = 0; kw < p_.w.kernel; ++kw) {
      const std::uint32_t* from = pixels + kw * p_.w.dilation;
      const std::uint32_t* w = weights + tap(p_.w, kw) * pairs_ * N;
      for (index_t pair = 0; pair < pairs_; ++pair, from += step, w += N) {
        __m512bh v[V];
        MF_UNROLL
        for (int j = 0; j < V; ++j) {
          v[j] = load_as<__m512bh>(from + j * kLanes);
          asm("" : "+v"(v[j]));  // or gcc loads it again for every result, across two cache lines
        }
        MF_UNROLL
        for (int n = 0; n < N; ++n) {
          const __m512bh weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[n]));
          MF_UNROLL
          for (int j = 0; j < V; ++j)
            acc[n][j] = (vf)_mm512_dpbf16_ps((__m512)acc[n][j], v[j], weight);
        }
      }
    }
  }

  // sums [N][pixels] to [pixels][N] of the result, with bias and residual.
  template <int N, int V>
  void write(index_t r, index_t column, const float* sums) const {
    float turned[N * V * kLanes];
    for (int i = 0; i < V * kLanes; ++i)
      for (int n = 0; n < N; ++n) turned[i * N + n] = sums[n * V * kLanes + i];
    const index_t left = (columns_ - column) * N, all = N * V * kLanes;
    const index_t count = left < all ? left : all;
    const index_t h = item_.row_begin + r, at = (item_.column_begin + column) * N;
    bf16_t* y = row_of<bf16_t>(p_.target, item_.n, t_, h) + at;
    const bf16_t* residual =
        p_.residual.late ? row_of<const bf16_t>(p_.residual, item_.n, t_, h) + at : nullptr;
    const float* bias = bias_ + column * N;
    for (index_t i = 0; i < count; i += kLanes) {
      const int some = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
      vf v = load(turned + i);
      if (some == kLanes) {
        v += load(bias + i);
        store(y + i, residual ? v + load(residual + i) : v);
      } else {
        v += load_some(bias + i, some);
        store_some(y + i, residual ? v + load_some(residual + i, some) : v, some);
      }
    }
  }

  const StripParams& p_;
  const StripItem& item_;
  Frames frames_;
  std::uint32_t* strips_;
  index_t rows_, columns_, pairs_, strip_;
  index_t t_ = 0;
  float bias_[kTurnedColumns * kNarrow];
};

}  // namespace
#endif

void conv3d_strip_turned([[maybe_unused]] const StripParams& params,
                         [[maybe_unused]] const StripItem& item, [[maybe_unused]] void* memory) {
#if defined(MF_ISA_avx512_bf16)
  TurnedItem(params, item, memory).run();
#endif  // other levels are never asked: strip_serves
}

}  // namespace MF_ISA
}  // namespace magvit_fast
