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
//   v6  weights of one set at all points at
//       once, for half as many columns         as v5          as v5           31 (5.4x)
//
// v6 at 512 channels: packed weights were read once for every row of points, six times in all, and
// went through the time factors anew each time: 784 cycles a channel, row and vector of columns.
// Now they are read once, and a set costs 214 (150 without memory: 81 sums, and 36 stores of two
// cycles). What is left: products at 85 % of the FMA peak (rows of a set are few), transforms of
// sources and results.
#include "causal_conv3d/tile.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_points.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

// Rows of a register tile: narrow ones are as large as wide ones.
constexpr int tile_rows(int vectors) { return vectors <= kVectors / 2 ? 12 : 6; }
constexpr int kMostRows = 12;
constexpr int kPackedVectors = 2;  // of a block of packed weights
constexpr index_t kChain = kWinogradChain;

// --- weights
// -------------------------------------------------------------------------------------------------

constexpr index_t kTapsAhead = 2;  // channels: L3 and memory are some hundred cycles away

// One input channel and one vector of columns: its taps with the factors of a set, then all points.
template <int M>
void transform_taps(const WinogradParams& p, const float* factors, const float* taps, index_t step,
                    index_t row_begin, index_t row_end, float* to, index_t point_step) {
  constexpr int N = M + 2;
  vf g[9] = {}, half[N * 3];
  for (index_t kt = 0; kt < p.kernel_t; ++kt) {
    if (factors[kt] == 0.0f) continue;
    const vf factor = splat(factors[kt]);
    const float* frame = taps + (kt * 9 + (p.mirrored ? 8 : 0)) * step;
    const index_t next = kTapsAhead * p.kernel_t * 9 * step;
    MF_UNROLL
    for (int tap = 0; tap < 9; ++tap, frame += p.mirrored ? -step : step) {
      __builtin_prefetch(frame + next);
      g[tap] += factor * load(frame);
    }
  }
  MF_UNROLL
  for (int kw = 0; kw < 3; ++kw) Winograd<M>::template weights<3, 3>(g + kw, half + kw);
  MF_UNROLL
  for (int row = 0; row < N; ++row) {
    if (row < row_begin || row >= row_end) continue;
    vf u[N];
    Winograd<M>::template weights<1, 1>(half + row * 3, u);
    MF_UNROLL
    for (int j = 0; j < N; ++j) store(to + ((row - row_begin) * N + j) * point_step, u[j]);
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

template <int NV, int MR = tile_rows(NV)>
void pick_rows(RowsFunction* function) {
  function[MR] = multiply_rows<MR, NV>;
  if constexpr (MR > 1) pick_rows<NV, MR - 1>(function);
}

// function[r]: of r rows, up to tile_rows(vectors).
void pick_rows(index_t vectors, RowsFunction* function) {
  if (vectors == 1) return pick_rows<1>(function);
  if (vectors == 2) return pick_rows<2>(function);
  if constexpr (kVectors == 4)
    return vectors == 3 ? pick_rows<3>(function) : pick_rows<4>(function);
}

}  // namespace

void winograd_weights(const WinogradParams& p, const WinogradLayout& layout,
                      const WinogradColumns& columns, index_t set, index_t row_begin,
                      index_t row_end, index_t begin, index_t end, float* weights) {
  const index_t whole = kPackedVectors * kLanes, taps = p.kernel_t * 9;
  for (index_t first = 0; first < columns.width; first += whole) {
    const index_t left = columns.width - first, width = left < whole ? left : whole;
    const float* packed = p.packed + (columns.first + first) * taps * p.reduce;
    for (index_t k = begin; k < end; ++k)
      for (index_t c = 0; c < width; c += kLanes) {
        const float* from = packed + k * taps * width + c;
        float* to = weights + (k - begin) * columns.width + first + c;
        if (p.m == 4)
          transform_taps<4>(p, p.sets.taps[set], from, width, row_begin, row_end, to,
                            layout.weight_point);
        else
          transform_taps<2>(p, p.sets.taps[set], from, width, row_begin, row_end, to,
                            layout.weight_point);
      }
  }
}

void winograd_products(const WinogradParams& p, const TimeSegment& segment,
                       const WinogradLayout& layout, const WinogradColumns& columns,
                       index_t set_begin, index_t set_end, index_t row_begin, index_t row_end,
                       index_t begin, index_t end, const float* sources, const float* weights,
                       float* sums) {
  const index_t vectors = columns.width / kLanes, most = tile_rows(static_cast<int>(vectors));
  const index_t n = p.m + 2;
  RowsFunction function[kMostRows + 1] = {};
  pick_rows(vectors, function);
  for (index_t point = row_begin * n; point < row_end * n; ++point)
    for (index_t i = 0; i < segment.runs; ++i) {
      const TimeRun& run = segment.run[i];
      if (run.set < set_begin || run.set >= set_end) continue;
      const index_t rows = run.count * layout.tiles, tiles = ceil_div(rows, most);
      const float* from = sources + point * layout.source_point +
                          run.source * layout.tiles * layout.source_row + begin;
      const float* panel = weights + (point - row_begin * n) * layout.weight_point +
                           (run.set - set_begin) * layout.weight_set;
      float* to = sums + point * layout.sum_point + run.sum * layout.tiles * columns.width;
      for (index_t t = 0; t < tiles; ++t) {
        const index_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
        function[count]({from + first * layout.source_row, layout.source_row, panel, end - begin,
                         run.add || begin > 0, to + first * columns.width});
      }
    }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
