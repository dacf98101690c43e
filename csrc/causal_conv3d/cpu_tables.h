// causal_conv3d on the CPU: the index maps written out as lists for the gather engine.
// Previous hop: cpu.cpp.
// Next hop: cpu_tables.cpp.
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/gather.h"
#include "causal_conv3d/workspace.h"

namespace magvit_fast::cpu {

enum class Direction { forward, input_grad };

// At least as many sources as any target gathers along the axis.
index_t most_sources(const AxisMap& axis, Direction direction);
AxisGather gather_axis(const AxisMap& axis, Direction direction, Workspace& workspace);
// `by_dilation`: the order of targets makes neighbors of the columns that dilated taps read.
WidthGather gather_width(const AxisMap& axis, Direction direction, index_t source_channels,
                         Workspace& workspace, bool by_dilation = false);

// The weight gradient asks the other way round: what each output reads through each tap.
struct SourceTables {
  std::int32_t *t, *h;  // [kernel][out], or -1
  std::int32_t* w;      // [padded column, from that of output 0 and tap 0 on], or -1
  std::int32_t* w_run;  // how many padded columns from here on read neighbors, or all nothing

  void fill(const AxisMap& of_t, const AxisMap& of_h, const AxisMap& of_w) const;
};
SourceTables source_tables(const AxisMap& t, const AxisMap& h, const AxisMap& w,
                           Workspace& workspace);

}  // namespace magvit_fast::cpu
