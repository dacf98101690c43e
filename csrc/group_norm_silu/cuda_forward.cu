// group_norm_silu on CUDA, forward: the moments of slabs and their merger, and one pass that
// applies statistics, made here or by the convolution before.
// Previous hop: cuda.cu.
// Next hop: cuda_rows.cuh, common/cuda/moments.cuh.
//
// Bytes of n elements of b bytes (unmeasured): statistics n b, apply 2 n b; the floor of both at
// 4.3 TB/s is 0.40 ms for 8x17x128x128x128 bfloat16, of the apply pass alone 0.27 ms. What lies
// between them is the second reading of x: the apply pass goes through the slabs backwards, so that
// it begins with what L2 still holds.
//
// Instructions an element, bfloat16 (counted in the source; copy speed on an H200 leaves 27 for a
// pass that reads and writes, 13 for one that reads): moments 6 (widen, pivot, Welford's four),
// apply 10 (widen, 2 for the norm, 4 + 1 for SiLU, half a narrowing, the rest loop and addresses).
// The two of the special-function unit an element (exp2, reciprocal) are 58 % of what it does at
// copy speed. Prediction: both passes at 85-90 % of copy speed; small frames at the launches.
//
//   v0  one thread an element with its index arithmetic, statistics by one thread a group
//   v1  16 bytes a thread, its channels' parameters in registers, no division an element, one pass
//       of moments; merger by a block a group
#include "common/cuda/moments.cuh"
#include "group_norm_silu/cuda_rows.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kAhead = 4;  // loads of 16 bytes that a thread has under way

// Welford's running mean and squares, about the first position of the slab: a mean far from zero
// or an outlier costs no digits.
template <class T, int kVector>
__global__ void __launch_bounds__(kNormThreads)
    moments_kernel(GroupNormSiluInput in, NormPlan plan, Moments* out) {
  __shared__ LineSums scratch[kVector];
  const NormSlab slab(in, plan, blockIdx.x);
  const Lines at(in, kVector);
  const T* x =
      static_cast<const T*>(in.x) + (slab.frame * plan.positions + slab.first) * in.channels;
  Moments* to = out + static_cast<index_t>(blockIdx.x) * in.channels;
  for (int tile = 0; tile < at.chunks; tile += at.columns) {
    float mean[kVector] = {}, squares[kVector] = {};
    if (at.active(tile)) {
      const T* first = x + (tile + at.column) * kVector;
      const auto pivot = *reinterpret_cast<const Chunk<T, kVector>*>(first);
      const T* const sources[1] = {first + at.line * in.channels};
      float count = 0.0f;
      over_run<kAhead, 1, T, kVector>(
          sources, at.lines * in.channels, at.rows(slab.count), [&](index_t, const auto& read) {
            count += 1.0f;
            const float share = __fdividef(1.0f, count);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              const float value =
                  static_cast<float>(read[0].value[v]) - static_cast<float>(pivot.value[v]);
              const float away = value - mean[v];
              mean[v] += away * share;
              squares[v] += away * (value - mean[v]);
            }
          });
    }
    over_lines<kVector>(
        at, tile, scratch, [&](int v) { return make_float2(mean[v], squares[v]); },
        [&](int c, const auto& of_line) {
          const double about = static_cast<double>(of_line(0).x);
          double first = 0.0, second = 0.0;
          for (int line = 0; line < at.lines && line < slab.count; ++line) {
            const float2 one = of_line(line);
            const double n = static_cast<double>((slab.count - line - 1) / at.lines + 1);
            const double away = static_cast<double>(one.x) - about;
            first += n * away;
            second += static_cast<double>(one.y) + n * away * away;
          }
          const double n = static_cast<double>(slab.count);
          to[c] = {static_cast<float>(n), static_cast<float>(x[c]),
                   static_cast<float>(about + first / n),
                   static_cast<float>(second - first / n * first)};
        });
  }
}

template <class T, int kVector, bool kByCell>
__global__ void __launch_bounds__(kNormThreads)
    apply_kernel(GroupNormSiluInput in, NormPlan plan, const GroupStats* stats, void* y) {
  const NormSlab slab(in, plan, gridDim.x - 1 - blockIdx.x);
  const Lines at(in, kVector);
  const index_t frame = slab.frame * plan.positions * in.channels;
  const GroupStats* own = stats + (in.per_frame ? slab.frame : slab.frame / in.frames) * in.groups;
  for (int tile = 0; tile < at.chunks; tile += at.columns) {
    if (!at.active(tile)) continue;
    const int channel = (tile + at.column) * kVector;
    const T* x = static_cast<const T*>(in.x) + frame + channel;
    T* to = static_cast<T*>(y) + frame + channel;
    Affine<kVector> affine(in, own, channel);
    with_flag(in.silu, [&](auto silu) {
      over_slab<kByCell>(
          in, plan, slab, at,
          [&](int row, int across) {
            if (in.adaptive()) condition<T>(in, slab.frame, row, across, channel, &affine, nullptr);
          },
          [&](int first, int step, int count) {
            const index_t begin = first * in.channels;
            const T* const sources[1] = {x + begin};
            over_run<kAhead, 1, T, kVector>(
                sources, step * in.channels, count, [&](index_t place, const auto& read) {
                  store_chunk<T, kVector>(to + begin + place, [&](int v) {
                    const float u = (static_cast<float>(read[0].value[v]) - affine.center[v]) *
                                        affine.steep[v] +
                                    affine.level[v];
                    return activate<decltype(silu)::value, T>(u);
                  });
                });
          },
          [](int, int) {});
    });
  }
}

}  // namespace

index_t norm_statistics_bytes(const GroupNormSiluInput& in, const NormPlan& plan) {
  return plan.slabs * in.channels * index_t{sizeof(Moments)};
}

void norm_statistics(const GroupNormSiluInput& in, const NormPlan& plan, void* workspace,
                     GroupStats* stats, const DeviceGuard& guard, const ExecContext& ctx) {
  Moments* parts = static_cast<Moments*>(workspace);
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    if (in.channels % kWide == 0 && aligned_16(in.x))
      launch(guard, ctx, moments_kernel<T, kWide>, slab_blocks(plan), kNormThreads, 0, in, plan,
             parts);
    else
      launch(guard, ctx, moments_kernel<T, 1>, slab_blocks(plan), kNormThreads, 0, in, plan, parts);
  });
  const MomentsMerger merger{parts,
                             plan.slabs_per_span,
                             static_cast<int>(in.channels),
                             static_cast<int>(in.groups),
                             in.eps,
                             stats};
  merge_moments(merger, in.spans(), guard, ctx);
}

void norm_apply(const GroupNormSiluForward& params, const NormPlan& plan, const DeviceGuard& guard,
                const ExecContext& ctx) {
  const GroupNormSiluInput& in = params.in;
  with_kernel(in, plan, aligned_16(in.x) && aligned_16(params.y),
              [&](auto type, auto vector, auto by_cell) {
                launch(
                    guard, ctx,
                    apply_kernel<decltype(type), decltype(vector)::value, decltype(by_cell)::value>,
                    slab_blocks(plan), kNormThreads, 0, in, plan,
                    static_cast<const GroupStats*>(params.stats), params.y);
              });
}

}  // namespace magvit_fast::cuda
