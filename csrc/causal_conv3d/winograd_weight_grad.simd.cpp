// causal_conv3d, one source per instruction set: Winograd's algorithm for the weight gradient.
// Previous hop: cpu_winograd_weight_grad.cpp.
// Next hop: none.
//
// The transpose of the forward pass: gradients of a tile go to the points, sources and gradients of
// all rows that share a set of weights are multiplied, and what comes out of the points goes back
// to the taps. A set of weights at a time, so that all its points stay in the L2 cache.
#include "causal_conv3d/tile.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_points.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kTileRows = 6;

struct BlockOf {
  index_t first, channels, columns;  // first channel; columns: in whole vectors
  BlockOf(const WinogradParams& p, index_t block) {
    const index_t whole = kVectors * kLanes;
    first = block * whole;
    channels = p.produce - first < whole ? p.produce - first : whole;
    columns = round_up(channels, index_t{kLanes});
  }
};

// --- gradients of the results, to the points
// -------------------------------------------------------------------------

template <class T, int M>
void load_gradients(const WinogradParams& p, index_t n, index_t frame, index_t row, index_t column,
                    index_t channel, int lanes, vf* out) {
  const index_t rows = p.target.height - row * M, columns = p.target.width - column * M;
  for (index_t i = 0; i < M; ++i)
    for (index_t j = 0; j < M; ++j) {
      out[i * M + j] = vf{};
      if (i >= rows || j >= columns) continue;
      const T* from = row_of<const T>(p.target, n, frame, row * M + i) +
                      (column * M + j) * p.target.channels + channel;
      out[i * M + j] = lanes == kLanes ? load(from) : load_some(from, lanes);
    }
}

template <int M>
void transform_gradients(const vf* y, float* to, index_t step) {
  constexpr int N = M + 2;
  vf half[N * M];
  MF_UNROLL
  for (int j = 0; j < M; ++j) Winograd<M>::template from_results<M, M>(y + j, half + j);
  for (int i = 0; i < N; ++i) {
    vf m[N];
    Winograd<M>::template from_results<1, 1>(half + i * M, m);
    MF_UNROLL
    for (int j = 0; j < N; ++j) store(to + (i * N + j) * step, m[j]);
  }
}

template <class T, int M>
void sums_of(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout,
             const WinogradTiles& tiles, index_t block, index_t begin, index_t end, float* sums) {
  const BlockOf columns(p, block);
  for (index_t in_group = begin; in_group < end; ++in_group) {
    const index_t tile = tiles.first + in_group, row = tile / p.tile_columns;
    for (index_t c = 0; c < columns.channels; c += kLanes) {
      const index_t left = columns.channels - c;
      const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
      for (index_t g = 0; g < segment.groups; ++g) {
        const TimeGroup& group = segment.group[g];
        vf y[kMaxGroupTargets][M * M];
        for (index_t t = 0; t < group.targets; ++t)
          load_gradients<T, M>(p, row / p.tile_rows, group.first_target + t, row % p.tile_rows,
                               tile % p.tile_columns, columns.first + c, lanes, y[t]);
        for (index_t k = 0; k < group.sums; ++k) {
          vf sum[M * M] = {};
          for (index_t t = 0; t < group.targets; ++t) {
            if (group.target[t][k] == 0.0f) continue;
            const vf factor = splat(group.target[t][k]);
            for (int i = 0; i < M * M; ++i) sum[i] += factor * y[t][i];
          }
          const index_t to = (group.sum_row[k] * layout.tiles + in_group) * columns.columns + c;
          transform_gradients<M>(sum, sums + to, layout.sum_point);
        }
      }
    }
  }
}

// --- products, and from the points to the taps
// -------------------------------------------------------------------------

struct Rows {
  const float* scalars;  // [count][scalar_row]
  const float* vectors;  // [count][NV * kLanes]
  index_t count, scalar_row;
  bool add;
  float* to;  // [scalars][NV * kLanes]
};

template <int MR, int NV>
void multiply_rows(const Rows& r) {
  vf acc[MR][NV] = {};
  const float *a = r.scalars, *b = r.vectors;
  for (index_t i = 0; i < r.count; ++i, a += r.scalar_row, b += NV * kLanes) {
    vf column[NV];
    MF_UNROLL
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * kLanes);
    MF_UNROLL
    for (int s = 0; s < MR; ++s) {
      const vf scalar = splat(a[s]);
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[s][j] += scalar * column[j];
    }
  }
  flush(acc, r.to, r.add);
}

typedef void (*RowsFunction)(const Rows&);

