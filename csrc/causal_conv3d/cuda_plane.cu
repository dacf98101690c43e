// causal_conv3d on CUDA: writes the padding of planes out, and folds gradients of it back.
// Previous hop: cuda.cu (for the kernel of sm_90a, which takes zeros around a plane for free but
// neither repeated nor mirrored edges). Next hop: index_map.h.
//
// A copy each: read and written once, 0.27 ms for 8x17x128x128x128 of 16 bits at 4.3 TB/s beside a
// convolution of 2.4 ms at least. A block a row, 16 bytes a thread.
#include "causal_conv3d/cuda_plane.h"
#include "common/cuda/convert.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kChannels = 8;

struct Planes {
  AxisMap32 h, w;
  int padded_h, padded_w;
  int chunks;  // of eight channels
  const uint4* from;
  uint4* to;
};

__global__ void __launch_bounds__(kThreads) pad_planes_kernel(Planes p) {
  const int row = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.padded_h));
  const index_t frame = blockIdx.x / static_cast<unsigned>(p.padded_h);
  const int h = source_at(p.h, row - p.h.front);
  const uint4* from = p.from + (frame * p.h.source + h) * p.w.source * p.chunks;
  uint4* to = p.to + static_cast<index_t>(blockIdx.x) * p.padded_w * p.chunks;
  for (int i = static_cast<int>(threadIdx.x); i < p.padded_w * p.chunks; i += kThreads) {
    const int column = i / p.chunks;
    const int w = source_at(p.w, column - p.w.front);
    const bool zero = h < 0 || w < 0;
    to[i] = zero ? make_uint4(0, 0, 0, 0) : from[i + (w - column) * p.chunks];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) fold_planes_kernel(Planes p) {
  const int h = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.h.source));
  const index_t frame = blockIdx.x / static_cast<unsigned>(p.h.source);
  uint4* to = p.to + static_cast<index_t>(blockIdx.x) * p.w.source * p.chunks;
  for (int i = static_cast<int>(threadIdx.x); i < p.w.source * p.chunks; i += kThreads) {
    const int w = i / p.chunks, chunk = i % p.chunks;
    float2 sum[kChannels / 2] = {};
    for (int a = 0; a < copies(p.h, h); ++a)
      for (int b = 0; b < copies(p.w, w); ++b) {
        const int row = copy_position(p.h, h, a) + p.h.front;
        const int column = copy_position(p.w, w, b) + p.w.front;
        if (row >= p.padded_h || column >= p.padded_w) continue;  // read by no tap
        const uint4 found =
            p.from[((frame * p.padded_h + row) * p.padded_w + column) * p.chunks + chunk];
        const std::uint32_t pairs[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
        for (int k = 0; k < kChannels / 2; ++k) {
          const float2 one = unpack_pair<T>(pairs[k]);
          sum[k].x += one.x;
          sum[k].y += one.y;
        }
      }
    to[i] = make_uint4(pack_pair<T>(sum[0].x, sum[0].y), pack_pair<T>(sum[1].x, sum[1].y),
                       pack_pair<T>(sum[2].x, sum[2].y), pack_pair<T>(sum[3].x, sum[3].y));
  }
}

Planes planes(const GemmShape& s, const void* from, void* to) {
  const GemmShape wide = on_padded_planes(s);
  return {s.h,
          s.w,
          wide.h.source,
          wide.w.source,
          s.in_channels / kChannels,
          static_cast<const uint4*>(from),
          static_cast<uint4*>(to)};
}

dim3 rows(const GemmShape& s, int frames, int height) {
  return dim3(grid_blocks(index_t{s.batch} * frames * height,
                          "causal_conv3d: more than 2^31 - 1 rows of planes"));
}

}  // namespace

void pad_planes(const GemmShape& s, const void* from, int frames, void* to,
                const DeviceGuard& guard, const ExecContext& ctx) {
  if (frames == 0) return;
  const Planes p = planes(s, from, to);
  launch(guard, ctx, pad_planes_kernel, rows(s, frames, p.padded_h), kThreads, 0, p);
}

void fold_planes(const GemmShape& s, const void* from, int frames, void* to,
                 const DeviceGuard& guard, const ExecContext& ctx) {
  if (frames == 0) return;
  const Planes p = planes(s, from, to);
  with_half_type(s.dtype, [&](auto type) {
    launch(guard, ctx, fold_planes_kernel<decltype(type)>, rows(s, frames, s.h.source), kThreads, 0,
           p);
  });
}

}  // namespace magvit_fast::cuda
