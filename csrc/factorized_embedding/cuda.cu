// factorized_embedding on CUDA: rows gathered and added; a gradient without floating-point atomics.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Forward: a grid-stride loop over (position, 16 bytes of the row); the tables live in L2.
// Backward, rows: one block for kRowsPerBlock rows of a sub-table x 1024 elements of a row. It
// reads all ids in order, 2048 a round, collects the positions that hit its rows (ballots keep the
// order) and adds their gradients to sums in shared memory, eight loads ahead; a thread owns four
// elements of every row, so sums run in the order of positions and the result is bit-reproducible.
// Traffic: the gradient once a sub-token, the ids V / kRowsPerBlock times. Backward, mask
// embedding: kMaskParts partial sums over runs of positions, added up in order.
//
// At 8 x 1280 ids, 2 x 512 rows of 1024, bfloat16: 256 blocks, five rounds each; 42 MB of gradient
// and 21 MB of ids, most of it from L2. Floor 10.7 us, predicted 15 us where ids are spread; a row
// that a tenth of the positions hit is one block's 2 MB, about 30 us. Ladder: v0 256 ids a round,
// 16 rows and 256 elements a block (40 rounds of waiting, predicted 35 us) -> v1 this. Unmeasured.
#include "common/cuda/bad_position.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "factorized_embedding/factorized_embedding.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kMaskParts = 128;
constexpr int kRowsPerBlock = 4, kIdsEach = 8, kRound = kThreads * kIdsEach;

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) forward_kernel(FactorizedEmbeddingForwardParams p) {
  using Chunk = Run<T, kVector>;
  const index_t chunks = p.in.dim / kVector, total = p.in.positions * chunks;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t e = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += step) {
    const index_t position = e / chunks, chunk = e % chunks;
    Chunk* out = static_cast<Chunk*>(p.out) + e;
    if (p.in.mask != nullptr && p.in.mask[position]) {
      *out = static_cast<const Chunk*>(p.mask_embedding)[chunk];
      continue;
    }
    const std::int64_t id = p.in.ids[position];
    const bool bad = token_id_out_of_range(id, p.in.groups, p.in.bits);
    if (bad && chunk == 0) report_bad(p.bad, position);
    float sum[kVector];
    for (int v = 0; v < kVector; ++v) sum[v] = bad ? nanf("") : 0.0f;
    for (int g = 0; g < p.in.groups && !bad; ++g) {
      const index_t row = (static_cast<index_t>(g) << p.in.bits) + sub_token(id, g, p.in.bits);
      const Chunk part = static_cast<const Chunk*>(p.weight)[row * chunks + chunk];
      for (int v = 0; v < kVector; ++v) sum[v] += static_cast<float>(part.value[v]);
    }
    Chunk result;
    for (int v = 0; v < kVector; ++v) result.value[v] = static_cast<T>(sum[v]);
    *out = result;
  }
}

// The row that position `n` hits in sub-table g, counted from `first`, or -1 outside the block's
// rows.
__device__ __forceinline__ int row_hit(const FactorizedEmbeddingParams& in, index_t n, int group,
                                       index_t first, int rows) {
  if (n >= in.positions || (in.mask != nullptr && in.mask[n])) return -1;
  const std::int64_t id = in.ids[n];
  if (token_id_out_of_range(id, in.groups, in.bits)) return -1;
  const index_t row = sub_token(id, group, in.bits) - first;
  return row >= 0 && row < rows ? static_cast<int>(row) : -1;
}

// kVector neighboring elements of every row a thread.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(FactorizedEmbeddingBackwardParams p, int row_tiles) {
  __shared__ Run<float, kVector> sum[kRowsPerBlock][kThreads];
  __shared__ int hits[kRound], counts[kIdsEach * kWarps];  // a hit: position of the round, row
  const FactorizedEmbeddingParams& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const index_t values = index_t{1} << in.bits;
  const int group = static_cast<int>(blockIdx.x / row_tiles);
  const index_t first = static_cast<index_t>(blockIdx.x % row_tiles) * kRowsPerBlock;
  const int rows =
      values - first < kRowsPerBlock ? static_cast<int>(values - first) : kRowsPerBlock;
  const index_t element = (static_cast<index_t>(blockIdx.y) * kThreads + thread) * kVector;
  const bool inside = element < in.dim;
  const T* grad = static_cast<const T*>(p.grad) + element;
  for (int r = 0; r < kRowsPerBlock; ++r) sum[r][thread] = Run<float, kVector>{};

  for (index_t start = 0; start < in.positions; start += kRound) {
    int row[kIdsEach];
    unsigned ballot[kIdsEach];
#pragma unroll
    for (int u = 0; u < kIdsEach; ++u)
      row[u] = row_hit(in, start + u * kThreads + thread, group, first, rows);
#pragma unroll
    for (int u = 0; u < kIdsEach; ++u) {
      ballot[u] = __ballot_sync(kAllLanes, row[u] >= 0);
      if (lane == 0) counts[u * kWarps + warp] = __popc(ballot[u]);
    }
    __syncthreads();  // the counts are there, and the last round's list is read
    int found = 0;
#pragma unroll
    for (int u = 0; u < kIdsEach; ++u)
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp && row[u] >= 0)
          hits[found + __popc(ballot[u] & ((1u << lane) - 1))] =
              (u * kThreads + thread) * kRowsPerBlock + row[u];
        found += counts[u * kWarps + w];
      }
    __syncthreads();           // the list is whole, and the counts are read
    constexpr int kAhead = 8;  // independent loads before their additions
    for (int i = 0; i < found && inside; i += kAhead) {
      Run<T, kVector> part[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i + j < found)
          part[j] = *reinterpret_cast<const Run<T, kVector>*>(
              grad + (start + hits[i + j] / kRowsPerBlock) * in.dim);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= found) break;
        auto& to = sum[hits[i + j] % kRowsPerBlock][thread];
