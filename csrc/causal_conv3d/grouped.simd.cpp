// causal_conv3d, one source per instruction set: groups of few channels, forward or input gradient.
// Previous hop: cpu_grouped.cpp.
// Next hop: none.
//
// A register tile is up to 6 target pixels of a row x some vectors of channels, of several groups
// each. It walks over all taps, then bias, residual and rounding, so sums are never in memory.
// Where the columns of neighboring targets are neighbors (stride and dilation 1), a row of three
// taps is read through a window of 8 source pixels, each loaded, widened and permuted once for its
// three products; elsewhere every tap reads its own pixels. Pixels are reached through pointers, so
// padding, strides, dilation and history need no copy.
//
// Ladder: 64 channels, 3x3x3, 17x32x32, one core of Zen 4, kernel alone, in cycles a product of 16
// lanes (a product instruction of bfloat16 has two of them). Floor 1.0 (bfloat16 in pairs: 0.5).
//
//   channels a group                      1      2      4      8   8, dilation 2   16, dilation 2
//   v0  the gather engine, float32       93     38     13      4.4        -             1.7
//       bfloat16                         61     16      8      2.1        -             0.65
//   v1  groups side by side, float32      1.9    2.6    2.4    1.6       2.0
//       bfloat16                          1.8    1.3    0.90   0.73      1.0
//   v2  a tile's columns in all rows of an item: source rows stay in L1; columns that dilated taps
//       read are neighbors in the order of targets, so they have windows, too; windows computed
//       once a tile; one group a vector by broadcast
//       float32                           1.8           1.3    1.2       1.25           1.4 to 1.6
//       bfloat16                          2.1           0.82   0.68      0.65           0.65
//
// A permutation takes a slot of the products: 8 beside 18 products would make 1.44. Tried: 8
// channels through vectors of 8 lanes whose loads broadcast, with no permutation: 2.1 to 2.9, two
// loads a product because 16 pointers do not fit the registers. Left to the compiler, a source
// vector of depthwise convolutions is read from memory once for each of its three products
// (in_register keeps it: 2.5 to 1.8). What is left there is pointers: about 60 instructions that
// are no products beside 72 that are.
#include "causal_conv3d/grouped.h"

#include "causal_conv3d/lanes.h"
#include "causal_conv3d/tile.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kChain = 64;  // products that are added up before they join the sums

// What the taps of a row meet: three of them the columns of one window.
struct Window {
  std::int32_t offset[kTilePixels + 2];  // of the source, or -1
  index_t tap[3];                        // in elements of the weights

  Window(const GroupedParams& p, const std::int32_t* slots, index_t first, index_t pixels) {
    if (slots[0] != kWindow) return;
    const WidthGather& w = p.w;
    for (index_t q = 0; q < pixels + 2; ++q) {
      const index_t slot = q < pixels ? 0 : q - pixels + 1, i = q < pixels ? q : pixels - 1;
      offset[q] = w.offset[slots[1 + slot] * w.width + first + i];
    }
    for (int s = 0; s < 3; ++s) tap[s] = w.slot_tap[slots[1 + s]] * p.lanes.units * kLanes;
  }
};

struct Tile {
  const GroupedParams& p;
  const Spread& spread;
  const std::int32_t* slots;  // of the tile, as in GroupedParams
  const Window& window;
  const GroupedRow* rows;
  int num_rows;
  index_t first;   // in the order of w.target
  index_t vector;  // the first one
  void* target;    // rows, at channel 0
  const void* residual;
};

template <class F, GroupSource kSource, int MR, int NV>
struct Run {
  typedef typename F::T T;
  typedef typename F::Weight Weight;
  typedef typename F::Vector Vector;

  const GroupLanes& l;
  index_t from[NV];     // elements of the source from the first vector to each
  index_t tap, vector;  // elements of the weights of a tap, and of a vector
  int sources[NV];      // units of each vector
  const T* zeros;

