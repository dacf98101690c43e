// lfq_codes on CUDA: one thread a code element, one pass over memory.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Grid: a grid-stride loop over [outer, channels, inner] in memory order, so that stores are
// coalesced whichever axis is innermost; an index is read once a channel, from cache after the
// first. Traffic: 8 bytes a position and the codes once. Bound by bandwidth, or by launch below
// about 1e6 elements.
#include "common/cuda/bad_position.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "lfq_codes/lfq_codes.h"

namespace magvit_fast::cuda {
namespace {

template <class T>
__global__ void lfq_codes_kernel(LfqCodesParams p) {
  const index_t total = p.outer * p.channels * p.inner;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t e = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total;
       e += step) {
    const index_t i = e % p.inner, c = e / p.inner % p.channels, o = e / p.inner / p.channels;
    const index_t position = o * p.inner + i;
    const std::int64_t index = p.indices[position];
    const bool bad = lfq_index_out_of_range(index, p.channels);
    if (bad && c == 0) report_bad(p.bad, position);
    const bool positive = (index >> lfq_bit(c, p.channels, p.msb_first)) & 1;
    const float code = positive ? 1.0f : -1.0f;
    static_cast<T*>(p.codes)[e] = static_cast<T>(bad ? nanf("") : code);
  }
}

}  // namespace

void lfq_codes_forward(const LfqCodesParams& params, const ExecContext& ctx) {
  check(params.channels >= 1 && params.channels <= 63, "lfq_codes: channels must be in 1..63");
  const index_t total = params.outer * params.channels * params.inner;
  if (total == 0) return;
  const DeviceGuard guard(ctx, "lfq_codes");
  constexpr unsigned kThreads = 256;
  with_type(params.dtype, [&](auto type) {
    launch(guard, ctx, lfq_codes_kernel<decltype(type)>, dim3(blocks_for(total, kThreads)),
           kThreads, 0, params);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