#pragma unroll
        for (int v = 0; v < kVector; ++v) to.value[v] += static_cast<float>(part[j].value[v]);
      }
    }
  }
  if (!inside) return;
  T* out = static_cast<T*>(p.grad_weight) + (group * values + first) * in.dim + element;
  for (int r = 0; r < rows; ++r) {
    Run<T, kVector> result;
#pragma unroll
    for (int v = 0; v < kVector; ++v) result.value[v] = static_cast<T>(sum[r][thread].value[v]);
    *reinterpret_cast<Run<T, kVector>*>(out + r * in.dim) = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) mask_parts_kernel(FactorizedEmbeddingBackwardParams p) {
  const index_t element = static_cast<index_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (element >= p.in.dim) return;
  const index_t each = ceil_div(p.in.positions, index_t{kMaskParts});
  const index_t begin = blockIdx.x * each;
  const index_t end = begin + each < p.in.positions ? begin + each : p.in.positions;
  float sum = 0.0f;
  for (index_t n = begin; n < end; ++n)
    if (p.in.mask[n])
      sum += static_cast<float>(static_cast<const T*>(p.grad)[n * p.in.dim + element]);
  static_cast<float*>(p.workspace)[blockIdx.x * p.in.dim + element] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) mask_sum_kernel(FactorizedEmbeddingBackwardParams p) {
  const index_t element = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= p.in.dim) return;
  float sum = 0.0f;
  for (int part = 0; part < kMaskParts; ++part)
    sum += static_cast<const float*>(p.workspace)[part * p.in.dim + element];
  static_cast<T*>(p.grad_mask_embedding)[element] = static_cast<T>(sum);
}

}  // namespace

index_t factorized_embedding_workspace_bytes(const FactorizedEmbeddingParams& params,
                                             const ExecContext&) {
  return kMaskParts * params.dim * static_cast<index_t>(sizeof(float));
}

void factorized_embedding_forward(const FactorizedEmbeddingForwardParams& params,
                                  const ExecContext& ctx) {
  check(params.in.groups >= 1 && params.in.groups <= kFactorizedEmbeddingMaxGroups,
        "factorized_embedding: groups must be in 1..8");
  const index_t total = params.in.positions * params.in.dim;
  if (total == 0) return;
  const DeviceGuard guard(ctx, "factorized_embedding");
  with_type(params.in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    if (params.in.dim % kVector == 0 &&
        all_aligned_16(params.weight, params.mask_embedding, params.out))
      launch(guard, ctx, forward_kernel<T, kVector>, dim3(blocks_for(total / kVector, kThreads)),
             kThreads, 0, params);
    else
      launch(guard, ctx, forward_kernel<T, 1>, dim3(blocks_for(total, kThreads)), kThreads, 0,
             params);
  });
  guard.finish();
}

void factorized_embedding_backward(const FactorizedEmbeddingBackwardParams& params,
                                   const ExecContext& ctx) {
  const FactorizedEmbeddingParams& in = params.in;
  check(in.groups >= 1 && in.groups <= kFactorizedEmbeddingMaxGroups,
        "factorized_embedding: groups must be in 1..8");
  if (in.dim == 0) return;
  const index_t row_tiles = ceil_div(index_t{1} << in.bits, index_t{kRowsPerBlock});
  const index_t element_tiles = ceil_div(in.dim, index_t{kThreads});
  check(element_tiles <= 65535, "factorized_embedding: dim must be below 2**24");
  constexpr int kFour = 4;
  const bool in_fours = in.dim % kFour == 0 && all_aligned_16(params.grad, params.grad_weight);
  const unsigned row_blocks =
      grid_blocks(row_tiles * in.groups, "factorized_embedding: too many rows for one grid");
  const unsigned across = static_cast<unsigned>(element_tiles);
  const DeviceGuard guard(ctx, "factorized_embedding backward");
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto rows = in_fours ? rows_kernel<T, kFour> : rows_kernel<T, 1>;
    launch(guard, ctx, rows, dim3(row_blocks, in_fours ? (across + kFour - 1) / kFour : across),
           kThreads, 0, params, static_cast<int>(row_tiles));
    if (params.grad_mask_embedding == nullptr) return;
    launch(guard, ctx, mask_parts_kernel<T>, dim3(kMaskParts, across), kThreads, 0, params);
    launch(guard, ctx, mask_sum_kernel<T>, dim3(across), kThreads, 0, params);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