  explicit Run(const Tile& tile) : l(tile.p.lanes) {
    const GroupedParams& p = tile.p;
    tap = l.units * kLanes;
    vector = p.kernel_t * p.kernel_h * p.kernel_w * tap;
    zeros = static_cast<const T*>(p.zeros);
    for (int j = 0; j < NV; ++j) {
      from[j] = (l.group(tile.vector + j) - l.group(tile.vector)) * l.reduce;
      sources[j] = static_cast<int>(l.count(tile.vector + j) * l.units);
    }
  }

  // The k-th unit of every group, of the pixel at p.
  inline __attribute__((always_inline)) Vector source(const Tile& tile, const T* p, int j,
                                                      index_t k) const {
    if constexpr (kSource == GroupSource::pixel) return in_register(F::source(p + j * kLanes));
    if constexpr (kSource == GroupSource::tail) return F::source(p, sources[j]);
    if constexpr (kSource == GroupSource::broadcast) return F::broadcast(p, k);
    return F::spread(F::source(p + from[j], sources[j]), tile.spread.lane[k]);
  }
  index_t units() const {
    return kSource == GroupSource::pixel || kSource == GroupSource::tail ? 1 : l.units;
  }

  inline __attribute__((always_inline)) void add_window(const Tile& tile, const GroupedRow& row,
                                                        vf (&acc)[MR][NV]) const {
    const T* pixels = static_cast<const T*>(row.pixels);
    const T* a[MR + 2];
    MF_UNROLL
    for (int q = 0; q < MR + 2; ++q) {
      const std::int32_t at = tile.window.offset[q];
      a[q] = at >= 0 ? pixels + at : zeros;
    }
    const Weight* b[3];
    MF_UNROLL
    for (int s = 0; s < 3; ++s) b[s] = static_cast<const Weight*>(row.weights) + tile.window.tap[s];
    for (index_t k = 0; k < units(); ++k) {
      if constexpr (kSource == GroupSource::broadcast) {  // a group's vectors share their sources
        Vector weight[3][NV];
        MF_UNROLL
        for (int s = 0; s < 3; ++s) {
          MF_UNROLL
          for (int j = 0; j < NV; ++j) weight[s][j] = F::weights(b[s] + j * vector + k * kLanes);
        }
        MF_UNROLL
        for (int q = 0; q < MR + 2; ++q) {
          const Vector x = source(tile, a[q], 0, k);
          MF_UNROLL
          for (int s = 0; s < 3; ++s) {
            MF_UNROLL
            for (int j = 0; j < NV; ++j)
              if (q - s >= 0 && q - s < MR)
                acc[q - s][j] = F::multiply_add(acc[q - s][j], x, weight[s][j]);
          }
        }
        continue;
      }
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        Vector weight[3];
        MF_UNROLL
        for (int s = 0; s < 3; ++s) weight[s] = F::weights(b[s] + j * vector + k * kLanes);
        MF_UNROLL
        for (int q = 0; q < MR + 2; ++q) {
          const Vector x = source(tile, a[q], j, k);
          MF_UNROLL
          for (int s = 0; s < 3; ++s)
            if (q - s >= 0 && q - s < MR)
              acc[q - s][j] = F::multiply_add(acc[q - s][j], x, weight[s]);
        }
      }
    }
  }

  inline __attribute__((always_inline)) void add_slot(const Tile& tile, const GroupedRow& row,
                                                      index_t slot, vf (&acc)[MR][NV]) const {
    const WidthGather& w = tile.p.w;
    const T* pixels = static_cast<const T*>(row.pixels);
    const std::int32_t* offset = w.offset + slot * w.width + tile.first;
    const T* a[MR];
    MF_UNROLL
    for (int i = 0; i < MR; ++i) a[i] = offset[i] >= 0 ? pixels + offset[i] : zeros;
    const Weight* b = static_cast<const Weight*>(row.weights) + w.slot_tap[slot] * tap;
    for (index_t k = 0; k < units(); ++k, b += kLanes) {
      MF_UNROLL
      for (int j = 0; j < NV; ++j) {
        const Vector weight = F::weights(b + j * vector);
        MF_UNROLL
        for (int i = 0; i < MR; ++i)
          acc[i][j] = F::multiply_add(acc[i][j], source(tile, a[i], j, k), weight);
      }
    }
  }

  inline __attribute__((always_inline)) void write(const Tile& tile, vf (&acc)[MR][NV]) const {
    const GroupedParams& p = tile.p;
    MF_UNROLL
    for (int j = 0; j < NV; ++j) {
      const index_t channel = l.channel(tile.vector + j);
      const int lanes = static_cast<int>(l.lanes(tile.vector + j));
      const vf bias = p.bias ? load_lanes(static_cast<const T*>(p.bias) + channel, lanes) : vf{};
      MF_UNROLL
      for (int i = 0; i < MR; ++i) {
        const index_t at = p.w.target[tile.first + i] * p.target.channels + channel;
        vf v = acc[i][j] + bias;
        if (tile.residual) v += load_lanes(static_cast<const T*>(tile.residual) + at, lanes);
        T* to = static_cast<T*>(tile.target) + at;
        lanes == kLanes ? store(to, v) : store_some(to, v, lanes);
      }
    }
  }
};