template <int NV>
RowsFunction pick_rows(index_t scalars) {
  switch (scalars) {
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

RowsFunction pick_rows(index_t vectors, index_t scalars) {
  switch (vectors) {
    case 1:
      return pick_rows<1>(scalars);
    case 2:
      return pick_rows<2>(scalars);
    default:
      break;
  }
  if constexpr (kVectors == 4) return vectors == 3 ? pick_rows<3>(scalars) : pick_rows<4>(scalars);
  return nullptr;
}

// One channel of the sum and one vector of columns: a set's weights at all points join the taps.
template <int M>
void add_to_taps(const WinogradParams& p, const float* factors, const float* weights,
                 index_t point_step, float* taps, index_t step) {
  constexpr int N = M + 2;
  vf half[N * 3], g[9];
  MF_UNROLL
  for (int i = 0; i < N; ++i) {
    vf u[N];
    MF_UNROLL
    for (int j = 0; j < N; ++j) u[j] = load(weights + (i * N + j) * point_step);
    Winograd<M>::template from_weights<1, 1>(u, half + i * 3);
  }
  MF_UNROLL
  for (int kw = 0; kw < 3; ++kw) Winograd<M>::template from_weights<3, 3>(half + kw, g + kw);
  for (index_t kt = 0; kt < p.kernel_t; ++kt) {
    if (factors[kt] == 0.0f) continue;
    const vf factor = splat(factors[kt]);
    MF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      float* to = taps + (kt * 9 + tap) * step;
      store(to, load(to) + factor * g[tap]);
    }
  }
}

// --- from the taps to the result
// -------------------------------------------------------------------------

constexpr index_t kUnpackChannels = 16;  // a vector of columns of these stays in the L1 cache

template <class T>
void unpack(const WinogradParams& p, const WinogradColumns& columns, index_t begin, index_t end,
            const float* from, T* dweight) {
  const index_t taps = p.kernel_t * 9;
  float line[kUnpackChannels * kMaxTimeTaps * 9];
  for (index_t k = begin; k < end; k += kUnpackChannels) {
    const index_t count = (end - k < kUnpackChannels ? end - k : kUnpackChannels) * taps;
    for (index_t c = 0; c < columns.channels; ++c) {
      for (index_t i = 0; i < count; ++i) line[i] = from[i * columns.width + c];
      T* to = dweight + ((columns.first + c) * p.reduce + k) * taps;
      index_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(to + i, load(line + i));
      if (i < count)
        store_some(to + i, load_some(line + i, static_cast<int>(count - i)),
                   static_cast<int>(count - i));
    }
    from += count * columns.width;
  }
}

}  // namespace

void winograd_sums(const WinogradParams& p, const TimeSegment& segment,
                   const WinogradLayout& layout, const WinogradTiles& tiles, index_t block,
                   index_t tile_begin, index_t tile_end, float* sums) {
  const bool large = p.m == 4;
  const auto run = [&](auto function) {
    function(p, segment, layout, tiles, block, tile_begin, tile_end, sums);
  };
  switch (p.target_type) {
    case DType::f32:
      return run(large ? sums_of<float, 4> : sums_of<float, 2>);
    case DType::bf16:
      return run(large ? sums_of<bf16_t, 4> : sums_of<bf16_t, 2>);
    case DType::f16:
      return run(large ? sums_of<f16_t, 4> : sums_of<f16_t, 2>);
  }
}

void winograd_add_weights(const WinogradParams& p, const TimeSegment& segment,
                          const WinogradLayout& layout, index_t block, index_t begin, index_t end,
                          const float* sources, const float* sums, float* weights, float* packed) {
  const index_t columns = BlockOf(p, block).columns, taps = p.kernel_t * 9;
  const index_t channels = end - begin, parts = ceil_div(channels, index_t{kTileRows});
  float* out = packed + (block * kVectors * kLanes * p.reduce + begin * columns) * taps;
  for (index_t set = 0; set < p.sets.count; ++set) {
    bool present = false;
    for (index_t i = 0; i < segment.runs; ++i) {
      const TimeRun& run = segment.run[i];
      if (run.set != set) continue;
      for (index_t point = 0; point < winograd_points(p.m); ++point) {
        const float* a = sources + point * layout.source_point +
                         run.source * layout.tiles * layout.source_row + begin;
        const float* b = sums + point * layout.sum_point + run.sum * layout.tiles * columns;
        float* to = weights + point * layout.weight_point;
        for (index_t t = 0; t < parts; ++t) {
          const index_t first = channels * t / parts, count = channels * (t + 1) / parts - first;
          pick_rows(columns / kLanes, count)({a + first, b, run.count * layout.tiles,
                                              layout.source_row, present, to + first * columns});
        }
      }
      present = true;
    }
    if (!present) continue;
    for (index_t k = 0; k < channels; ++k)
      for (index_t c = 0; c < columns; c += kLanes) {
        const float* from = weights + k * columns + c;
        float* to = out + k * taps * columns + c;
        if (p.m == 4)
          add_to_taps<4>(p, p.sets.taps[set], from, layout.weight_point, to, columns);
        else
          add_to_taps<2>(p, p.sets.taps[set], from, layout.weight_point, to, columns);
      }
  }
}

void winograd_unpack(const WinogradParams& p, const WinogradColumns& columns, index_t begin,
                     index_t end, const float* taps, void* dweight) {
  switch (p.target_type) {
    case DType::f32:
      return unpack(p, columns, begin, end, taps, static_cast<float*>(dweight));
    case DType::bf16:
      return unpack(p, columns, begin, end, taps, static_cast<bf16_t*>(dweight));
    case DType::f16:
      return unpack(p, columns, begin, end, taps, static_cast<f16_t*>(dweight));
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
