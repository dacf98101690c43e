// lfq_quantize on the CPU: splits the positions over threads.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include "common/check.h"
#include "common/parallel.h"
#include "lfq_quantize/lfq_quantize.h"

namespace magvit_fast::cpu {

void lfq_quantize_forward(const LfqQuantizeParams& params, const ExecContext& ctx) {
  check(params.channels >= 1 && params.channels <= 63, "lfq_quantize: channels must be in 1..63");
  const auto kernel = MF_PICK_SIMD(lfq_quantize_range, ctx.isa);
  const index_t positions = params.outer * params.inner;
  // Below a few thousand elements a parallel region costs more than the work.
  const int threads = positions * params.channels < 16384 ? 1 : ctx.num_threads;
  parallel_ranges(positions, threads,
                  [&](index_t begin, index_t end, int) { kernel(params, begin, end); });
}

}  // namespace magvit_fast::cpu
