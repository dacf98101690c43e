// lfq_entropy on CUDA: the gradient.
// Previous hop: cuda.cu.
// Next hop: cuda_backward.cu.
#pragma once

#include "common/cuda/launch.cuh"
#include "lfq_entropy/lfq_entropy.h"

namespace magvit_fast::cuda {

void lfq_entropy_gradient(const LfqEntropyBackwardParams& params, const DeviceGuard& guard,
                          const ExecContext& ctx);

}  // namespace magvit_fast::cuda
