// causal_conv3d on CUDA: adds up the parts of a weight gradient in their order, rounds, and turns
// [taps][channels] into the weight's own [channels][taps].
// Previous hop: cuda.cu, sm90_weight.cu.
// Next hop: none.
//
// A block takes 32 input channels of one output channel, a lane each; its warps take a tap at a
// time. The sums pass through shared memory, so that parts are read in rows of 128 bytes and the
// weight is written in runs of all its taps. Traffic: the parts once, the weight once.
#pragma once

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"

namespace magvit_fast::cuda {

// Where the sums of an output channel and a tap lie for 32 input channels: neighbors, `count`
// times, `stride` apart.
struct PartRow {
  index_t first, stride;
  int count;
};

constexpr int kSumThreads = 256, kSumTaps = 128;  // taps of a block

// Layout::row(output channel, first input channel, tap) is a PartRow.
template <class T, class Layout>
__global__ void sum_parts_kernel(const __grid_constant__ Layout layout, const float* partial,
                                 T* dweight, int channels, int taps) {
  __shared__ T turned[kWarpSize * kSumTaps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int across = ceil_div(channels, kWarpSize);
  const int out = static_cast<int>(blockIdx.x) / across;
  const int first = static_cast<int>(blockIdx.x) % across * kWarpSize;
  const int wide = channels - first < kWarpSize ? channels - first : kWarpSize;
  const int first_tap = static_cast<int>(blockIdx.y) * kSumTaps;
  const int here = taps - first_tap < kSumTaps ? taps - first_tap : kSumTaps;
  for (int i = thread / kWarpSize; i < here; i += kSumThreads / kWarpSize) {
    const PartRow row = layout.row(out, first, first_tap + i);
    if (lane >= wide) continue;
    const float* from = partial + row.first + lane;
    float sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < row.count; ++part) sum += from[part * row.stride];
    turned[lane * here + i] = static_cast<T>(sum);
  }
  __syncthreads();
  T* to = dweight + (static_cast<index_t>(out) * channels + first) * taps + first_tap;
  for (int i = thread; i < wide * here; i += kSumThreads)
    to[static_cast<index_t>(i / here) * taps + i % here] = turned[i];
}

// dweight [outs, channels, taps] of `dtype`.
template <class Layout>
void sum_parts(const Layout& layout, const float* partial, void* dweight, DType dtype, int outs,
               int channels, int taps, const DeviceGuard& guard, const ExecContext& ctx) {
  const dim3 grid(grid_blocks(index_t{outs} * ceil_div(channels, kWarpSize),
                              "causal_conv3d: more than 2^31 - 1 blocks of weights"),
                  static_cast<unsigned>(ceil_div(taps, kSumTaps)));
  check(grid.y <= 65535, "causal_conv3d: more taps than a weight gradient adds up");
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, sum_parts_kernel<T, Layout>, grid, kSumThreads, 0, layout, partial,
           static_cast<T*>(dweight), channels, taps);
  });
}

}  // namespace magvit_fast::cuda
