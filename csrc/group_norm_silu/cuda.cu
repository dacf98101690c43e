// group_norm_silu on CUDA: the door; which passes run, and where their numbers lie.
// Previous hop: bindings.cpp.
// Next hop: cuda_forward.cu, cuda_backward.cu.
//
// Forward: statistics (a pass that reads x, and a small merger), then one pass that reads x and
// writes y; that pass alone where the statistics are ready. Backward: a pass that reads x and dy,
// a small one, and one that reads both and writes dx. Sums have a fixed order (lines of a block,
// slabs, spans): no floating-point atomics, results are bit-reproducible.
#include "group_norm_silu/cuda_rows.cuh"

namespace magvit_fast::cuda {
namespace {

void check_input(const GroupNormSiluInput& in) {
  check(in.groups >= 1 && in.channels % in.groups == 0,
        "group_norm_silu: groups must divide the channels");
  check(in.cell[0] >= 1 && in.cell[1] >= 1 && in.cell[2] >= 1,
        "group_norm_silu: cells must have a size");
  check(!in.planes, "group_norm_silu: the CUDA kernels read the channels-last layout");
}

bool empty(const GroupNormSiluInput& in) { return in.batch * in.frames * in.frame_elements() == 0; }

}  // namespace

bool group_norm_silu_takes_planes(bool) { return false; }

index_t group_norm_silu_workspace_bytes(const GroupNormSiluInput& in, const ExecContext&) {
  check_input(in);
  if (empty(in)) return 0;
  const NormPlan plan(in);
  const index_t forward = norm_statistics_bytes(in, plan), backward = norm_backward_bytes(in, plan);
  return forward > backward ? forward : backward;
}

void group_norm_silu_forward(const GroupNormSiluForward& params, const ExecContext& ctx) {
  check_input(params.in);
  if (empty(params.in)) return;
  const NormPlan plan(params.in);
  const DeviceGuard guard(ctx, "group_norm_silu");
  if (!params.ready) norm_statistics(params.in, plan, params.workspace, params.stats, guard, ctx);
  if (params.y != nullptr) norm_apply(params, plan, guard, ctx);
  guard.finish();
}

void group_norm_silu_backward(const GroupNormSiluBackward& params, const ExecContext& ctx) {
  check_input(params.in);
  if (empty(params.in)) return;
  const NormPlan plan(params.in);
  const DeviceGuard guard(ctx, "group_norm_silu backward");
  norm_backward(params, plan, guard, ctx);
  guard.finish();
}

}  // namespace magvit_fast::cuda
