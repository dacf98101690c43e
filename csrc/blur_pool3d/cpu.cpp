// blur_pool3d on the CPU: splits the rows of the result over threads.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include "blur_pool3d/blur_pool3d.h"
#include "common/check.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {

void blur_pool3d_filter(const BlurPool3dParams& params, const ExecContext& ctx) {
  check(params.count >= 1 && params.count <= kBlurMaxTaps, "blur_pool3d: 1 to 8 taps");
  const auto kernel = MF_PICK_SIMD(blur_pool3d_rows, ctx.isa);
  const index_t rows = params.rows();
  // Below a few thousand elements a parallel region costs more than the work.
  const int threads = rows * params.axis[2].result * params.channels < 8192 ? 1 : ctx.num_threads;
  parallel_ranges(rows, threads,
                  [&](index_t begin, index_t end, int) { kernel(params, begin, end); });
}

}  // namespace magvit_fast::cpu
