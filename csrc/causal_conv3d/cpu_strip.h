// causal_conv3d on the CPU: forward pass and input gradient as work for the strip engine.
// Previous hop: cpu.cpp.
// Next hop: cpu_strip.cpp.
#pragma once

#include <cstddef>

#include "causal_conv3d/cpu_sides.h"

namespace magvit_fast::cpu {

// Whether the engine serves this work and is expected to be faster than the gather engine. Does not
// depend on the number of threads.
bool strip_serves(const Conv3dShape& shape, Direction direction, int isa);

struct StripPacking {
  WeightView weight;
  PackLayout layout;
};
StripPacking strip_packing(const Conv3dShape& shape, Direction direction, const void* weight,
                           int isa);

std::size_t strip_workspace(const Conv3dShape& shape, Direction direction, const ExecContext& ctx);
void strip_run(const Conv3dShape& shape, Direction direction, const Tensors& tensors,
               void* workspace, const ExecContext& ctx);

}  // namespace magvit_fast::cpu
