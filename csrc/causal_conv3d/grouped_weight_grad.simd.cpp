// causal_conv3d, one source per instruction set: the weight gradient of groups of few channels.
// Previous hop: cpu_grouped_weight_grad.cpp.
// Next hop: none.
//
// Lanes are channels of dy, and every unit of a group is a sum of its own: a row of dy times the
// source row of a (kt, kh), pixel by pixel. For a row of three taps (stride and dilation 1) each
// source pixel is loaded, widened and permuted once and meets the last three pixels of dy, which
// stay in registers; elsewhere taps are summed one by one. A row is a chain of its own, so float32
// errors do not grow with the number of all pixels.
//
// Ladder: as in grouped.simd.cpp.
//
//   channels a group                      1      2      4      8
//   v0  packed lines, float32           112     24      9.5    3.6
//       bfloat16                         60     14      4.7    1.9
//   v1  this one, float32                 2.9    2.6    2.1    1.8
//       bfloat16, widened                 2.7    1.9    1.8    1.6
//   v2  whole vectors without masks       2.1           1.6    1.5
//       bfloat16 by pairs of rows         1.6           1.0    0.90
#include "causal_conv3d/grouped.h"
#include "causal_conv3d/lanes.h"
#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// A row of dy, and the source row that a (kt, kh) meets, both at the first channel of a vector. Of
// joined rows two each; null for a row of zeros.
template <class T>
struct Rows {
  const T *dy[2], *source[2];
  index_t width;
  index_t vector;
  float* sums;  // [vector][tap][unit][lane], at the first tap of the row
};

// Rows one by one.
template <class Storage>
struct Single : Widened<Storage> {
  static constexpr index_t kRows = 1;
  static vf join(const Storage* a, const Storage*) { return load(a); }
  static vf join(const Storage* a, const Storage*, int n) { return load_lanes(a, n); }
};

#if defined(MF_ISA_avx512_bf16)
// Two rows at a time: every lane holds a pixel of both, and a product adds up the two.
struct Joined : Paired {
  static constexpr index_t kRows = 2;
  static vi bits(const bf16_t* p, int n) {
    return p ? (vi)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)) : vi{};
  }
  static vi join(const bf16_t* a, const bf16_t* b) {
    const vi low = a ? (vi)_mm512_cvtepu16_epi32(load_as<__m256i>(a)) : vi{};
    return b ? low | ((vi)_mm512_cvtepu16_epi32(load_as<__m256i>(b)) << 16) : low;
  }
  static vi join(const bf16_t* a, const bf16_t* b, int n) {
    return bits(a, n) | (bits(b, n) << 16);
  }
};
#endif

template <class P, GroupSource kSource, int NV, int K>
struct Row {
  typedef typename P::T T;
  typedef typename P::Vector Vector;

  const GroupedGradParams& p;
  const Spread& spread;
  const Rows<T>& r;
  index_t channels, source_channels;
  index_t vector_sums;  // floats
  int lanes[NV], sources[NV];

  Row(const GroupedGradParams& params, const Spread& lane, const Rows<T>& rows)
      : p(params), spread(lane), r(rows) {
    const GroupLanes& l = p.lanes;
    channels = p.output.channels, source_channels = p.source.channels;
    vector_sums = p.kernel_t * p.kernel_h * p.kernel_w * K * kLanes;
    for (int j = 0; j < NV; ++j) {
      lanes[j] = static_cast<int>(l.count(r.vector + j) * l.produce);
      sources[j] = static_cast<int>(l.count(r.vector + j) * l.units);
    }
  }

