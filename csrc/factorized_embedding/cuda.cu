// factorized_embedding on CUDA: rows gathered and added; a gradient without floating-point atomics.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Forward: a grid-stride loop over (position, 16 bytes of the row); the tables live in L2.
// Backward, rows: one block for kRowsPerBlock rows of a sub-table x 256 elements of a row. It reads
// all ids in order, collects the positions that hit its rows (ballots keep the order) and adds
// their gradients to sums in shared memory; a thread owns one element of every row, so sums run in
// the order of positions and the result is bit-reproducible. Traffic: the gradient once a
// sub-token, the ids V / kRowsPerBlock times. Backward, mask embedding: kMaskParts partial sums
// over runs of positions, added up in order.
#include "common/cuda/bad_position.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "factorized_embedding/factorized_embedding.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kRowsPerBlock = 16, kMaskParts = 128;

template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Run {
  T value[kVector];
};

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(FactorizedEmbeddingBackwardParams p, int row_tiles) {
  __shared__ float sum[kRowsPerBlock][kThreads];
  __shared__ int hits[kThreads], hit_rows[kThreads], warp_hits[kWarps];
  const FactorizedEmbeddingParams& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const index_t values = index_t{1} << in.bits;
  const int group = static_cast<int>(blockIdx.x / row_tiles);
  const index_t first = static_cast<index_t>(blockIdx.x % row_tiles) * kRowsPerBlock;
  const int rows =
      values - first < kRowsPerBlock ? static_cast<int>(values - first) : kRowsPerBlock;
  const index_t element = static_cast<index_t>(blockIdx.y) * kThreads + thread;
  const T* grad = static_cast<const T*>(p.grad) + element;
  for (int r = 0; r < kRowsPerBlock; ++r) sum[r][thread] = 0.0f;

  for (index_t start = 0; start < in.positions; start += kThreads) {
    const int row = row_hit(in, start + thread, group, first, rows);
    const unsigned ballot = __ballot_sync(kAllLanes, row >= 0);
    if (lane == 0) warp_hits[thread / kWarpSize] = __popc(ballot);
    __syncthreads();  // the counts are there, and the last round's list is read
    int before = 0, found = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < thread / kWarpSize) before += warp_hits[w];
      found += warp_hits[w];
    }
    if (row >= 0) {
      const int at = before + __popc(ballot & ((1u << lane) - 1));
      hits[at] = thread;
      hit_rows[at] = row;
    }
    __syncthreads();           // the list is whole, and the counts are read
    constexpr int kAhead = 8;  // independent loads before their additions
    for (int i = 0; i < found && element < in.dim; i += kAhead) {
      float value[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        value[j] = i + j < found ? static_cast<float>(grad[(start + hits[i + j]) * in.dim]) : 0.0f;
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i + j < found) sum[hit_rows[i + j]][thread] += value[j];
    }
  }
  if (element >= in.dim) return;
  T* out = static_cast<T*>(p.grad_weight) + (group * values + first) * in.dim + element;
  for (int r = 0; r < rows; ++r) out[r * in.dim] = static_cast<T>(sum[r][thread]);
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

bool in_runs(const FactorizedEmbeddingForwardParams& p, index_t elements) {
  const auto aligned = [](const void* at) {
    return reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
  };
  return p.in.dim % elements == 0 && aligned(p.weight) && aligned(p.mask_embedding) &&
         aligned(p.out);
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
    if (in_runs(params, kVector))
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
  const unsigned row_blocks =
      grid_blocks(row_tiles * in.groups, "factorized_embedding: too many rows for one grid");
  const unsigned across = static_cast<unsigned>(element_tiles);
  const DeviceGuard guard(ctx, "factorized_embedding backward");
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, rows_kernel<T>, dim3(row_blocks, across), kThreads, 0, params,
           static_cast<int>(row_tiles));
    if (params.grad_mask_embedding == nullptr) return;
    launch(guard, ctx, mask_parts_kernel<T>, dim3(kMaskParts, across), kThreads, 0, params);
    launch(guard, ctx, mask_sum_kernel<T>, dim3(across), kThreads, 0, params);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
