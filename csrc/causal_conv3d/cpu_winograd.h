// causal_conv3d on the CPU: the three ops by Winograd's algorithm, where winograd_serves says so.
// Previous hop: cpu.cpp, cpu_weight_grad.cpp.
// Next hop: cpu_winograd.cpp, cpu_winograd_weight_grad.cpp.
#pragma once

#include <cstddef>

#include "causal_conv3d/cpu_sides.h"

namespace magvit_fast::cpu {

std::size_t winograd_workspace(const Conv3dShape& shape, Direction direction,
                               const ExecContext& ctx);
void winograd_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors,
                  void* workspace, const ExecContext& ctx);

std::size_t winograd_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx);
void winograd_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx);

}  // namespace magvit_fast::cpu
