// causal_conv3d on the CPU: the input gradient of planes padded with copies, where Winograd serves.
// Previous hop: cpu.cpp.
// Next hop: cpu_fold.cpp.
#pragma once

#include <cstddef>

#include "causal_conv3d/causal_conv3d.h"

namespace magvit_fast::cpu {

// Whether the gradient is taken so; `weight` is then never packed by the caller.
bool folds_border(const Conv3dShape& shape, const ExecContext& ctx);

std::size_t folded_input_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx);
void folded_input_grad(const Conv3dInputGradParams& params, const ExecContext& ctx);

}  // namespace magvit_fast::cpu
