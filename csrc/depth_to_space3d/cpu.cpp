// depth_to_space3d on the CPU: splits the rows of the result over threads.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include "common/check.h"
#include "common/parallel.h"
#include "depth_to_space3d/depth_to_space3d.h"

namespace magvit_fast::cpu {

void depth_to_space3d_permute(const DepthToSpace3dParams& params, const ExecContext& ctx) {
  check(params.dropped >= 0 && params.wide_frames() >= 0,
        "depth_to_space3d: more frames dropped than there are");
  const auto kernel = MF_PICK_SIMD(depth_to_space3d_rows, ctx.isa);
  const index_t rows = params.rows();
  const index_t bytes = rows * params.width * params.factor[2] * params.element_bytes *
                        (params.channels_last ? params.channels : 1);
  // Below, a parallel region costs more than the work.
  const int threads = bytes < 65536 ? 1 : ctx.num_threads;
  parallel_ranges(rows, threads,
                  [&](index_t begin, index_t end, int) { kernel(params, begin, end); });
}

}  // namespace magvit_fast::cpu
