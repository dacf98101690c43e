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
__global__ void __launch_bounds__(kLoopThreads) lfq_codes_kernel(LfqCodesParams p) {
  const index_t total = p.outer * p.channels * p.inner;
  for (index_t e = loop_begin(); e < total; e += loop_step()) {
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
  with_type(params.dtype, [&](auto type) {
    launch_loop(ctx, "lfq_codes", params.outer * params.channels * params.inner,
                lfq_codes_kernel<decltype(type)>, params);
  });
}

}  // namespace magvit_fast::cuda
