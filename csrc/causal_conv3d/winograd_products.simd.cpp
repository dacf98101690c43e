// causal_conv3d, one source per instruction set: Winograd's transformed weights and the products.
// Previous hop: cpu_winograd.cpp.
// Next hop: none.
//
// Ladder: forward, float32, CPU time of one thread on a busy Zen 4 machine, with the better of
// PyTorch's layouts in the same run. Floor: multiplications at FMA peak (36 points, 25 products for
// 17 frames, 7 for 5 frames).
//
//                                            128, 17x64x64   256, 17x32x32   512, 5x16x16
//   floor                                      64 ms           64 ms          18 ms
//   v1  F(4x4) over the plane, F(4) over time 174 (3.5x)      149 (3.6x)      78 (2.0x)
//   v2  lines of points asked for before they
//       are written, weights made 64 channels
//       at a time for 6 points, taps of a
//       channel side by side                  154 (3.9x)      145 (3.7x)      61 (2.7x)
//   v3  results in large pages, workspace kept 123 (4.8x)     134 (4.1x)      55 (2.9x)
//   v4  taps of the next channel asked for;
//       weights packed by 4 x 4 transposes    123             124 (4.4x)      47 (3.4x)
//   v5  packed weights kept between calls     125 (4.8x)                      42 (3.9x)
//
// What is left: rows of a set are few (32 a thread at 128 channels), so weights stream from the L3
// cache at 2 bytes a cycle; at 512 channels each transformed weight serves 16 rows, and making it
// costs half as much as using it.
#include "causal_conv3d/tile.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_points.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kTileRows = 6;
constexpr index_t kChain = kWinogradChain;

index_t block_columns(const WinogradParams& p, index_t block) {
  const index_t whole = kVectors * kLanes, left = p.produce - block * whole;
  return left < whole ? round_up(left, index_t{kLanes}) : whole;
}

// --- weights
// -------------------------------------------------------------------------------------------------

// Rows [row_begin, row_end) of points, for one input channel and one vector of columns.
template <int M>
void transform_taps(const WinogradParams& p, const WinogradLayout& layout, const float* taps,
                    index_t step, index_t row_begin, index_t row_end, float* to) {
  constexpr int N = M + 2;
  const float* next = taps + p.kernel_t * 9 * step;  // the next channel's, as far as memory is away
  for (index_t tap = 0; tap < p.kernel_t * 9; ++tap) __builtin_prefetch(next + tap * step);
  for (index_t row = row_begin; row < row_end; ++row) {
    vf column[kMaxTimeTaps][3];  // this row of points along height, of every tap in time
    for (index_t kt = 0; kt < p.kernel_t; ++kt) {
      MF_UNROLL
      for (int kw = 0; kw < 3; ++kw) {
        vf sum = {};
        MF_UNROLL
        for (int kh = 0; kh < 3; ++kh) {
          const int tap = p.mirrored ? 8 - (kh * 3 + kw) : kh * 3 + kw;
          sum += splat(Winograd<M>::kRows[row][kh]) * load(taps + (kt * 9 + tap) * step);
        }
        column[kt][kw] = sum;
      }
    }
    float* first = to + (row - row_begin) * N * layout.weight_point;
    for (index_t set = 0; set < p.sets.count; ++set) {  // the next vector's lines, far apart
      MF_UNROLL
      for (int j = 0; j < N; ++j)
        __builtin_prefetch(first + j * layout.weight_point + set * layout.weight_set + kLanes, 1);
    }
    for (index_t set = 0; set < p.sets.count; ++set) {
      vf g[3] = {}, u[N];
      for (index_t kt = 0; kt < p.kernel_t; ++kt) {
        const vf factor = splat(p.sets.taps[set][kt]);
        MF_UNROLL
        for (int kw = 0; kw < 3; ++kw) g[kw] += factor * column[kt][kw];
      }
      Winograd<M>::template weights<1, 1>(g, u);
      float* out = first + set * layout.weight_set;
      MF_UNROLL
      for (int j = 0; j < N; ++j) store(out + j * layout.weight_point, u[j]);
    }
  }
}

