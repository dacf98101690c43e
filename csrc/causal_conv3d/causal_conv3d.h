// causal_conv3d: 3D convolution with one-sided time padding, and its two gradients.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp, cpu_weight_grad.cpp or cuda.cu; index_map.h is the geometry.
//
//   y[n, o, co] = residual[n, o, co] + bias[co] + sum over tap, ci of x[n, source(o, tap), ci] *
//                 weight[co, ci, tap]
//   dx[n, s, ci] = sum over co and the (o, tap) of source s of dy[n, o, co] * weight[co, ci, tap]
//   dweight[co, ci, tap] = sum over n, o of dy[n, o, co] * x[n, source(o, tap), ci]
//
// Sums are accumulated in float32. Each op is linear in both of its inputs, and the gradients of
// each are made of the other two, so these three are closed under differentiation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "causal_conv3d/index_map.h"
#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/group_stats.h"
#include "common/isa.h"

namespace magvit_fast {

// What all three ops share. Activations are dense NDHWC (channels last), weights dense
// [out_channels, in_channels / groups, KT, KH, KW]; all of one dtype.
struct Conv3dShape {
  index_t batch, in_channels, out_channels, groups;
  index_t history_frames;  // frames of `history`; 0: none
  index_t frames;          // frames of x; t.source = history_frames + frames
  AxisMap t, h, w;         // t.front is what the history leaves to be padded
  DType dtype;
  bool strict;  // float32: errors no larger than those of the direct sum
  bool sm90a;   // CUDA: the kernels for sm_90a may serve, where they can
  bool packed;  // `weight` has been packed by causal_conv3d_pack for this very work
};

// A tensor along the source time axis: `history` [N, history_frames, H, W, C] and then `x`
// [N, frames, H, W, C]; history is null when history_frames is 0.
struct Conv3dForwardParams {
  Conv3dShape shape;
  const void* x;         // [N, frames, H, W, Cin]
  const void* history;   // [N, history_frames, H, W, Cin] or null
  const void* weight;    // [Cout, Cin / groups, KT, KH, KW]
  const void* bias;      // [Cout] or null
  const void* residual;  // [N, t.out, h.out, w.out, Cout], added before rounding, or null
  void* y;               // [N, t.out, h.out, w.out, Cout]
  void* workspace;       // causal_conv3d_forward_workspace() bytes, any contents
};

struct Conv3dInputGradParams {
  Conv3dShape shape;
  const void* dy;      // [N, t.out, h.out, w.out, Cout]
  const void* weight;  // [Cout, Cin / groups, KT, KH, KW]
  void* dx;            // [N, frames, H, W, Cin], written whole
  void* dhistory;      // [N, history_frames, H, W, Cin] or null, written whole
  void* workspace;     // causal_conv3d_input_grad_workspace() bytes, any contents
};

struct Conv3dWeightGradParams {
  Conv3dShape shape;
  const void* x;        // [N, frames, H, W, Cin]
  const void* history;  // [N, history_frames, H, W, Cin] or null
  const void* dy;       // [N, t.out, h.out, w.out, Cout]
  void* dweight;        // [Cout, Cin / groups, KT, KH, KW], written whole
  void* workspace;      // causal_conv3d_weight_grad_workspace() bytes, any contents
};

// Weights in the order of the engine that serves the forward pass (else: the input gradient), to be
// used again as long as they do not change. The kind tells layouts apart; without bytes the engine
// takes weights as they are. On CUDA the memory starts as zeros, and packing again finds on the
// device whether there is anything to do.
struct Conv3dPacking {
  std::size_t bytes;
  index_t kind;
};

// The twin namespaces carry the same eight functions. The result may not depend on num_threads.
#define MF_DECLARE_CAUSAL_CONV3D                                                                 \
  std::size_t causal_conv3d_forward_workspace(const Conv3dShape& shape, const ExecContext& ctx); \
  std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape& shape,                       \
                                                 const ExecContext& ctx);                        \
  std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape& shape,                      \
                                                  const ExecContext& ctx);                       \
  void causal_conv3d_forward(const Conv3dForwardParams& params, const ExecContext& ctx);         \
  void causal_conv3d_input_grad(const Conv3dInputGradParams& params, const ExecContext& ctx);    \
  void causal_conv3d_weight_grad(const Conv3dWeightGradParams& params, const ExecContext& ctx);  \
  Conv3dPacking causal_conv3d_packing(const Conv3dShape& shape, bool forward,                    \
                                      const ExecContext& ctx);                                   \
  void causal_conv3d_pack(const Conv3dShape& shape, bool forward, const void* weight,            \
                          void* packed, const ExecContext& ctx);

namespace cpu {
MF_DECLARE_CAUSAL_CONV3D

// All of up to 4 KiB, 64 words from end to end of more, mixed: who writes past torch's version
// counter changes it.
std::uint64_t causal_conv3d_weight_mark(const void* weight, std::size_t bytes,
                                        const ExecContext& ctx);
}  // namespace cpu
namespace cuda {
MF_DECLARE_CAUSAL_CONV3D

// Which kernel serves the forward pass (else: the input gradient) if addresses are multiples of 16:
// "sm90a", "mma" or "fma".
const char* causal_conv3d_engine(const Conv3dShape& shape, bool forward, const ExecContext& ctx);
const char* causal_conv3d_weight_grad_engine(const Conv3dShape& shape, const ExecContext& ctx);

// What the forward kernel may make of its result before it leaves the chip.
struct Conv3dEpilogue {
  index_t groups;  // statistics of the rounded result by group, as group_norm_silu's; 0: none
  bool per_frame;
  float eps;
  GroupStats* stats;  // [N t.out or N, groups]
  // Depth to space: y is [N, t.out factor - dropped, h.out factor, w.out factor, Cout / parts].
  index_t factor[3], dropped;
};
// Whether it can, if addresses are multiples of 16; and it does.
bool causal_conv3d_fuses(const Conv3dShape& shape, const Conv3dEpilogue& epilogue,
                         const ExecContext& ctx);
std::size_t causal_conv3d_forward_fused_workspace(const Conv3dShape& shape,
                                                  const Conv3dEpilogue& epilogue,
                                                  const ExecContext& ctx);
void causal_conv3d_forward_fused(const Conv3dForwardParams& params, const Conv3dEpilogue& epilogue,
                                 const ExecContext& ctx);
}  // namespace cuda
#undef MF_DECLARE_CAUSAL_CONV3D

}  // namespace magvit_fast
