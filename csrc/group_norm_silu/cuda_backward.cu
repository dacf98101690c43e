// group_norm_silu on CUDA, backward: sums of slabs by channel, the terms of groups, one pass for
// dx. Previous hop: cuda.cu. Next hop: cuda_rows.cuh.
//
// Norm and SiLU are computed again from x. Bytes of n elements of b bytes (unmeasured): sums 2 n b
// (x and dy), dx 3 n b; together 0.66 ms for 8x17x128x128x128 bfloat16 at 4.3 TB/s. Instructions
// an element, bfloat16: sums 15, dx 16, where copy speed leaves 27; the special-function unit as
// forward. Prediction: 80-90 % of copy speed. dx goes through the slabs backwards (L2).
//
// The gradients of scale and shift need only the sums of du and du * (x - mean) of a cell, which
// the pass of sums makes anyway: they cost no reading of their own.
#include "common/cuda/reduce.cuh"
#include "group_norm_silu/cuda_rows.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kAhead = 2;

struct SpanSums {
  double dn, dnx;  // of dn and of dn * xhat
};
struct GroupTerms {
  float dn, dnx;  // means over the group of weight * dn and of weight * dn * xhat
};

struct Workspace {
  SpanSums* spans;     // [spans, C]
  ChannelSums* slabs;  // [slabs, C]
  ChannelSums* cells;  // [slabs, C] of one cell each: gradients of scale and shift, where adaptive
  GroupTerms* terms;   // [spans, groups]
  index_t bytes;

  Workspace(void* base, const GroupNormSiluInput& in, const NormPlan& plan) {
    const index_t slab_sums = plan.slabs * in.channels;
    const bool whole_slabs = in.adaptive() && !plan.by_cell;
    spans = static_cast<SpanSums*>(base);
    slabs = reinterpret_cast<ChannelSums*>(spans + in.spans() * in.channels);
    cells = slabs + slab_sums;
    terms = reinterpret_cast<GroupTerms*>(cells + (whole_slabs ? slab_sums : 0));
    bytes = in.spans() * in.channels * index_t{sizeof(SpanSums)} +
            slab_sums * (whole_slabs ? 2 : 1) * index_t{sizeof(ChannelSums)} +
            in.spans() * in.groups * index_t{sizeof(GroupTerms)};
  }
};

// The four sums of a thread: of the cell at hand, and of dn over all its cells.
template <int kVector>
struct Sums {
  float du[kVector], dux[kVector], dn[kVector], dnx[kVector];
};