// --- products
// ------------------------------------------------------------------------------------------------

struct Rows {
  const float* sources;
  index_t source_row;
  const float* weights;
  index_t reduce;
  bool add;
  float* sums;
};

template <int MR, int NV>
void multiply_rows(const Rows& r) {
  vf acc[MR][NV] = {};
  const float* a[MR];
  MF_UNROLL
  for (int i = 0; i < MR; ++i) a[i] = r.sources + i * r.source_row;
  const float* b = r.weights;
  bool add = r.add;
  for (index_t left = r.reduce; left > 0;) {
    const index_t depth = left < kChain ? left : kChain;
    multiply<MR, NV>(acc, a, b, depth);
    flush(acc, r.sums, add);
    add = true;
    left -= depth;
    b += depth * NV * kLanes;
    MF_UNROLL
    for (int i = 0; i < MR; ++i) a[i] += depth;
  }
}

typedef void (*RowsFunction)(const Rows&);

template <int NV>
RowsFunction pick_rows(index_t rows) {
  switch (rows) {
    case 1:
      return multiply_rows<1, NV>;
    case 2:
      return multiply_rows<2, NV>;
    case 3:
      return multiply_rows<3, NV>;
    case 4:
      return multiply_rows<4, NV>;
    case 5:
      return multiply_rows<5, NV>;
    default:
      return multiply_rows<6, NV>;
  }
}

RowsFunction pick_rows(index_t vectors, index_t rows) {
  switch (vectors) {
    case 1:
      return pick_rows<1>(rows);
    case 2:
      return pick_rows<2>(rows);
    default:
      break;
  }
  if constexpr (kVectors == 4) return vectors == 3 ? pick_rows<3>(rows) : pick_rows<4>(rows);
  return nullptr;
}

}  // namespace

void winograd_weights(const WinogradParams& p, const WinogradLayout& layout, index_t block,
                      index_t row_begin, index_t row_end, index_t first, index_t begin, index_t end,
                      float* weights) {
  const index_t columns = block_columns(p, block), taps = p.kernel_t * 9;
  const float* packed =
      p.packed + block * kVectors * kLanes * taps * p.reduce;  // whole blocks before
  for (index_t k = begin; k < end; ++k)
    for (index_t c = 0; c < columns; c += kLanes) {
      const float* from = packed + k * taps * columns + c;
      float* to = weights + (k - first) * columns + c;
      if (p.m == 4)
        transform_taps<4>(p, layout, from, columns, row_begin, row_end, to);
      else
        transform_taps<2>(p, layout, from, columns, row_begin, row_end, to);
    }
}

void winograd_products(const WinogradParams& p, const TimeSegment& segment,
                       const WinogradLayout& layout, index_t block, index_t point_begin,
                       index_t point_end, index_t begin, index_t end, const float* sources,
                       const float* weights, float* sums) {
  const index_t columns = block_columns(p, block);
  RowsFunction function[kTileRows + 1] = {};
  for (index_t m = 1; m <= kTileRows; ++m) function[m] = pick_rows(columns / kLanes, m);
  for (index_t point = point_begin; point < point_end; ++point)
    for (index_t i = 0; i < segment.runs; ++i) {
      const TimeRun& run = segment.run[i];
      const index_t rows = run.count * layout.tiles, tiles = ceil_div(rows, index_t{kTileRows});
      const float* from = sources + point * layout.source_point +
                          run.source * layout.tiles * layout.source_row + begin;
      const float* panel =
          weights + (point - point_begin) * layout.weight_point + run.set * layout.weight_set;
      float* to = sums + point * layout.sum_point + run.sum * layout.tiles * columns;
      for (index_t t = 0; t < tiles; ++t) {
        const index_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
        function[count]({from + first * layout.source_row, layout.source_row, panel, end - begin,
                         run.add || begin > 0, to + first * columns});
      }
    }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
