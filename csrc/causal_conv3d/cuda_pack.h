// causal_conv3d on CUDA: weights in the order of a kernel.
// Previous hop: cuda.cu.
// Next hop: cuda_pack.cu.
#pragma once

#include "causal_conv3d/gemm_rows.h"
#include "common/cuda/launch.cuh"

namespace magvit_fast::cuda {

// Where packed weights stand: element (cout, channel, tap) at cout * out + channel * in + tap *
// tap.
struct PackedOrder {
  index_t out, in, tap;
};

// [Cout, taps, Cin], which the portable kernels read in both directions; and [taps, produced,
// summed] for the kernel of sm_90a.
inline PackedOrder by_output(const GemmShape& s) {
  return {index_t{s.taps()} * s.group_in(), 1, s.group_in()};
}
inline PackedOrder by_tap(const GemmShape& s, bool forward) {
  const index_t all = index_t{s.in_channels} * s.out_channels;
  if (forward) return {s.in_channels, 1, all};
  return {1, s.out_channels, all};
}

// Room for packed weights, and behind them a mark for each block that packs a part of them.
std::size_t packed_bytes(const GemmShape& s);
std::size_t marks_bytes(const GemmShape& s);

// `marks` null: packs. Else: a block packs its part where its weights differ from the ones that
// left its mark, so that memory kept from call to call is never stale, whoever wrote the weights
// and however: 64 bits of all of them decide, on the device. No mark yet: zeros.
void pack_weight(const GemmShape& s, const PackedOrder& order, const void* weight, void* packed,
                 std::uint64_t* marks, const DeviceGuard& guard, const ExecContext& ctx);

}  // namespace magvit_fast::cuda
