// causal_conv3d, one source per instruction set: Winograd's transforms of sources and results.
// Previous hop: cpu_winograd.cpp.
// Next hop: none.
//
// A vector of channels of a tile at a time, through all frames of the segment: the transformed
// frames stay in the L1 cache, where the sums along time are made of them. Padding is what the
// tables of rows and columns say: no padded copy exists.
#include "causal_conv3d/tile.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/winograd_points.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

struct Place {  // of a tile
  index_t n, row, column;
};

Place place_of(const WinogradParams& p, index_t tile) {
  const index_t row = tile / p.tile_columns;
  return {row / p.tile_rows, row % p.tile_rows, tile % p.tile_columns};
}

// --- sources
// -------------------------------------------------------------------------------------------------

// One frame of a tile, transformed along both axes: out[(M + 2)^2].
template <class T, int M>
void transform_frame(const WinogradParams& p, const Place& place, index_t frame, index_t channel,
                     int lanes, vf* out) {
  constexpr int N = M + 2;
  const std::int32_t* rows = p.rows + place.row * N;
  const std::int32_t* columns = p.columns + place.column * N;
  const index_t channels = p.source.channels;
  vf half[N * N];
  MF_UNROLL
  for (int i = 0; i < N; ++i) {
    vf d[N];
    if (rows[i] < 0) {
      MF_UNROLL
      for (int j = 0; j < N; ++j) half[i * N + j] = vf{};
      continue;
    }
    const T* row = row_of<const T>(p.source, place.n, frame, rows[i]) + channel;
    MF_UNROLL
    for (int j = 0; j < N; ++j) {
      d[j] = vf{};
      if (columns[j] < 0) continue;
      const T* pixel = row + columns[j] * channels;
      __builtin_prefetch(pixel + kLanes);  // what the next vector of channels will want
      d[j] = lanes == kLanes ? load(pixel) : load_some(pixel, lanes);
    }
    Winograd<M>::template sources<1, 1>(d, half + i * N);
  }
  MF_UNROLL
  for (int j = 0; j < N; ++j) Winograd<M>::template sources<N, N>(half + j, out + j);
}

template <int Terms, int Points>
inline void add_frames(const vf* const* frames, const float* factors, float* to, index_t step) {
  vf factor[Terms];
  MF_UNROLL
  for (int k = 0; k < Terms; ++k) factor[k] = splat(factors[k]);
  for (int i = 0; i < Points; ++i, to += step) {
    vf sum = factor[0] * frames[0][i];
    MF_UNROLL
    for (int k = 1; k < Terms; ++k) sum += factor[k] * frames[k][i];
    store(to, sum);
  }
}

template <class T, int M>
class Sources {
 public:
  static constexpr int kPoints = (M + 2) * (M + 2);

  Sources(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout)
      : p_(p), segment_(segment), layout_(layout) {}

  void run(index_t tile, index_t in_group, float* sources) {
    place_ = place_of(p_, tile);
    for (index_t channel = 0; channel < p_.reduce; channel += kLanes) {
      channel_ = channel;
      lanes_ = p_.reduce - channel < kLanes ? static_cast<int>(p_.reduce - channel) : kLanes;
      for (std::int32_t& frame : held_) frame = -1;
      const TimeProduct* last = nullptr;
      float* to = nullptr;
      for (index_t g = 0; g < segment_.groups; ++g)
        for (index_t i = 0; i < segment_.group[g].products; ++i) {
          const TimeProduct& product = segment_.group[g].product[i];
          const index_t row = product.row * layout_.tiles + in_group;
          float* next = sources + row * layout_.source_row + channel;
          expect(next);
          if (last) write(*last, to);
          last = &product;
          to = next;
        }
      if (last) write(*last, to);
    }
  }

 private:
  // The points lie far apart: ask for their lines one product before they are written.
  void expect(float* to) const {
    for (int i = 0; i < kPoints; ++i) __builtin_prefetch(to + i * layout_.source_point, 1);
  }

  static constexpr int kHeld = 8;  // a power of two, no less than the frames of a product

  const vf* frame(std::int32_t t) {
    const int slot = t % kHeld;
    if (held_[slot] != t) {
      transform_frame<T, M>(p_, place_, t, channel_, lanes_, frames_[slot]);
      held_[slot] = t;
    }
    return frames_[slot];
  }

  void write(const TimeProduct& product, float* to) {
    const vf* frames[5];
    for (int k = 0; k < product.terms; ++k) frames[k] = frame(product.frame[k]);
    switch (product.terms) {
      case 1:
        return add_frames<1, kPoints>(frames, product.factor, to, layout_.source_point);
      case 2:
        return add_frames<2, kPoints>(frames, product.factor, to, layout_.source_point);
      case 3:
        return add_frames<3, kPoints>(frames, product.factor, to, layout_.source_point);
      case 4:
        return add_frames<4, kPoints>(frames, product.factor, to, layout_.source_point);
      default:
        return add_frames<5, kPoints>(frames, product.factor, to, layout_.source_point);
    }
  }

  const WinogradParams& p_;
  const TimeSegment& segment_;
  const WinogradLayout& layout_;
  Place place_{};
  index_t channel_ = 0;
  int lanes_ = kLanes;
  std::int32_t held_[kHeld];
  vf frames_[kHeld][kPoints];
};

template <class T, int M>
void sources_of(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout,
                const WinogradTiles& tiles, index_t begin, index_t end, float* sources) {
  Sources<T, M> work(p, segment, layout);
  for (index_t i = begin; i < end; ++i) work.run(tiles.first + i, i, sources);
}

// --- results
// -------------------------------------------------------------------------------------------------