template <class F, GroupSource kSource, int MR, int NV>
void run_tile(const Tile& tile) {
  const Run<F, kSource, MR, NV> run(tile);
  vf acc[MR][NV] = {};
  const std::int32_t count = tile.slots[0];
  const index_t row_terms = tile.p.lanes.units * (count == kWindow ? 3 : count);
  float sums[MR * NV * kLanes];
  bool flushed = false;
  index_t chain = 0;
  for (int r = 0; r < tile.num_rows; ++r) {
    if (count == kWindow)
      run.add_window(tile, tile.rows[r], acc);
    else
      for (std::int32_t s = 0; s < count; ++s)
        run.add_slot(tile, tile.rows[r], tile.slots[1 + s], acc);
    chain += row_terms;
    if (!F::kChained || chain < kChain) continue;
    flush(acc, sums, flushed);
    flushed = true;
    chain = 0;
  }
  if (flushed) {
    MF_UNROLL
    for (int i = 0; i < MR; ++i) {
      MF_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] += load(sums + (i * NV + j) * kLanes);
    }
  }
  run.write(tile, acc);
}

typedef void (*TileFunction)(const Tile&);

template <class F, GroupSource kSource, int NV>
TileFunction pick_pixels(index_t pixels) {
  static_assert(kTilePixels == 6, "one case a size");
  switch (pixels) {
    case 1:
      return run_tile<F, kSource, 1, NV>;
    case 2:
      return run_tile<F, kSource, 2, NV>;
    case 3:
      return run_tile<F, kSource, 3, NV>;
    case 4:
      return run_tile<F, kSource, 4, NV>;
    case 5:
      return run_tile<F, kSource, 5, NV>;
    default:
      return run_tile<F, kSource, 6, NV>;
  }
}

constexpr int kSpreadVectors = kVectors / 2;  // grouped_vectors of this level

template <class F>
TileFunction pick_tile(GroupSource source, index_t vectors, index_t pixels) {
  if (source == GroupSource::spread) {
    if constexpr (kSpreadVectors >= 2)
      if (vectors == 2) return pick_pixels<F, GroupSource::spread, 2>(pixels);
    return pick_pixels<F, GroupSource::spread, 1>(pixels);
  }
  // 16-bit numbers that stand alone are slow to broadcast: cpu_grouped.cpp asks for none.
  if constexpr (F::kBroadcasts)
    if (source == GroupSource::broadcast)
      return vectors == 2 ? pick_pixels<F, GroupSource::broadcast, 2>(pixels)
                          : pick_pixels<F, GroupSource::broadcast, 1>(pixels);
  if (source == GroupSource::tail) return pick_pixels<F, GroupSource::tail, 1>(pixels);
  if constexpr (kVectors >= 4)
    if (vectors == 4) return pick_pixels<F, GroupSource::pixel, 4>(pixels);
  return vectors == 2 ? pick_pixels<F, GroupSource::pixel, 2>(pixels)
                      : pick_pixels<F, GroupSource::pixel, 1>(pixels);
}