template <class T, int kVector, bool kByCell>
__global__ void __launch_bounds__(kNormThreads)
    sums_kernel(GroupNormSiluBackward p, NormPlan plan, ChannelSums* out, ChannelSums* cells) {
  __shared__ LineSums scratch[kVector];
  const GroupNormSiluInput& in = p.in;
  const NormSlab slab(in, plan, blockIdx.x);
  const Lines at(in, kVector);
  const index_t frame = slab.frame * plan.positions * in.channels;
  const GroupStats* own =
      p.stats + (in.per_frame ? slab.frame : slab.frame / in.frames) * in.groups;
  const index_t slab_row = static_cast<index_t>(blockIdx.x) * in.channels;
  for (int tile = 0; tile < at.chunks; tile += at.columns) {
    Sums<kVector> sum = {};
    const int channel = (tile + at.column) * kVector;
    if (at.active(tile)) {
      const T* x = static_cast<const T*>(in.x) + frame + channel;
      const T* dy = static_cast<const T*>(p.dy) + frame + channel;
      Affine<kVector> affine(in, own, channel);
      float slope[kVector];
      const auto begin = [&](int row, int across) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) slope[v] = 1.0f, sum.du[v] = sum.dux[v] = 0.0f;
        if (in.adaptive()) condition<T>(in, slab.frame, row, across, channel, &affine, slope);
      };
      const auto end = [&](int row, int across) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          sum.dn[v] += slope[v] * sum.du[v];
          sum.dnx[v] += slope[v] * sum.dux[v];
          if constexpr (kByCell) {  // this thread has seen the whole cell
            const index_t cell =
                ((slab.frame * plan.cells_down + row) * plan.cells_across + across) * in.channels +
                channel + v;
            p.dshift[cell] = sum.du[v];
            p.dscale[cell] = affine.gain[v] * sum.dux[v] + affine.offset[v] * sum.du[v];
          }
        }
      };
      with_flag(in.silu, [&](auto silu) {
        over_slab<kByCell>(
            in, plan, slab, at, begin,
            [&](int first, int step, int count) {
              const T* const sources[2] = {x + first * in.channels, dy + first * in.channels};
              over_run<kAhead, 2, T, kVector>(
                  sources, step * in.channels, count, [&](index_t, const auto& read) {
#pragma unroll
                    for (int v = 0; v < kVector; ++v) {
                      const float away = static_cast<float>(read[0].value[v]) - affine.center[v];
                      const float u = away * affine.steep[v] + affine.level[v];
                      const float du = through_activation<decltype(silu)::value, T>(
                          static_cast<float>(read[1].value[v]), u);
                      sum.du[v] += du;
                      sum.dux[v] += du * away;
                    }
                  });
            },
            end);
      });
      if constexpr (!kByCell) {
        // The gradient of the slab's one cell is linear in the same sums: its lines come later.
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float du = sum.du[v];
          sum.du[v] = affine.gain[v] * sum.dux[v] + affine.offset[v] * du;
          sum.dux[v] = du;
        }
      }
    }
    const auto total = [&](const auto& of_line) {
      double first = 0.0, second = 0.0;
      for (int line = 0; line < at.lines; ++line) {
        const float2 one = of_line(line);
        first += static_cast<double>(one.x);
        second += static_cast<double>(one.y);
      }
      return ChannelSums{static_cast<float>(first), static_cast<float>(second)};
    };
    over_lines<kVector>(
        at, tile, scratch, [&](int v) { return make_float2(sum.dn[v], sum.dnx[v]); },
        [&](int c, const auto& of_line) { out[slab_row + c] = total(of_line); });
    if (!kByCell && in.adaptive())
      over_lines<kVector>(
          at, tile, scratch, [&](int v) { return make_float2(sum.du[v], sum.dux[v]); },
          [&](int c, const auto& of_line) { cells[slab_row + c] = total(of_line); });
  }
}

// One thread a channel of a row of cells: the slabs of its one cell, in order.
__global__ void __launch_bounds__(kNormThreads)
    cells_kernel(GroupNormSiluBackward p, NormPlan plan, const ChannelSums* slabs) {
  const index_t channels = p.in.channels, total = plan.slabs / plan.slabs_per_band * channels;
  const index_t step = static_cast<index_t>(gridDim.x) * kNormThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kNormThreads + threadIdx.x; i < total;
       i += step) {
    const ChannelSums* from = slabs + i / channels * plan.slabs_per_band * channels + i % channels;
    double dscale = 0.0, dshift = 0.0;
    for (int k = 0; k < plan.slabs_per_band; ++k) {
      dscale += static_cast<double>(from[k * channels].dn);
      dshift += static_cast<double>(from[k * channels].dnx);
    }
    p.dscale[i] = static_cast<float>(dscale);
    p.dshift[i] = static_cast<float>(dshift);
  }
}

constexpr int kTermThreads = 128;

