// depth_to_space3d on CUDA: one thread an element, in the order of the wide tensor.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Channels-last: neighbors in a warp are neighbors on both sides, and where the channels of a
// position fill 16 bytes an element is 16 bytes (the copy does not look inside), so that the dozen
// divisions of an index serve eight 16-bit values: without that they, not memory, are the limit. A
// copy: floor 0.53 ms at 8x17x128x128x128 bfloat16 and 4.3 TB/s; predicted 0.6 ms. Unmeasured.
#include "common/cuda/launch.cuh"
#include "depth_to_space3d/depth_to_space3d.h"

namespace magvit_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kLoopThreads) permute_kernel(DepthToSpace3dParams p) {
  const index_t inner = p.channels_last ? p.channels : 1;
  const index_t row_elements = p.width * p.factor[2] * inner, total = p.rows() * row_elements;
  for (index_t i = loop_begin(); i < total; i += loop_step()) {
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
  DepthToSpace3dParams p = params;
  if (p.channels_last && p.channels * p.element_bytes % 16 == 0 && all_aligned_16(p.from, p.to)) {
    p.channels = p.channels * p.element_bytes / 16;
    p.element_bytes = 16;
  }
  const index_t inner = p.channels_last ? p.channels : 1;
  const index_t total = p.rows() * p.width * p.factor[2] * inner;
  const auto copy = [&](auto kernel) { launch_loop(ctx, "depth_to_space3d", total, kernel, p); };
  switch (p.element_bytes) {
    case 16:
      return copy(permute_kernel<uint4>);
    case 8:
      return copy(permute_kernel<std::uint64_t>);
    case 4:
      return copy(permute_kernel<std::uint32_t>);
    case 2:
      return copy(permute_kernel<std::uint16_t>);
    default:
      return copy(permute_kernel<std::uint8_t>);
  }
}

}  // namespace magvit_fast::cuda