  static Vector join(const T* a, const T* b, int n) {
    return kSource == GroupSource::pixel ? P::join(a, b) : P::join(a, b, n);
  }
  static const T* at(const T* row, index_t offset) { return row ? row + offset : nullptr; }
  inline __attribute__((always_inline)) Vector dy(index_t pixel, int j) const {
    const index_t offset = pixel * channels + j * p.lanes.together * p.lanes.produce;
    return join(at(r.dy[0], offset), at(r.dy[1], offset), lanes[j]);
  }
  inline __attribute__((always_inline)) Vector source(std::int32_t column, int j) const {
    const index_t offset = column * source_channels + j * p.lanes.together * p.lanes.reduce;
    return join(at(r.source[0], offset), at(r.source[1], offset), sources[j]);
  }
  inline __attribute__((always_inline)) Vector unit(Vector v, int k) const {
    return kSource == GroupSource::spread ? P::spread(v, spread.lane[k]) : v;
  }
  inline __attribute__((always_inline)) void add(index_t tap, int j, int k, vf v) const {
    float* to = r.sums + j * vector_sums + (tap * K + k) * kLanes;
    store(to, load(to) + v);
  }

  // Every step-th pixel from the first on, three neighbors of which meet each source pixel.
  void add_window(index_t first, index_t step) const {
    vf acc[3][NV][K] = {};
    Vector last[NV] = {}, before[NV] = {};  // of dy
    for (index_t q = first; q < r.width + 2 * step; q += step) {
      const std::int32_t column = p.w_source[q];
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        const Vector now = q < r.width ? dy(q, j) : Vector{};
        if (column >= 0) {
          const Vector pixel = source(column, j);
          MF_UNROLL
          for (int k = 0; k < K; ++k) {
            const Vector x = unit(pixel, k);
            acc[0][j][k] = P::multiply_add(acc[0][j][k], x, now);
            acc[1][j][k] = P::multiply_add(acc[1][j][k], x, last[j]);
            acc[2][j][k] = P::multiply_add(acc[2][j][k], x, before[j]);
          }
        }
        before[j] = last[j], last[j] = now;
      }
    }
    MF_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        MF_UNROLL
        for (int k = 0; k < K; ++k) add(tap, j, k, acc[tap][j][k]);
      }
    }
  }

  void add_tap(index_t tap) const {
    vf acc[NV][K] = {};
    const std::int32_t* columns = p.w_source + tap * p.dilation_w;
    for (index_t o = 0; o < r.width; ++o) {
      const std::int32_t column = columns[o * p.stride_w];
      if (column < 0) continue;
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        const Vector pixel = source(column, j), now = dy(o, j);
        MF_UNROLL
        for (int k = 0; k < K; ++k) acc[j][k] = P::multiply_add(acc[j][k], unit(pixel, k), now);
      }
    }
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {
      MF_UNROLL
      for (int k = 0; k < K; ++k) add(tap, j, k, acc[j][k]);
    }
  }
};

template <class P, GroupSource kSource, int NV, int K>
void add_row(const GroupedGradParams& p, const Spread& spread, const Rows<typename P::T>& rows) {
  const Row<P, kSource, NV, K> row(p, spread, rows);
  if (p.kernel_w == 3 && p.stride_w == 1) {
    for (index_t first = 0; first < p.dilation_w; ++first) row.add_window(first, p.dilation_w);
    return;
  }
  for (index_t tap = 0; tap < p.kernel_w; ++tap) row.add_tap(tap);
}

template <class P>
class Item {
  typedef typename P::T T;

 public:
  Item(const GroupedGradParams& p, const GroupedGradItem& item, float* sums)
      : p_(p), item_(item), spread_(p.lanes), sums_(sums) {}

  void run() {
    const index_t vectors = item_.vector_end - item_.vector_begin;
    const index_t size = p_.kernel_t * p_.kernel_h * p_.kernel_w * p_.lanes.units * kLanes;
    for (index_t i = 0; i < vectors * size; i += kLanes) store(sums_ + i, vf{});
    for (index_t v = 0; v < vectors;) {
      index_t count = 1;
      GroupSource source = p_.lanes.source;
      if (source == GroupSource::pixel) {
        index_t whole = vectors - v;
        if (p_.lanes.lanes(item_.vector_end - 1) < p_.lanes.width) --whole;
        if (whole == 0) source = GroupSource::tail;
        count = whole >= kVectors ? kVectors : whole >= 2 ? 2 : 1;
      }
      for (index_t row = item_.row_begin; row < item_.row_end; ++row)
        add_taps(source, row, item_.vector_begin + v, count, sums_ + v * size);
      v += count;
    }
  }