// One block a group of a span: totals of dn and dn * xhat by channel, and the group's terms.
__global__ void __launch_bounds__(kTermThreads)
    terms_kernel(GroupNormSiluBackward p, NormPlan plan, const ChannelSums* slabs, SpanSums* spans,
                 GroupTerms* terms) {
  __shared__ SpanSums scratch[kTermThreads];
  __shared__ double warps[kTermThreads / kWarpSize];
  const GroupNormSiluInput& in = p.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int groups = static_cast<int>(in.groups), size = static_cast<int>(in.channels) / groups;
  const index_t span = static_cast<int>(blockIdx.x) / groups;
  const int group = static_cast<int>(blockIdx.x) % groups;
  const int columns = size < kTermThreads ? size : kTermThreads, lanes = kTermThreads / columns;
  const int column = thread % columns, lane = thread / columns;
  const GroupStats s = p.stats[blockIdx.x];
  double mean_dn = 0.0, mean_dnx = 0.0;
  for (int first = 0; first < size; first += columns) {
    const int c = group * size + first + column;
    const bool active = lane < lanes && first + column < size;
    SpanSums sum = {0.0, 0.0};
    if (active)
      for (index_t k = lane; k < plan.slabs_per_span; k += lanes) {
        const ChannelSums one = slabs[(span * plan.slabs_per_span + k) * in.channels + c];
        sum.dn += static_cast<double>(one.dn);
        sum.dnx += static_cast<double>(one.dnx);
      }
    scratch[thread] = sum;
    __syncthreads();
    if (active && lane == 0) {
      for (int l = 1; l < lanes; ++l) {
        sum.dn += scratch[l * columns + column].dn;
        sum.dnx += scratch[l * columns + column].dnx;
      }
      sum.dnx = (sum.dnx - static_cast<double>(s.mean_rest) * sum.dn) * static_cast<double>(s.rstd);
      spans[span * in.channels + c] = sum;
      const double weight = in.weight != nullptr ? static_cast<double>(in.weight[c]) : 1.0;
      mean_dn += weight * sum.dn;
      mean_dnx += weight * sum.dnx;
    }
    __syncthreads();
  }
  mean_dn = block_sum<kTermThreads>(mean_dn, warps);
  mean_dnx = block_sum<kTermThreads>(mean_dnx, warps);
  const index_t frames = in.per_frame ? 1 : in.frames;
  const double count = static_cast<double>(frames * plan.positions * size);
  if (thread == 0)
    terms[blockIdx.x] = {static_cast<float>(mean_dn / count), static_cast<float>(mean_dnx / count)};
}

