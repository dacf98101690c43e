// lfq_entropy on CUDA: the gradient, given the bit probabilities.
// Previous hop: cuda.cu.
// Next hop: cuda_backward.cu.
#pragma once

#include "lfq_entropy/cuda_plan.cuh"

namespace magvit_fast::cuda {

void lfq_entropy_gradient(const LfqEntropyBackwardParams& params, const EntropyWorkspace& space,
                          const DeviceGuard& guard, const ExecContext& ctx);

}  // namespace magvit_fast::cuda