template <class F>
class Item {
 public:
  Item(const GroupedParams& p, const GroupedItem& item, GroupedRow* rows)
      : p_(p), item_(item), spread_(p.lanes), rows_(rows) {}

  void run() {
    const GroupLanes& l = p_.lanes;
    for (index_t v = item_.vector_begin; v < item_.vector_end;) {
      index_t end = item_.vector_end;
      GroupSource source = l.source;
      if (source == GroupSource::pixel && l.lanes(end - 1) < l.width) --end;  // is done alone
      if (v == end) source = GroupSource::tail, ++end;
      const index_t vectors = end - v == 3 ? 2 : end - v;
      list_rows(v);
      for (index_t i = 0; i < p_.w.tiles; ++i) run_column(source, v, vectors, i);
      v += vectors;
    }
  }

 private:
  typedef typename F::T T;
  typedef typename F::Weight Weight;

  // A tile's columns in all rows of the item, one after the other: of the source rows of a target
  // row most are those of the one before, and still in the L1 cache.
  void run_column(GroupSource source, index_t vector, index_t vectors, index_t tile) {
    const index_t first = p_.w.tile_first[tile], pixels = p_.w.tile_first[tile + 1] - first;
    const TileFunction function = pick_tile<F>(source, vectors, pixels);
    const std::int32_t* slots = p_.slots + tile * (1 + p_.w.slots);
    const Window window(p_, slots, first, pixels);
    const index_t frames = p_.t.begin[item_.t + 1] - p_.t.begin[item_.t];
    const GroupedRow* rows = rows_;
    for (index_t h = item_.row_begin; h < item_.row_end; ++h) {
      const void* residual =
          p_.residual.late ? row_of<const T>(p_.residual, item_.n, item_.t, h) : nullptr;
      const index_t count = frames * (p_.h.begin[h + 1] - p_.h.begin[h]);
      function({p_, spread_, slots, window, rows, static_cast<int>(count), first, vector,
                row_of<T>(p_.target, item_.n, item_.t, h), residual});
      rows += count;
    }
  }

  void list_rows(index_t vector) {
    const index_t row = p_.kernel_w * p_.lanes.units * kLanes;
    const Weight* weights =
        static_cast<const Weight*>(p_.packed) + vector * p_.kernel_t * p_.kernel_h * row;
    const index_t channel = p_.lanes.group(vector) * p_.lanes.reduce;
    GroupedRow* to = rows_;
    for (index_t h = item_.row_begin; h < item_.row_end; ++h)
      for (index_t i = p_.t.begin[item_.t]; i < p_.t.begin[item_.t + 1]; ++i)
        for (index_t j = p_.h.begin[h]; j < p_.h.begin[h + 1]; ++j) {
          const TapSource in_t = p_.t.taps[i], in_h = p_.h.taps[j];
          *to++ = {row_of<const T>(p_.source, item_.n, in_t.source, in_h.source) + channel,
                   weights + (in_t.tap * p_.kernel_h + in_h.tap) * row};
        }
  }

  const GroupedParams& p_;
  const GroupedItem& item_;
  const Spread spread_;
  GroupedRow* rows_;
};

}  // namespace

void conv3d_grouped(const GroupedParams& params, const GroupedItem& item, GroupedRow* rows) {
  switch (params.type) {
    case DType::f32:
      return Item<Widened<float>>(params, item, rows).run();
    case DType::bf16:
#if defined(MF_ISA_avx512_bf16)
      if (params.pairs) return Item<Paired>(params, item, rows).run();
#endif
      return Item<Widened<bf16_t>>(params, item, rows).run();
    case DType::f16:
      return Item<Widened<f16_t>>(params, item, rows).run();
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
