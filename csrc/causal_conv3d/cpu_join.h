// causal_conv3d on the CPU: source rows in which the taps of a row stand side by side.
// Previous hop: cpu.cpp.
// Next hop: cpu_join.cpp.
//
// The sum over few channels is too short for the tile loop: 3 channels are 3 products between one
// set of pointers and the next. So the sources of a target's row taps are copied next to each
// other, KW * C channels at every target column, and the kernel becomes KT x KH x 1. The copy is
// KW times the source, which is small against the results that such layers make.
#pragma once

#include <cstdint>

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/cpu_tables.h"
#include "causal_conv3d/gather.h"

namespace magvit_fast::cpu {

// Whether every target column has at most one source a tap, and the sum of `reduce` channels is
// short.
bool joins_row_taps(const AxisMap& width, Direction direction, index_t reduce);

// `joined` of `joined_type` [N, frames, H, targets, groups, KW, C] from `source` of `source_type`.
// `columns` is memory for KW * targets numbers.
struct RowJoin {
  SplitTensor source, joined;
  DType source_type, joined_type;
  index_t batch, groups, kernel;
  std::int32_t* columns;
};
void join_rows(const RowJoin& join, const AxisMap& width, Direction direction, int num_threads);

}  // namespace magvit_fast::cpu
