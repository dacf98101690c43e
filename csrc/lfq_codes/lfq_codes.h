// lfq_codes: the inverse of lfq_quantize's packing, an index to its -1 / +1 channels.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"
#include "lfq_quantize/lfq_quantize.h"  // lfq_bit: one map for both directions

namespace magvit_fast {

struct LfqCodesParams {
  const std::int64_t* indices;  // [outer, inner], contiguous
  void* codes;                  // [outer, channels, inner], contiguous
  std::int64_t* bad;            // [1]: set to the smallest position whose index is outside
                                // [0, 2**channels); its codes are NaN. Untouched if there is none
  index_t outer, channels, inner;
  DType dtype;
  bool msb_first;
};

// Whether an index has bits beyond its channels (or is negative).
MF_HOST_DEVICE inline bool lfq_index_out_of_range(std::int64_t index, index_t channels) {
  return (static_cast<std::uint64_t>(index) >> channels) != 0;
}

namespace cpu {
void lfq_codes_forward(const LfqCodesParams& params, const ExecContext& ctx);
}
namespace cuda {
void lfq_codes_forward(const LfqCodesParams& params, const ExecContext& ctx);
}

// Positions [begin, end) of the flattened [outer, inner]; the smallest bad position among them, or
// -1.
MF_DECLARE_SIMD(index_t, lfq_codes_range,
                (const LfqCodesParams& params, index_t begin, index_t end))

}  // namespace magvit_fast