// The sum of a tile at all points, transformed back: out[M * M].
template <int M>
void transform_sum(const float* from, index_t step, vf* out) {
  constexpr int N = M + 2;
  vf half[M * N];
  MF_UNROLL
  for (int i = 0; i < N; ++i) {
    vf m[N];
    MF_UNROLL
    for (int j = 0; j < N; ++j) m[j] = load(from + (i * N + j) * step);
    Winograd<M>::template results<1, N>(m, half + i);  // half[column][i]
  }
  MF_UNROLL
  for (int j = 0; j < M; ++j) Winograd<M>::template results<1, M>(half + j * N, out + j);
}

template <class T, int M>
class Results {
 public:
  Results(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout,
          const WinogradColumns& columns)
      : p_(p), segment_(segment), layout_(layout), columns_(columns) {}

  void run(index_t tile, index_t in_group, const float* sums) {
    const Place place = place_of(p_, tile);
    for (index_t c = 0; c < columns_.channels; c += kLanes) {
      const index_t left = columns_.channels - c;
      const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
      const index_t channel = columns_.first + c;
      vf bias = {};
      if (p_.bias) {
        const T* from = static_cast<const T*>(p_.bias) + channel;
        bias = lanes == kLanes ? load(from) : load_some(from, lanes);
      }
      for (index_t g = 0; g < segment_.groups; ++g) {
        const TimeGroup& group = segment_.group[g];
        vf sum[kMaxGroupProducts][M * M];
        for (index_t i = 0; i < group.sums; ++i) {
          const bool last = i + 1 == group.sums;
          if (!last || g + 1 < segment_.groups)  // the points lie far apart
            expect(
                sums +
                place_in(last ? segment_.group[g + 1].sum_row[0] : group.sum_row[i + 1], in_group) +
                c);
          transform_sum<M>(sums + place_in(group.sum_row[i], in_group) + c, layout_.sum_point,
                           sum[i]);
        }
        for (index_t t = 0; t < group.targets; ++t)
          write(place, group.first_target + t, channel, lanes, sum, group.target[t], group.sums,
                bias);
      }
    }
  }

 private:
  index_t place_in(std::int32_t sum_row, index_t in_group) const {
    return (sum_row * layout_.tiles + in_group) * columns_.width;
  }
  void expect(const float* from) const {
    for (int i = 0; i < (M + 2) * (M + 2); ++i) __builtin_prefetch(from + i * layout_.sum_point);
  }

  void write(const Place& place, index_t frame, index_t channel, int lanes, const vf (*sum)[M * M],
             const float* factors, index_t sums, vf bias) const {
    vf y[M * M];
    for (int i = 0; i < M * M; ++i) y[i] = bias;
    for (index_t k = 0; k < sums; ++k) {
      if (factors[k] == 0.0f) continue;
      const vf factor = splat(factors[k]);
      for (int i = 0; i < M * M; ++i) y[i] += factor * sum[k][i];
    }
    const index_t rows = p_.target.height - place.row * M;
    const index_t columns = p_.target.width - place.column * M;
    for (index_t i = 0; i < M && i < rows; ++i) {
      const index_t first = place.column * M * p_.target.channels + channel;
      if (p_.residual.late) {
        const T* row = row_of<const T>(p_.residual, place.n, frame, place.row * M + i) + first;
        for (index_t j = 0; j < M && j < columns; ++j, row += p_.target.channels)
          y[i * M + j] += lanes == kLanes ? load(row) : load_some(row, lanes);
      }
      T* row = row_of<T>(p_.target, place.n, frame, place.row * M + i) + first;
      for (index_t j = 0; j < M && j < columns; ++j, row += p_.target.channels) {
        if (lanes == kLanes)
          store(row, y[i * M + j]);
        else
          store_some(row, y[i * M + j], lanes);
      }
    }
  }

  const WinogradParams& p_;
  const TimeSegment& segment_;
  const WinogradLayout& layout_;
  const WinogradColumns& columns_;
};

template <class T, int M>
void results_of(const WinogradParams& p, const TimeSegment& segment, const WinogradLayout& layout,
                const WinogradTiles& tiles, const WinogradColumns& columns, index_t begin,
                index_t end, const float* sums) {
  Results<T, M> work(p, segment, layout, columns);
  for (index_t i = begin; i < end; ++i) work.run(tiles.first + i, i, sums);
}

}  // namespace

void winograd_sources(const WinogradParams& p, const TimeSegment& segment,
                      const WinogradLayout& layout, const WinogradTiles& tiles, index_t tile_begin,
                      index_t tile_end, float* sources) {
  const bool large = p.m == 4;
  const auto run = [&](auto function) {
    function(p, segment, layout, tiles, tile_begin, tile_end, sources);
  };
  switch (p.source_type) {
    case DType::f32:
      return run(large ? sources_of<float, 4> : sources_of<float, 2>);
    case DType::bf16:
      return run(large ? sources_of<bf16_t, 4> : sources_of<bf16_t, 2>);
    case DType::f16:
      return run(large ? sources_of<f16_t, 4> : sources_of<f16_t, 2>);
  }
}

void winograd_results(const WinogradParams& p, const TimeSegment& segment,
                      const WinogradLayout& layout, const WinogradTiles& tiles,
                      const WinogradColumns& columns, index_t tile_begin, index_t tile_end,
                      const float* sums) {
  const bool large = p.m == 4;
  const auto run = [&](auto function) {
    function(p, segment, layout, tiles, columns, tile_begin, tile_end, sums);
  };
  switch (p.target_type) {
    case DType::f32:
      return run(large ? results_of<float, 4> : results_of<float, 2>);
    case DType::bf16:
      return run(large ? results_of<bf16_t, 4> : results_of<bf16_t, 2>);
    case DType::f16:
      return run(large ? results_of<f16_t, 4> : results_of<f16_t, 2>);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
