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
// Ladder: as in grouped.simd.cpp; 16-bit types are widened, so their floor is 1.0, too.
//
//   channels a group                      1      2      4      8
//   v0  packed lines, float32           112     24      9.5    3.6
//       bfloat16                         60     14      4.7    1.9
//   v1  this one, float32                 2.9    2.6    2.1    1.8
//       bfloat16                          2.7    1.9    1.8    1.6
#include "causal_conv3d/grouped.h"
#include "causal_conv3d/lanes.h"
#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// A row of dy, and the source row that a (kt, kh) meets; both at the first channel of a vector.
struct Rows {
  const void *dy, *source;
  index_t width;
  index_t vector;
  float* sums;  // [vector][tap][unit][lane], at the first tap of the row
};

template <class T, bool kSpread, int NV, int K>
struct Row {
  const GroupedGradParams& p;
  const Spread& spread;
  const Rows& r;
  index_t channels, source_channels;
  index_t vector_sums;  // floats
  int lanes[NV], sources[NV];

  Row(const GroupedGradParams& params, const Spread& lane, const Rows& rows)
      : p(params), spread(lane), r(rows) {
    const GroupLanes& l = p.lanes;
    channels = p.output.channels, source_channels = p.source.channels;
    vector_sums = p.kernel_t * p.kernel_h * p.kernel_w * K * kLanes;
    for (int j = 0; j < NV; ++j) {
      lanes[j] = static_cast<int>(l.count(r.vector + j) * l.produce);
      sources[j] = static_cast<int>(l.count(r.vector + j) * l.units);
    }
  }

  inline __attribute__((always_inline)) vf dy(index_t pixel, int j) const {
    const T* row = static_cast<const T*>(r.dy) + j * p.lanes.together * p.lanes.produce;
    return load_lanes(row + pixel * channels, lanes[j]);
  }
  inline __attribute__((always_inline)) vf source(std::int32_t column, int j) const {
    const T* row = static_cast<const T*>(r.source) + j * p.lanes.together * p.lanes.reduce;
    return load_lanes(row + column * source_channels, sources[j]);
  }
  inline __attribute__((always_inline)) vf unit(vf v, int k) const {
    return kSpread ? __builtin_shuffle(v, spread.lane[k]) : v;
  }
  inline __attribute__((always_inline)) void add(index_t tap, int j, int k, vf v) const {
    float* to = r.sums + j * vector_sums + (tap * K + k) * kLanes;
    store(to, load(to) + v);
  }

  void add_window() const {
    vf acc[3][NV][K] = {};
    vf last[NV] = {}, before[NV] = {};  // of dy
    for (index_t q = 0; q < r.width + 2; ++q) {
      const std::int32_t column = p.w_source[q];
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        const vf now = q < r.width ? dy(q, j) : vf{};
        if (column >= 0) {
          const vf pixel = source(column, j);
          MF_UNROLL
          for (int k = 0; k < K; ++k) {
            const vf x = unit(pixel, k);
            acc[0][j][k] += x * now;
            acc[1][j][k] += x * last[j];
            acc[2][j][k] += x * before[j];
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
        const vf pixel = source(column, j), now = dy(o, j);
        MF_UNROLL
        for (int k = 0; k < K; ++k) acc[j][k] += unit(pixel, k) * now;
      }
    }
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {
      MF_UNROLL
      for (int k = 0; k < K; ++k) add(tap, j, k, acc[j][k]);
    }
  }
};

template <class T, bool kSpread, int NV, int K>
void add_row(const GroupedGradParams& p, const Spread& spread, const Rows& rows) {
  const Row<T, kSpread, NV, K> row(p, spread, rows);
  if (p.kernel_w == 3 && p.stride_w == 1 && p.dilation_w == 1) return row.add_window();
  for (index_t tap = 0; tap < p.kernel_w; ++tap) row.add_tap(tap);
}

template <class T>
class Item {
 public:
  Item(const GroupedGradParams& p, const GroupedGradItem& item, float* sums)
      : p_(p), item_(item), spread_(p.lanes), sums_(sums) {}

  void run() {
    const index_t vectors = item_.vector_end - item_.vector_begin;
    const index_t size = p_.kernel_t * p_.kernel_h * p_.kernel_w * p_.lanes.units * kLanes;
    for (index_t i = 0; i < vectors * size; i += kLanes) store(sums_ + i, vf{});
    const index_t most = p_.lanes.spread ? 1 : kVectors;
    for (index_t v = 0; v < vectors;) {
      const index_t left = vectors - v, count = left >= most ? most : left >= 2 ? 2 : 1;
      for (index_t row = item_.row_begin; row < item_.row_end; ++row)
        add_taps(row, item_.vector_begin + v, count, sums_ + v * size);
      v += count;
    }
  }

 private:
  // The taps of every (kt, kh) for a row of dy.
  void add_taps(index_t row, index_t vector, index_t count, float* sums) {
    const index_t height = p_.output.height,
                  frames = p_.output.early_frames + p_.output.late_frames;
    const index_t h = row % height, t = row / height % frames, n = row / height / frames;
    const GroupLanes& l = p_.lanes;
    const T* dy = row_of<const T>(p_.output, n, t, h) + vector * l.together * l.produce;
    for (index_t kt = 0; kt < p_.kernel_t; ++kt)
      for (index_t kh = 0; kh < p_.kernel_h; ++kh) {
        float* to = sums + (kt * p_.kernel_h + kh) * p_.kernel_w * l.units * kLanes;
        const std::int32_t in_t = p_.t_source[kt * frames + t];
        const std::int32_t in_h = p_.h_source[kh * height + h];
        if (in_t < 0 || in_h < 0) continue;
        const T* source =
            row_of<const T>(p_.source, n, in_t, in_h) + vector * l.together * l.reduce;
        add(count, {dy, source, p_.output.width, vector, to});
      }
  }

  template <int K>
  void add_spread(const Rows& rows) {
    add_row<T, true, 1, K>(p_, spread_, rows);
  }

  void add(index_t count, const Rows& rows) {
    if (!p_.lanes.spread) {
      if constexpr (kVectors >= 4)
        if (count == 4) return add_row<T, false, 4, 1>(p_, spread_, rows);
      return count == 2 ? add_row<T, false, 2, 1>(p_, spread_, rows)
                        : add_row<T, false, 1, 1>(p_, spread_, rows);
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
      return Item<float>(params, item, sums).run();
    case DType::bf16:
      return Item<bf16_t>(params, item, sums).run();
    case DType::f16:
      return Item<f16_t>(params, item, sums).run();
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
