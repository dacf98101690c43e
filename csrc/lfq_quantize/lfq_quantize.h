// lfq_quantize: the sign of every channel (z <= 0 -> -1) and the packed bits as an index.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct LfqQuantizeParams {
  const void* z;          // [outer, channels, inner], strides below, in elements
  void* quantized;        // dtype and strides of z
  std::int64_t* indices;  // [outer, inner], contiguous
  index_t outer, channels, inner;
  index_t outer_stride, channel_stride, inner_stride;
  DType dtype;
  bool msb_first;  // channel 0 is the most significant bit (else the least)
};

// The bit position of channel c.
MF_HOST_DEVICE inline int lfq_bit(index_t c, index_t channels, bool msb_first) {
  return static_cast<int>(msb_first ? channels - 1 - c : c);
}

namespace cpu {
void lfq_quantize_forward(const LfqQuantizeParams& params, const ExecContext& ctx);
}
namespace cuda {
void lfq_quantize_forward(const LfqQuantizeParams& params, const ExecContext& ctx);
}

// Positions [begin, end) of the flattened [outer, inner]; one thread's share.
MF_DECLARE_SIMD(void, lfq_quantize_range,
                (const LfqQuantizeParams& params, index_t begin, index_t end))

}  // namespace magvit_fast
