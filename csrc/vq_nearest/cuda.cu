// vq_nearest on CUDA: a block of positions against the codebook, tile by tile, in shared memory.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// 64 positions x 64 codes a tile, 4 x 4 scores a thread in float32 (no tensor cores: their inputs
// would be rounded, and with them the ties). Each thread keeps its smallest score and the second of
// its positions; the codebook is read once a block of positions, from L2. Positions that float32
// cannot decide are searched again by the whole block in float64.
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "vq_nearest/vq_nearest.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kSide = 16, kEach = 4, kTile = kSide * kEach, kDepth = 16;

// [codes] of |c|^2 in float32, and behind them the largest |c| in float64.
struct Workspace {
  float* norms;
  double* largest;

  Workspace(void* base, index_t codes)
      : norms(static_cast<float*>(base)),
        largest(reinterpret_cast<double*>(norms + round_up(codes, index_t{2}))) {}
};

__global__ void __launch_bounds__(kThreads) norms_kernel(VqNearestParams p, Workspace space) {
  const index_t code = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (code >= p.codes) return;
  double sum = 0.0;
  for (index_t d = 0; d < p.channels; ++d) {
    const double value = static_cast<double>(p.codebook[code * p.channels + d]);
    sum += value * value;
  }
  space.norms[code] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kThreads) largest_kernel(VqNearestParams p, Workspace space) {
  __shared__ float scratch[kThreads];
  float largest = 0.0f;
  for (index_t k = threadIdx.x; k < p.codes; k += kThreads)
    largest = space.norms[k] > largest ? space.norms[k] : largest;
  scratch[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) largest = scratch[i] > largest ? scratch[i] : largest;
  *space.largest = sqrt(static_cast<double>(largest));
}

struct Leader {
  float best, second;
  int code;
};

__device__ __forceinline__ void compete(Leader* leader, float score, int code) {
  const bool better = score < leader->best || (score == leader->best && code < leader->code);
  const float loser = better ? leader->best : score;
  if (loser < leader->second) leader->second = loser;
  if (better) {
    leader->best = score;
    leader->code = code;
  }
}

// The block's threads search all codes for one position in float64; thread 0 writes the result.
template <class T>
__device__ void search_exactly(const VqNearestParams& p, index_t position, double* distance,
                               int* code) {
  const T* z = static_cast<const T*>(p.z) + p.first_element(position);
  const int thread = static_cast<int>(threadIdx.x);
  double best = INFINITY;
  int found = 0;
  for (index_t k = thread; k < p.codes; k += kThreads) {
    double sum = 0.0;
    for (index_t d = 0; d < p.channels; ++d) {
      const double away = static_cast<double>(p.codebook[k * p.channels + d]) -
                          static_cast<double>(static_cast<float>(z[d * p.channel_stride]));
      sum += away * away;
    }
    if (sum < best) {
      best = sum;
      found = static_cast<int>(k);
    }
  }
  distance[thread] = best;
  code[thread] = found;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < kThreads; ++i)
      if (distance[i] < best || (distance[i] == best && code[i] < found)) {
        best = distance[i];
        found = code[i];
      }
    p.indices[position] = found;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) search_kernel(VqNearestParams p, Workspace space) {
  // Rows four floats longer: neighboring threads fill a column, which would lie in one bank.
  __shared__ float zs[kDepth][kTile + 4], cs[kDepth][kTile + 4];
  __shared__ Leader leaders[kTile][kSide];
  __shared__ double distance[kThreads];
  __shared__ int code_of[kThreads];
  __shared__ bool undecided[kTile];
  const int thread = static_cast<int>(threadIdx.x), tx = thread % kSide, ty = thread / kSide;
  const index_t first = static_cast<index_t>(blockIdx.x) * kTile, positions = p.positions();
  Leader mine[kEach];
  for (int i = 0; i < kEach; ++i) mine[i] = {INFINITY, INFINITY, 0};
  for (index_t code = 0; code < p.codes; code += kTile) {
    float sum[kEach][kEach] = {};
    for (index_t d = 0; d < p.channels; d += kDepth) {
      for (int i = thread; i < kDepth * kTile; i += kThreads) {
        const int depth = i % kDepth, at = i / kDepth;
        const bool inside = d + depth < p.channels;
        const index_t n = first + at, k = code + at;
        zs[depth][at] = inside && n < positions
                            ? static_cast<float>(static_cast<const T*>(
                                  p.z)[p.first_element(n) + (d + depth) * p.channel_stride])
                            : 0.0f;
        cs[depth][at] = inside && k < p.codes ? p.codebook[k * p.channels + d + depth] : 0.0f;
      }
      __syncthreads();
      for (int depth = 0; depth < kDepth; ++depth)
        for (int i = 0; i < kEach; ++i)
          for (int j = 0; j < kEach; ++j)
            sum[i][j] += zs[depth][ty * kEach + i] * cs[depth][tx * kEach + j];
      __syncthreads();
    }
    for (int j = 0; j < kEach; ++j) {
      const index_t k = code + tx * kEach + j;
      if (k >= p.codes) break;
      for (int i = 0; i < kEach; ++i)
        compete(&mine[i], space.norms[k] - 2.0f * sum[i][j], static_cast<int>(k));
    }
  }
  for (int i = 0; i < kEach; ++i) leaders[ty * kEach + i][tx] = mine[i];
  __syncthreads();
  if (thread < kTile) {
    const index_t n = first + thread;
    undecided[thread] = false;
    if (n < positions) {
      Leader leader = leaders[thread][0];
      for (int x = 1; x < kSide; ++x) {
        const Leader other = leaders[thread][x];
        compete(&leader, other.best, other.code);
        if (other.second < leader.second) leader.second = other.second;
      }
      double norm = 0.0;
      for (index_t d = 0; d < p.channels; ++d) {
        const double value = static_cast<double>(static_cast<float>(
            static_cast<const T*>(p.z)[p.first_element(n) + d * p.channel_stride]));
        norm += value * value;
      }
      const double margin = vq_nearest_margin(p.channels, sqrt(norm), *space.largest);
      undecided[thread] =
          static_cast<double>(leader.second) - static_cast<double>(leader.best) <= margin;
      p.indices[n] = leader.code;
    }
  }
  __syncthreads();
  for (int i = 0; i < kTile; ++i)
    if (undecided[i]) search_exactly<T>(p, first + i, distance, code_of);
}

}  // namespace

index_t vq_nearest_workspace_bytes(index_t codes, index_t, const ExecContext&) {
  return round_up(codes, index_t{2}) * index_t{sizeof(float)} + index_t{sizeof(double)};
}

void vq_nearest_search(const VqNearestParams& params, const ExecContext& ctx) {
  check(params.codes >= 1 && params.codes <= 2147483647 - kTile,
        "vq_nearest: expected 1 to 2**31 - 65 codes");
  if (params.positions() == 0) return;
  const DeviceGuard guard(ctx, "vq_nearest");
  const Workspace space(params.workspace, params.codes);
  const unsigned code_blocks = grid_blocks(ceil_div(params.codes, index_t{kThreads}),
                                           "vq_nearest: too many codes for one grid");
  const unsigned blocks = grid_blocks(ceil_div(params.positions(), index_t{kTile}),
                                      "vq_nearest: too many positions for one grid");
  launch(guard, ctx, norms_kernel, code_blocks, kThreads, 0, params, space);
  launch(guard, ctx, largest_kernel, 1, kThreads, 0, params, space);
  with_type(params.dtype, [&](auto type) {
    launch(guard, ctx, search_kernel<decltype(type)>, blocks, kThreads, 0, params, space);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