// A block has 32 channels; eight threads share the spans of each.
__global__ void __launch_bounds__(kNormThreads)
    channel_grads_kernel(GroupNormSiluBackward p, const SpanSums* spans) {
  constexpr int kLanes = kNormThreads / kWarpSize;
  __shared__ SpanSums scratch[kNormThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const index_t c = static_cast<index_t>(blockIdx.x) * kWarpSize + thread % kWarpSize;
  SpanSums sum = {0.0, 0.0};
  if (c < p.in.channels)
    for (index_t span = thread / kWarpSize; span < p.in.spans(); span += kLanes) {
      sum.dn += spans[span * p.in.channels + c].dn;
      sum.dnx += spans[span * p.in.channels + c].dnx;
    }
  scratch[thread] = sum;
  __syncthreads();
  if (thread >= kWarpSize || c >= p.in.channels) return;
  for (int l = 1; l < kLanes; ++l) {
    sum.dn += scratch[l * kWarpSize + thread].dn;
    sum.dnx += scratch[l * kWarpSize + thread].dnx;
  }
  p.dbias[c] = static_cast<float>(sum.dn);
  p.dweight[c] = static_cast<float>(sum.dnx);
}

// dx = du * steep - (x - center) * slant - level, the last two of the group.
template <class T, int kVector, bool kByCell>
__global__ void __launch_bounds__(kNormThreads)
    input_grad_kernel(GroupNormSiluBackward p, NormPlan plan, const GroupTerms* terms) {
  const GroupNormSiluInput& in = p.in;
  const NormSlab slab(in, plan, gridDim.x - 1 - blockIdx.x);
  const Lines at(in, kVector);
  const index_t frame = slab.frame * plan.positions * in.channels;
  const index_t span = (in.per_frame ? slab.frame : slab.frame / in.frames) * in.groups;
  for (int tile = 0; tile < at.chunks; tile += at.columns) {
    if (!at.active(tile)) continue;
    const int channel = (tile + at.column) * kVector;
    const T* x = static_cast<const T*>(in.x) + frame + channel;
    const T* dy = static_cast<const T*>(p.dy) + frame + channel;
    T* dx = static_cast<T*>(p.dx) + frame + channel;
    Affine<kVector> affine(in, p.stats + span, channel);
    float slant[kVector], level[kVector];
    Affine<kVector>::over_groups(in, channel, [&](int v, int group) {
      const GroupStats s = p.stats[span + group];
      const GroupTerms t = terms[span + group];
      slant[v] = s.rstd * s.rstd * t.dnx;
      level[v] = s.rstd * t.dn - s.mean_rest * slant[v];
    });
    with_flag(in.silu, [&](auto silu) {
      over_slab<kByCell>(
          in, plan, slab, at,
          [&](int row, int across) {
            if (in.adaptive()) condition<T>(in, slab.frame, row, across, channel, &affine, nullptr);
          },
          [&](int first, int step, int count) {
            const index_t begin = first * in.channels;
            const T* const sources[2] = {x + begin, dy + begin};
            over_run<kAhead, 2, T, kVector>(
                sources, step * in.channels, count, [&](index_t place, const auto& read) {
                  store_chunk<T, kVector>(dx + begin + place, [&](int v) {
                    const float away = static_cast<float>(read[0].value[v]) - affine.center[v];
                    const float u = away * affine.steep[v] + affine.level[v];
                    const float du = through_activation<decltype(silu)::value, T>(
                        static_cast<float>(read[1].value[v]), u);
                    return du * affine.steep[v] - (away * slant[v] + level[v]);
                  });
                });
          },
          [](int, int) {});
    });
  }
}

}  // namespace

index_t norm_backward_bytes(const GroupNormSiluInput& in, const NormPlan& plan) {
  return Workspace(nullptr, in, plan).bytes;
}

void norm_backward(const GroupNormSiluBackward& params, const NormPlan& plan,
                   const DeviceGuard& guard, const ExecContext& ctx) {
  const GroupNormSiluInput& in = params.in;
  const Workspace space(params.workspace, in, plan);
  const bool aligned = aligned_16(in.x) && aligned_16(params.dy) && aligned_16(params.dx);
  const unsigned groups =
      grid_blocks(in.spans() * in.groups, "group_norm_silu: too many groups for one grid");
  with_kernel(in, plan, aligned, [&](auto type, auto vector, auto by_cell) {
    using T = decltype(type);
    constexpr int kVector = decltype(vector)::value;
    constexpr bool kByCell = decltype(by_cell)::value;
    const ChannelSums *slabs = space.slabs, *cells = space.cells;
    const SpanSums* spans = space.spans;
    const GroupTerms* terms = space.terms;
    launch(guard, ctx, sums_kernel<T, kVector, kByCell>, slab_blocks(plan), kNormThreads, 0, params,
           plan, space.slabs, space.cells);
    launch(guard, ctx, terms_kernel, groups, kTermThreads, 0, params, plan, slabs, space.spans,
           space.terms);
    launch(guard, ctx, channel_grads_kernel, blocks_for(in.channels, kWarpSize), kNormThreads, 0,
           params, spans);
    if (in.adaptive() && !kByCell)
      launch(guard, ctx, cells_kernel,
             blocks_for(plan.slabs / plan.slabs_per_band * in.channels, kNormThreads), kNormThreads,
             0, params, plan, cells);
    launch(guard, ctx, input_grad_kernel<T, kVector, kByCell>, slab_blocks(plan), kNormThreads, 0,
           params, plan, terms);
  });
}

}  // namespace magvit_fast::cuda
