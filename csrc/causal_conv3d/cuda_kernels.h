// causal_conv3d on CUDA: what cuda.cu chooses among.
// Previous hop: cuda.cu.
// Next hop: sm90_gather.cu, sm90_weight.cu, cuda_gather_mma.cu, cuda_gather_fma.cu,
// cuda_weight_mma.cu, cuda_weight_fma.cu, cuda_thin_*.cu.
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/gemm_rows.h"
#include "causal_conv3d/thin_plan.h"
#include "common/cuda/launch.cuh"

namespace magvit_fast::cuda {

struct Moments;

// Forward (left = x and history, out = y) and input gradient (left = dy, out = dx and dhistory).
struct GatherProblem {
  GemmShape shape;
  EntryAxis axes[3];
  const void* left;
  const void* left_history;
  // Packed: [Cout, KT, KH, KW, Cin / groups]; for sm_90a [KT, KH, KW, produced, summed].
  const void* weight;
  const void* bias;      // [Cout] or null
  const void* residual;  // like out, added to it, or null
  void* out;
  void* out_history;  // null: not wanted
};

// What the forward kernel of sm_90a does beside the result.
struct Sm90Epilogue {
  Moments* moments;  // [N, t.out, tiles of a frame, Cout], of the rounded result, or null
  int factor[3];     // of depth to space; 1, 1, 1: none
  int dropped;       // leading frames that the result then lacks, below factor[0]

  int parts() const { return factor[0] * factor[1] * factor[2]; }
};

struct WeightProblem {
  GemmShape shape;
  const void* x;
  const void* history;
  const void* dy;
  // [parts, Cout, KT, KH, KW, Cin / groups]; for sm_90a the slots of sm90_weight_plan.h.
  float* partial;
  WeightSplit split;  // not for sm_90a
};

// Tensor cores take 16-bit types and move 16 bytes at a time: the channels that run innermost in
// the gathered operand and in the weights must come in eights, and the addresses be multiples
// of 16.
inline bool aligned_16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

inline bool can_run_mma_forward(const GemmShape& s) {
  return s.dtype != DType::f32 && s.group_in() % 8 == 0;
}
inline bool can_run_mma_gradients(const GemmShape& s) {
  return can_run_mma_forward(s) && s.group_out() % 8 == 0;
}

// Tiles of the weight gradient: (Cout x columns of taps and channels) of one group, and all groups.
struct WeightTiles {
  int rows, columns;  // of one tile
  index_t count;
};
WeightTiles weight_tiles_mma(const GemmShape& s);
WeightTiles weight_tiles_fma(const GemmShape& s);

void gather_mma_forward(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx);
void gather_mma_input_grad(const GatherProblem& p, const DeviceGuard& guard,
                           const ExecContext& ctx);
void gather_fma_forward(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx);
void gather_fma_input_grad(const GatherProblem& p, const DeviceGuard& guard,
                           const ExecContext& ctx);
void sm90_gather(const GatherProblem& p, bool forward, const Sm90Epilogue& epilogue,
                 const DeviceGuard& guard, const ExecContext& ctx);
// Bytes of `partial`; and the whole gradient, its parts added up.
std::size_t sm90_weight_grad_workspace(const GemmShape& s);
void sm90_weight_grad(const WeightProblem& p, void* dweight, const DeviceGuard& guard,
                      const ExecContext& ctx);

// A few channels on one side (thin_plan.h). `cells` is memory for thin_plan().quads() of 8 bytes.
bool can_run_thin_sum(const GemmShape& s, bool forward);
bool can_run_thin_result(const GemmShape& s, const ExecContext& ctx);
bool can_run_thin_weight(const GemmShape& s);
index_t thin_weight_tiles(const GemmShape& s);
WeightSplit thin_weight_split(const GemmShape& s);
void thin_expand(const GemmShape& s, const ThinPlan& plan, const void* thin, const void* history,
                 void* cells, const DeviceGuard& guard, const ExecContext& ctx);
void thin_sum(const GatherProblem& p, bool forward, void* cells, const DeviceGuard& guard,
              const ExecContext& ctx);
void thin_result(const GatherProblem& p, const DeviceGuard& guard, const ExecContext& ctx);
void thin_weight(const WeightProblem& p, void* cells, const DeviceGuard& guard,
                 const ExecContext& ctx);

void weight_mma(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx);
void weight_fma(const WeightProblem& p, const DeviceGuard& guard, const ExecContext& ctx);

}  // namespace magvit_fast::cuda
