// group_norm_silu backward, one source per instruction set: sums over a slab, then its gradient.
// Previous hop: cpu.cpp.
// Next hop: row_math.h.
//
// Norm and SiLU are computed again from x in both passes (an exp each): cheaper than to keep or to
// pass on what they gave. With dn = d loss / d (xhat * weight + bias):
//   dx = rstd * (weight * dn - mean(weight * dn) - xhat * mean(weight * dn * xhat))
// means over the group; the sums behind them, by channel, are also the gradients of weight and
// bias.
#include "group_norm_silu/row_math.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

inline void add_to(float* p, vf v) { store(p, load(p) + v); }

template <class T>
struct Slab {
  GroupNormSiluSlab at;
  const T *x, *dy;
  T* dx;
  index_t positions;

  Slab(const GroupNormSiluBackward& p, const GroupNormSiluPlan& plan, index_t index)
      : at(p.in, plan, index) {
    const index_t first = at.frame * p.in.frame_elements() + at.first * p.in.width * p.in.channels;
    x = static_cast<const T*>(p.in.x) + first;
    dy = static_cast<const T*>(p.dy) + first;
    dx = static_cast<T*>(p.dx) + first;
    positions = (at.last - at.first) * p.in.width;
  }
};

template <bool kSilu, class T>
void sums_plain(const GroupNormSiluInput& in, const Affine& table, const Slab<T>& slab,
                float* sum_dn, float* sum_dnx) {
  const index_t channels = in.channels;
  over_tiles(slab.positions, channels, [&](index_t row, index_t rows, index_t c, int n, auto tile) {
    using Shape = decltype(tile);
    const TileTable<Shape> center(table.center + c), gain(table.gain + c), offset(table.offset + c);
    const T *x = slab.x + row * channels + c, *dy = slab.dy + row * channels + c;
    vf first[Shape::vectors] = {}, second[Shape::vectors] = {};
    for (index_t r = 0; r < rows; ++r, x += channels, dy += channels)
#pragma GCC unroll 4
      for (int v = 0; v < Shape::vectors; ++v) {
        const vf d = get<Shape::whole>(x + v * kLanes, n) - center.at[v];
        const vf dn = through_activation<kSilu, T>(get<Shape::whole>(dy + v * kLanes, n),
                                                   d * gain.at[v] + offset.at[v]);
        first[v] += dn;
        second[v] += dn * d;
      }
    for (int v = 0; v < Shape::vectors; ++v) {
      add_to(sum_dn + c + v * kLanes, first[v]);
      add_to(sum_dnx + c + v * kLanes, second[v]);
    }
  });
}

template <bool kSilu, class T>
void sums_adaptive(const GroupNormSiluBackward& p, const Affine& table, const Slab<T>& slab,
                   float* sum_dn, float* sum_dnx) {
  const GroupNormSiluInput& in = p.in;
  const Condition<T> condition(in, slab.at);
  const index_t channels = in.channels, across = ceil_div(in.width, in.cell[2]);
  const index_t down = ceil_div(in.height, in.cell[1]);
  const index_t first_cell = slab.at.first / in.cell[1];
  const index_t cells = (ceil_div(slab.at.last, in.cell[1]) - first_cell) * across;
  const index_t start = (slab.at.frame * down + first_cell) * across * channels;
  for (index_t i = 0; i < cells * channels; ++i) p.dscale[start + i] = p.dshift[start + i] = 0.0f;
  const T *x = slab.x, *dy = slab.dy;
  for (index_t h = slab.at.first; h < slab.at.last; ++h)
    for (index_t w = 0; w < in.width; ++w, x += channels, dy += channels) {
      const T *scale = condition.scale_at(h, w), *shift = condition.shift_at(h, w);
      const index_t cell =
          start + ((h / in.cell[1] - first_cell) * across + w / in.cell[2]) * channels;
      over_channels(channels, [&](index_t c, int n, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        const vf d = get<kWhole>(x + c, n) - load(table.center + c);
        const vf normed = d * load(table.gain + c) + load(table.offset + c);
        const vf slope = 1.0f + get<kWhole>(scale + c, n);
        const vf du = through_activation<kSilu, T>(get<kWhole>(dy + c, n),
                                                   normed * slope + get<kWhole>(shift + c, n));
        float *to_scale = p.dscale + cell + c, *to_shift = p.dshift + cell + c;
        put<kWhole>(to_scale, get<kWhole>(to_scale, n) + du * normed, n);
        put<kWhole>(to_shift, get<kWhole>(to_shift, n) + du, n);
        add_to(sum_dn + c, du * slope);
        add_to(sum_dnx + c, du * slope * d);
      });
    }
}

