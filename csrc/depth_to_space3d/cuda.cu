// depth_to_space3d on CUDA: one thread an element, in the order of the wide tensor.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Channels-last: neighbors in a warp are neighbors on both sides. A copy: bound by bandwidth.
#include "common/cuda/launch.cuh"
#include "depth_to_space3d/depth_to_space3d.h"

namespace magvit_fast::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) permute_kernel(DepthToSpace3dParams p) {
  const index_t inner = p.channels_last ? p.channels : 1;
  const index_t row_elements = p.width * p.factor[2] * inner, total = p.rows() * row_elements;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const DepthToSpace3dRow row(p, i / row_elements);
    if (row.dropped && !p.to_depth) continue;
    const index_t along = i % row_elements, position = along / inner, c = along % inner;
    const index_t wide = row.wide + along;
    const index_t deep =
        row.deep + position / p.factor[2] * row.step + position % p.factor[2] * row.part + c;
    const T* from = static_cast<const T*>(p.from);
    T* to = static_cast<T*>(p.to);
    if (p.to_depth)
      to[deep] = row.dropped ? T{} : from[wide];
    else
      to[wide] = from[deep];
  }
}

}  // namespace

void depth_to_space3d_permute(const DepthToSpace3dParams& params, const ExecContext& ctx) {
  check(params.dropped >= 0 && params.wide_frames() >= 0,
        "depth_to_space3d: more frames dropped than there are");
  const index_t inner = params.channels_last ? params.channels : 1;
  const index_t total = params.rows() * params.width * params.factor[2] * inner;
  if (total == 0) return;
  const DeviceGuard guard(ctx, "depth_to_space3d");
  const unsigned blocks = blocks_for(total, kThreads);
  switch (params.element_bytes) {
    case 8:
      launch(guard, ctx, permute_kernel<std::uint64_t>, blocks, kThreads, 0, params);
      break;
    case 4:
      launch(guard, ctx, permute_kernel<std::uint32_t>, blocks, kThreads, 0, params);
      break;
    case 2:
      launch(guard, ctx, permute_kernel<std::uint16_t>, blocks, kThreads, 0, params);
      break;
    default:
      launch(guard, ctx, permute_kernel<std::uint8_t>, blocks, kThreads, 0, params);
  }
  guard.finish();
}

}  // namespace magvit_fast::cuda
