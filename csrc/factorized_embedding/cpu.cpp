// factorized_embedding on the CPU: forward split over positions, backward over columns.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include "common/check.h"
#include "common/parallel.h"
#include "factorized_embedding/factorized_embedding.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kSerialElements = 16384;  // below this a parallel region costs more than the work

void check_params(const FactorizedEmbeddingParams& p) {
  check(p.groups >= 1 && p.groups <= kFactorizedEmbeddingMaxGroups,
        "factorized_embedding: groups must be in 1..8");
  check(p.bits >= 0 && p.groups * p.bits <= 63, "factorized_embedding: at most 63 bits an id");
}

int threads_for(const FactorizedEmbeddingParams& p, const ExecContext& ctx) {
  return p.positions * p.dim < kSerialElements ? 1 : ctx.num_threads;
}

}  // namespace

index_t factorized_embedding_workspace_bytes(const FactorizedEmbeddingParams& p,
                                             const ExecContext&) {
  // float32 sums, where the gradient itself is no float32.
  return p.dtype == DType::f32 ? 0 : (index_t{p.groups} << p.bits) * p.dim * 4;
}

void factorized_embedding_forward(const FactorizedEmbeddingForwardParams& params,
                                  const ExecContext& ctx) {
  check_params(params.in);
  const auto kernel = MF_PICK_SIMD(factorized_embedding_forward_range, ctx.isa);
  index_t first_bad = -1;
  parallel_ranges(params.in.positions, threads_for(params.in, ctx),
                  [&](index_t begin, index_t end, int) {
                    const index_t bad = kernel(params, begin, end);
                    if (bad < 0) return;
#pragma omp critical(magvit_fast_first_bad)
                    if (first_bad < 0 || bad < first_bad) first_bad = bad;
                  });
  if (first_bad >= 0) *params.bad = first_bad;
}

// Every column is summed by one thread, over the positions in order: the result depends neither on
// the number of threads nor on the width of a block. The block's sums of all rows stay in L2.
void factorized_embedding_backward(const FactorizedEmbeddingBackwardParams& params,
                                   const ExecContext& ctx) {
  check_params(params.in);
  const auto kernel = MF_PICK_SIMD(factorized_embedding_backward_columns, ctx.isa);
  constexpr index_t kCacheFloats = 128 * 1024, kLeastColumns = 32;
  const index_t rows = index_t{params.in.groups} << params.in.bits;
  index_t columns = kCacheFloats / rows / kLeastColumns * kLeastColumns;
  const index_t share =
      round_up(ceil_div(params.in.dim, static_cast<index_t>(ctx.num_threads)), kLeastColumns);
  if (columns > share) columns = share;
  if (columns > kFactorizedEmbeddingColumns) columns = kFactorizedEmbeddingColumns;
  if (columns < kLeastColumns) columns = kLeastColumns;
  parallel_items(ceil_div(params.in.dim, columns), threads_for(params.in, ctx),
                 [&](index_t block, int) {
                   const index_t begin = block * columns;
                   const index_t end = begin + columns;
                   kernel(params, begin, end < params.in.dim ? end : params.in.dim);
                 });
}

}  // namespace magvit_fast::cpu