 private:
  // The taps of every (kt, kh) for a row of dy, or two.
  void add_taps(GroupSource kind, index_t row, index_t vector, index_t count, float* sums) {
    const index_t height = p_.output.height, lines = ceil_div(height, P::kRows);
    const index_t frames = p_.output.early_frames + p_.output.late_frames;
    const index_t h = row % lines * P::kRows, t = row / lines % frames, n = row / lines / frames;
    const GroupLanes& l = p_.lanes;
    const index_t out = l.channel(vector), in = l.group(vector) * l.reduce;
    Rows<T> rows{{}, {}, p_.output.width, vector, nullptr};
    for (index_t i = 0; i < P::kRows && h + i < height; ++i)
      rows.dy[i] = row_of<const T>(p_.output, n, t, h + i) + out;
    for (index_t kt = 0; kt < p_.kernel_t; ++kt) {
      const std::int32_t frame = p_.t_source[kt * frames + t];
      for (index_t kh = 0; kh < p_.kernel_h && frame >= 0; ++kh) {
        for (index_t i = 0; i < P::kRows; ++i) {
          const std::int32_t line = h + i < height ? p_.h_source[kh * height + h + i] : -1;
          rows.source[i] = line < 0 ? nullptr : row_of<const T>(p_.source, n, frame, line) + in;
        }
        if (!rows.source[0] && !rows.source[1]) continue;
        rows.sums = sums + (kt * p_.kernel_h + kh) * p_.kernel_w * l.units * kLanes;
        add(kind, count, rows);
      }
    }
  }

  template <int K>
  void add_spread(const Rows<T>& rows) {
    add_row<P, GroupSource::spread, 1, K>(p_, spread_, rows);
  }

  void add(GroupSource source, index_t count, const Rows<T>& rows) {
    if (source == GroupSource::tail) return add_row<P, GroupSource::tail, 1, 1>(p_, spread_, rows);
    if (source == GroupSource::pixel) {
      if constexpr (kVectors >= 4)
        if (count == 4) return add_row<P, GroupSource::pixel, 4, 1>(p_, spread_, rows);
      return count == 2 ? add_row<P, GroupSource::pixel, 2, 1>(p_, spread_, rows)
                        : add_row<P, GroupSource::pixel, 1, 1>(p_, spread_, rows);
    }
    static_assert(kMaxUnits == 8, "one case a number of units");
    switch (p_.lanes.units) {
      case 1:
        return add_spread<1>(rows);
      case 2:
        return add_spread<2>(rows);
      case 3:
        return add_spread<3>(rows);
      case 4:
        return add_spread<4>(rows);
      default:
        break;
    }
    if constexpr (kLanes >= 2 * kMaxUnits) switch (p_.lanes.units) {
        case 5:
          return add_spread<5>(rows);
        case 6:
          return add_spread<6>(rows);
        case 7:
          return add_spread<7>(rows);
        default:
          return add_spread<8>(rows);
      }
  }

  const GroupedGradParams& p_;
  const GroupedGradItem& item_;
  const Spread spread_;
  float* sums_;
};

}  // namespace

void conv3d_grouped_weight_grad(const GroupedGradParams& params, const GroupedGradItem& item,
                                float* sums) {
  switch (params.type) {
    case DType::f32:
      return Item<Single<float>>(params, item, sums).run();
    case DType::bf16:
#if defined(MF_ISA_avx512_bf16)
      return Item<Joined>(params, item, sums).run();
#else
      return Item<Single<bf16_t>>(params, item, sums).run();
#endif
    case DType::f16:
      return Item<Single<f16_t>>(params, item, sums).run();
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
