// factorized_embedding: a token's embedding as the sum of one row a sub-table, and its gradient.
// Previous hop: bindings.cpp.
// Next hop: cpu.cpp (per instruction set: kernels.simd.cpp) or cuda.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/exec_context.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

constexpr int kFactorizedEmbeddingMaxGroups = 8;

struct FactorizedEmbeddingParams {
  const std::int64_t* ids;   // [positions]
  const std::uint8_t* mask;  // [positions], nonzero = masked; null: none is
  index_t positions, dim;
  int groups, bits;  // sub-token g = (ids >> g * bits) & (2**bits - 1)
  DType dtype;
};

struct FactorizedEmbeddingForwardParams {
  FactorizedEmbeddingParams in;
  const void* weight;          // [groups, 2**bits, dim]
  const void* mask_embedding;  // [dim], read where mask is nonzero; null without a mask
  void* out;                   // [positions, dim]
  std::int64_t* bad;           // [1]: set to the smallest unmasked position whose id is outside
                      // [0, 2**(groups * bits)); its row is NaN. Untouched if there is none
};

struct FactorizedEmbeddingBackwardParams {
  FactorizedEmbeddingParams in;
  const void* grad;           // [positions, dim]
  void* grad_weight;          // [groups, 2**bits, dim], written whole
  void* grad_mask_embedding;  // [dim], written whole; null without a mask
  void* workspace;            // factorized_embedding_workspace_bytes
};

MF_HOST_DEVICE inline bool token_id_out_of_range(std::int64_t id, int groups, int bits) {
  return (static_cast<std::uint64_t>(id) >> (groups * bits)) != 0;
}
MF_HOST_DEVICE inline index_t sub_token(std::int64_t id, int group, int bits) {
  return (id >> (group * bits)) & ((index_t{1} << bits) - 1);
}

namespace cpu {
index_t factorized_embedding_workspace_bytes(const FactorizedEmbeddingParams& params,
                                             const ExecContext& ctx);
void factorized_embedding_forward(const FactorizedEmbeddingForwardParams& params,
                                  const ExecContext& ctx);
void factorized_embedding_backward(const FactorizedEmbeddingBackwardParams& params,
                                   const ExecContext& ctx);
}  // namespace cpu
namespace cuda {
index_t factorized_embedding_workspace_bytes(const FactorizedEmbeddingParams& params,
                                             const ExecContext& ctx);
void factorized_embedding_forward(const FactorizedEmbeddingForwardParams& params,
                                  const ExecContext& ctx);
void factorized_embedding_backward(const FactorizedEmbeddingBackwardParams& params,
                                   const ExecContext& ctx);
}  // namespace cuda

// One thread's share of the CPU kernels. Forward: positions [begin, end), the smallest bad one or
// -1.
MF_DECLARE_SIMD(index_t, factorized_embedding_forward_range,
                (const FactorizedEmbeddingForwardParams& params, index_t begin, index_t end))
// Backward: columns [begin, end) of all rows, at most kFactorizedEmbeddingColumns of them.
constexpr index_t kFactorizedEmbeddingColumns = 256;
MF_DECLARE_SIMD(void, factorized_embedding_backward_columns,
                (const FactorizedEmbeddingBackwardParams& params, index_t begin, index_t end))

}  // namespace magvit_fast