template <class T>
void sums_of(const GroupNormSiluBackward& p, const GroupNormSiluPlan& plan, index_t index,
             const GroupStats* stats, float* scratch, float* sums) {
  const Slab<T> slab(p, plan, index);
  const Affine table(p.in, plan, stats, scratch);
  float* second = sums + plan.padded_channels;
  for (index_t c = 0; c < 2 * plan.padded_channels; ++c) sums[c] = 0.0f;
  if (p.in.adaptive())
    return p.in.silu ? sums_adaptive<true>(p, table, slab, sums, second)
                     : sums_adaptive<false>(p, table, slab, sums, second);
  return p.in.silu ? sums_plain<true>(p.in, table, slab, sums, second)
                   : sums_plain<false>(p.in, table, slab, sums, second);
}

template <bool kSilu, class T>
void input_grad_plain(const GroupNormSiluInput& in, const Affine& table, const Terms& terms,
                      const Slab<T>& slab) {
  const index_t channels = in.channels;
  over_tiles(slab.positions, channels, [&](index_t row, index_t rows, index_t c, int n, auto tile) {
    using Shape = decltype(tile);
    const TileTable<Shape> center(table.center + c), gain(table.gain + c), offset(table.offset + c),
        slant(terms.slant + c), level(terms.level + c);
    index_t at = row * channels + c;
    for (index_t r = 0; r < rows; ++r, at += channels)
#pragma GCC unroll 4
      for (int v = 0; v < Shape::vectors; ++v) {
        const vf d = get<Shape::whole>(slab.x + at + v * kLanes, n) - center.at[v];
        const vf dn = through_activation<kSilu, T>(get<Shape::whole>(slab.dy + at + v * kLanes, n),
                                                   d * gain.at[v] + offset.at[v]);
        put<Shape::whole>(slab.dx + at + v * kLanes,
                          dn * gain.at[v] - d * slant.at[v] - level.at[v], n);
      }
  });
}

template <bool kSilu, class T>
void input_grad_adaptive(const GroupNormSiluInput& in, const Affine& table, const Terms& terms,
                         const Slab<T>& slab) {
  const Condition<T> condition(in, slab.at);
  const index_t channels = in.channels;
  index_t first = 0;
  for (index_t h = slab.at.first; h < slab.at.last; ++h)
    for (index_t w = 0; w < in.width; ++w, first += channels) {
      const T *scale = condition.scale_at(h, w), *shift = condition.shift_at(h, w);
      over_channels(channels, [&](index_t c, int n, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        const index_t at = first + c;
        const vf d = get<kWhole>(slab.x + at, n) - load(table.center + c);
        const vf gain = load(table.gain + c), slope = 1.0f + get<kWhole>(scale + c, n);
        const vf u = (d * gain + load(table.offset + c)) * slope + get<kWhole>(shift + c, n);
        const vf dn = through_activation<kSilu, T>(get<kWhole>(slab.dy + at, n), u) * slope;
        put<kWhole>(slab.dx + at, dn * gain - d * load(terms.slant + c) - load(terms.level + c), n);
      });
    }
}

template <class T>
void input_grad(const GroupNormSiluBackward& p, const GroupNormSiluPlan& plan, index_t index,
                const GroupStats* stats, const float* group_terms, float* scratch) {
  const Slab<T> slab(p, plan, index);
  const Affine table(p.in, plan, stats, scratch);
  const Terms terms(p.in, plan, stats, group_terms, scratch);
  if (p.in.adaptive())
    return p.in.silu ? input_grad_adaptive<true>(p.in, table, terms, slab)
                     : input_grad_adaptive<false>(p.in, table, terms, slab);
  return p.in.silu ? input_grad_plain<true>(p.in, table, terms, slab)
                   : input_grad_plain<false>(p.in, table, terms, slab);
}

}  // namespace

void group_norm_silu_rows_sums(const GroupNormSiluBackward& params, const GroupNormSiluPlan& plan,
                               index_t slab, const GroupStats* stats, float* scratch, float* sums) {
  switch (params.in.dtype) {
    case DType::f32:
      return sums_of<float>(params, plan, slab, stats, scratch, sums);
    case DType::bf16:
      return sums_of<bf16_t>(params, plan, slab, stats, scratch, sums);
    case DType::f16:
      return sums_of<f16_t>(params, plan, slab, stats, scratch, sums);
  }
}

void group_norm_silu_rows_input_grad(const GroupNormSiluBackward& params,
                                     const GroupNormSiluPlan& plan, index_t slab,
                                     const GroupStats* stats, const float* terms, float* scratch) {
  switch (params.in.dtype) {
    case DType::f32:
      return input_grad<float>(params, plan, slab, stats, terms, scratch);
    case DType::bf16:
      return input_grad<bf16_t>(params, plan, slab, stats, terms, scratch);
    case DType::f16:
      return input_grad<f16_t>(params, plan, slab, stats, terms, scratch);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
