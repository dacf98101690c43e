// causal_conv3d on the CPU: what Winograd's algorithm needs in all three ops, and where it pays.
// Previous hop: cpu.cpp, cpu_winograd.cpp, cpu_winograd_weight_grad.cpp.
// Next hop: cpu_winograd_plan.cpp.
#pragma once

#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/cpu_winograd_time.h"
#include "causal_conv3d/winograd.h"
#include "causal_conv3d/workspace.h"

namespace magvit_fast::cpu {

constexpr index_t kWinogradPad = 16;  // floats: points a power of two apart fight over cache sets

inline index_t least(index_t a, index_t b) { return a < b ? a : b; }

struct WinogradBase {
  WinogradParams params{};
  WinogradLayout layout{};
  TimePlanner planner;
  index_t points, tiles, groups, blocks, block_columns;

  // Tables come from the workspace; `cut` fills the rest of layout but for the weights.
  WinogradBase(const Conv3dShape& shape, Direction direction, const Tensors& tensors, int isa,
               Workspace& workspace);
  void cut(index_t count);  // the tiles into `count` groups or fewer
  WinogradTiles group(index_t i, WinogradLayout& of_group) const;
};

// The same tensors, for the channels `groups` groups of the convolution further on.
void shift_channels(WinogradParams& params, index_t groups);
// The same, from this channel of the sources on.
void skip_source_channels(WinogradParams& params, index_t channels);

PackLayout winograd_packing(int isa);

// The weight gradient walks the forward pass backwards and is planned like it.
enum class ConvOp { forward, input_grad, weight_grad };

// Whether the algorithm serves this work and is expected to be faster than the direct sum. Does not
// depend on the number of threads.
bool winograd_serves(const Conv3dShape& shape, ConvOp op, int isa);

}  // namespace magvit_fast::cpu
