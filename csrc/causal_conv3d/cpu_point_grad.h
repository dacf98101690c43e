// causal_conv3d on the CPU: the weight gradient of 1x1x1 kernels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: cpu_point_grad.cpp.
#pragma once

#include <cstddef>

#include "causal_conv3d/causal_conv3d.h"

namespace magvit_fast::cpu {

// Whether every output reads the source at its own place and nothing else.
bool point_grad_serves(const Conv3dShape& shape);

std::size_t point_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx);
void point_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx);

}  // namespace magvit_fast::cpu
