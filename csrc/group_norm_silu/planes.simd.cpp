// group_norm_silu of tensors in planes (channels-first), one source per instruction set: both
// directions. Previous hop: cpu.cpp. Next hop: row_math.h.
//
// A plane has one center, gain and offset, so that vectors run along its positions; otherwise the
// passes are those of kernels.simd.cpp and backward.simd.cpp. A slab's part of a plane stays in L1
// over the three readings that its moments take (rough mean, exact mean, squares).
#include "group_norm_silu/row_math.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kChains = 4;  // independent sums, for the latency of addition

// Sum over n values of term(vector).
template <class T, class Term>
inline float sum_of(const T* x, index_t n, const Term& term) {
  vf sum[kChains] = {};
  index_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) sum[k] += term(load(x + i + k * kLanes));
  for (; i + kLanes <= n; i += kLanes) sum[0] += term(load(x + i));
  float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const vf last = term(load_some(x + i, rest));
    for (int lane = 0; lane < rest; ++lane) total += last[lane];
  }
  return total;
}

template <class T>
void moments(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t index,
             double* out) {
  const GroupNormSiluSlab slab(in, plan, index);
  const index_t size = in.channels / in.groups, n = (slab.last - slab.first) * in.width;
  const float share = 1.0f / static_cast<float>(n);
  for (index_t g = 0; g < in.groups; ++g) {
    double count = 0.0, mean = 0.0, squares = 0.0;
    for (index_t c = g * size; c < (g + 1) * size; ++c) {
      const T* x = static_cast<const T*>(in.x) + in.plane(slab.frame, slab.first, c);
      const float rough = sum_of(x, n, [](vf v) { return v; }) * share;
      const float rest = sum_of(x, n, [&](vf v) { return v - rough; }) * share;
      const float square = sum_of(x, n, [&](vf v) {
        const vf d = v - rough - rest;
        return d * d;
      });
      const double of_plane = static_cast<double>(rough) + static_cast<double>(rest);
      const double more = static_cast<double>(n), total = count + more, delta = of_plane - mean;
      mean += delta * more / total;
      squares += static_cast<double>(square) + delta * delta * count * more / total;
      count = total;
    }
    out[2 * g] = mean;
    out[2 * g + 1] = squares;
  }
}

template <bool kSilu, class T>
void apply(const GroupNormSiluInput& in, const GroupNormSiluSlab& slab, const Affine& table, T* y) {
  const index_t positions = (slab.last - slab.first) * in.width;
  for (index_t c = 0; c < in.channels; ++c) {
    const index_t first = in.plane(slab.frame, slab.first, c);
    const T* from = static_cast<const T*>(in.x) + first;
    T* to = y + first;
    const vf center = splat(table.center[c]), gain = splat(table.gain[c]),
             offset = splat(table.offset[c]);
    over_channels(positions, [&](index_t i, int n, auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      const vf u = (get<kWhole>(from + i, n) - center) * gain + offset;
      put<kWhole>(to + i, activate<kSilu, T>(u), n);
    });
  }
}

template <bool kSilu, class T>
void sums_of(const GroupNormSiluBackward& p, const GroupNormSiluSlab& slab, const Affine& table,
             float* sum_dn, float* sum_dnx) {
  const GroupNormSiluInput& in = p.in;
  const index_t positions = (slab.last - slab.first) * in.width;
  for (index_t c = 0; c < in.channels; ++c) {
    const index_t first = in.plane(slab.frame, slab.first, c);
    const T* x = static_cast<const T*>(in.x) + first;
    const T* dy = static_cast<const T*>(p.dy) + first;
    const vf center = splat(table.center[c]), gain = splat(table.gain[c]),
             offset = splat(table.offset[c]);
    vf dn_sum[2] = {}, dnx_sum[2] = {};
    index_t turn = 0;
    over_channels(positions, [&](index_t i, int n, auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      const vf d = get<kWhole>(x + i, n) - center;
      // Lanes beyond the last position have dy = 0 and count nothing.
      const vf dn = through_activation<kSilu, T>(get<kWhole>(dy + i, n), d * gain + offset);
      dn_sum[turn] += dn;
      dnx_sum[turn] += dn * d;
      turn ^= 1;
    });
    sum_dn[c] = sum_lanes(dn_sum[0] + dn_sum[1]);
    sum_dnx[c] = sum_lanes(dnx_sum[0] + dnx_sum[1]);
  }
}

template <bool kSilu, class T>
void input_grad(const GroupNormSiluBackward& p, const GroupNormSiluSlab& slab, const Affine& table,
                const Terms& terms) {
  const GroupNormSiluInput& in = p.in;
  const index_t positions = (slab.last - slab.first) * in.width;
  for (index_t c = 0; c < in.channels; ++c) {
    const index_t first = in.plane(slab.frame, slab.first, c);
    const T* x = static_cast<const T*>(in.x) + first;
    const T* dy = static_cast<const T*>(p.dy) + first;
    T* dx = static_cast<T*>(p.dx) + first;
    const vf center = splat(table.center[c]), gain = splat(table.gain[c]),
             offset = splat(table.offset[c]), slant = splat(terms.slant[c]),
             level = splat(terms.level[c]);
    over_channels(positions, [&](index_t i, int n, auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      const vf d = get<kWhole>(x + i, n) - center;
      const vf dn = through_activation<kSilu, T>(get<kWhole>(dy + i, n), d * gain + offset);
      put<kWhole>(dx + i, dn * gain - d * slant - level, n);
    });
  }
}

// body(T{}) for the type of the tensors.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16_t{});
    case DType::f16:
      return body(f16_t{});
  }
}

}  // namespace

void group_norm_silu_planes_moments(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan,
                                    index_t slab, float*, double* out) {
  with_type(in.dtype, [&](auto type) { moments<decltype(type)>(in, plan, slab, out); });
}

void group_norm_silu_planes_apply(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan,
                                  index_t slab, const GroupStats* stats, float* scratch, void* y) {
  const GroupNormSiluSlab where(in, plan, slab);
  const Affine table(in, plan, stats, scratch);
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    if (in.silu) return apply<true>(in, where, table, static_cast<T*>(y));
    apply<false>(in, where, table, static_cast<T*>(y));
  });
}

void group_norm_silu_planes_sums(const GroupNormSiluBackward& params, const GroupNormSiluPlan& plan,
                                 index_t slab, const GroupStats* stats, float* scratch,
                                 float* sums) {
  const GroupNormSiluSlab where(params.in, plan, slab);
  const Affine table(params.in, plan, stats, scratch);
  float* second = sums + plan.padded_channels;
  with_type(params.in.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.in.silu) return sums_of<true, T>(params, where, table, sums, second);
    sums_of<false, T>(params, where, table, sums, second);
  });
}

void group_norm_silu_planes_input_grad(const GroupNormSiluBackward& params,
                                       const GroupNormSiluPlan& plan, index_t slab,
                                       const GroupStats* stats, const float* group_terms,
                                       float* scratch) {
  const GroupNormSiluSlab where(params.in, plan, slab);
  const Affine table(params.in, plan, stats, scratch);
  const Terms terms(params.in, plan, stats, group_terms, scratch);
  with_type(params.in.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.in.silu) return input_grad<true, T>(params, where, table, terms);
    input_grad<false, T>(params, where, table, terms);
  });
}

}  // namespace MF_ISA
}  // namespace magvit_fast
