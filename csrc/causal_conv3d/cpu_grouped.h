// causal_conv3d on the CPU: groups of few channels.
// Previous hop: cpu.cpp, cpu_weight_grad.cpp.
// Next hop: cpu_grouped.cpp, cpu_grouped_weight_grad.cpp.
#pragma once

#include <cstddef>

#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/grouped.h"

namespace magvit_fast::cpu {

// Whether the kernels for such groups serve; weights are then taken as they are.
bool grouped_serves(const Conv3dShape& shape, Direction direction, int isa);
bool grouped_weight_grad_serves(const Conv3dShape& shape, int isa);

std::size_t grouped_workspace(const Conv3dShape& shape, Direction direction,
                              const ExecContext& ctx);
void grouped_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors,
                 void* workspace, const ExecContext& ctx);

std::size_t grouped_weight_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx);
void grouped_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx);

}  // namespace magvit_fast::cpu
