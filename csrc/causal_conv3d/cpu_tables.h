// causal_conv3d on the CPU: the index maps written out as lists for the gather engine.
// Previous hop: cpu.cpp.
// Next hop: cpu_tables.cpp.
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/gather.h"
#include "causal_conv3d/workspace.h"

namespace magvit_fast::cpu {

enum class Direction { forward, input_grad };

AxisGather gather_axis(const AxisMap& axis, Direction direction, Workspace& workspace);
WidthGather gather_width(const AxisMap& axis, Direction direction, index_t source_channels,
                         Workspace& workspace);

}  // namespace magvit_fast::cpu
