// causal_conv3d on CUDA, a few channels on one side: what the kernels of thin layers share.
// Previous hop: cuda_thin_gather.cu, cuda_thin_result.cu, cuda_thin_weight.cu.
// Next hop: thin_plan.h.
#pragma once

#include "causal_conv3d/cuda_kernels.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/ptx.cuh"

namespace magvit_fast::cuda {

constexpr std::size_t kQuadBytes = kThinQuad * 2;

// Offsets of a row's quads from its base, in the order (tap, quad of the cell); `count` of them.
// All threads of a block.
__device__ __forceinline__ void note_offsets(const GemmShape& s, const ThinPlan& plan, int* offsets,
                                             int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int tap = i / plan.cell_quads;
    const int kw = tap % s.w.kernel, kh = tap / s.w.kernel % s.h.kernel;
    const int kt = tap / s.w.kernel / s.h.kernel;
    offsets[i] = plan.offset(kt, kh, kw) + i % plan.cell_quads;
  }
}

// Eight channels of 16 bits, neighbors in memory.
template <class T>
__device__ __forceinline__ uint4 pack_eight(const float (&value)[8]) {
  return make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                    pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
}
template <class T>
__device__ __forceinline__ void add_eight(float (&value)[8], const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const std::uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_pair<T>(pairs[i]);
    value[2 * i] += pair.x;
    value[2 * i + 1] += pair.y;
  }
}

}  // namespace magvit_fast::cuda
