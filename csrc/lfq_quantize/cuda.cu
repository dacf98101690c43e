// lfq_quantize on CUDA: one thread a position, one pass over memory.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// z is read once and written once as signs: bound by bandwidth, or by launch below about 1e6
// elements. Channels-first reads are coalesced as they come; channels-last rows of a warp are
// neighbors, so the cache lines of a row are fully used across the channel loop.
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "lfq_quantize/lfq_quantize.h"

namespace magvit_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kLoopThreads) lfq_quantize_kernel(LfqQuantizeParams p) {
  const index_t positions = p.outer * p.inner;
  for (index_t position = loop_begin(); position < positions; position += loop_step()) {
    const index_t o = position / p.inner, i = position % p.inner;
    const index_t base = o * p.outer_stride + i * p.inner_stride;
    const T* z = static_cast<const T*>(p.z) + base;
    T* q = static_cast<T*>(p.quantized) + base;
    std::int64_t word = 0;
    for (index_t c = 0; c < p.channels; ++c) {
      const bool positive = static_cast<float>(z[c * p.channel_stride]) > 0.0f;
      q[c * p.channel_stride] = static_cast<T>(positive ? 1.0f : -1.0f);
      word |= static_cast<std::int64_t>(positive) << lfq_bit(c, p.channels, p.msb_first);
    }
    p.indices[position] = word;
  }
}

}  // namespace

void lfq_quantize_forward(const LfqQuantizeParams& params, const ExecContext& ctx) {
  with_type(params.dtype, [&](auto type) {
    launch_loop(ctx, "lfq_quantize", params.outer * params.inner,
                lfq_quantize_kernel<decltype(type)>, params);
  });
}

}  // namespace magvit_fast::cuda
