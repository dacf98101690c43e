// lfq_codes on the CPU: splits the positions over threads.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include "common/check.h"
#include "common/parallel.h"
#include "lfq_codes/lfq_codes.h"

namespace magvit_fast::cpu {

void lfq_codes_forward(const LfqCodesParams& params, const ExecContext& ctx) {
  check(params.channels >= 1 && params.channels <= 63, "lfq_codes: channels must be in 1..63");
  const auto kernel = MF_PICK_SIMD(lfq_codes_range, ctx.isa);
  const index_t positions = params.outer * params.inner;
  const int threads = positions * params.channels < 16384 ? 1 : ctx.num_threads;
  index_t first_bad = -1;
  parallel_ranges(positions, threads, [&](index_t begin, index_t end, int) {
    const index_t bad = kernel(params, begin, end);
    if (bad < 0) return;
#pragma omp critical(magvit_fast_first_bad)
    if (first_bad < 0 || bad < first_bad) first_bad = bad;
  });
  if (first_bad >= 0) *params.bad = first_bad;
}

}  // namespace magvit_fast::cpu
