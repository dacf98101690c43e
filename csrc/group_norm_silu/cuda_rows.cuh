// group_norm_silu on CUDA: what the passes share: a thread's channels, its loads, its arithmetic.
// Previous hop: cuda_forward.cu, cuda_backward.cu.
// Next hop: cuda_plan.h.
//
// A thread keeps kVector neighboring channels (16 bytes) for a whole slab: what depends on the
// channel alone lies in registers, and an element costs no index arithmetic. The threads of a block
// stand in columns of channels and lines of positions.
#pragma once

#include <type_traits>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "group_norm_silu/cuda_plan.h"

namespace magvit_fast::cuda {

constexpr int kNormThreads = 256;

// What slabs leave for the merger: sums of dn and dn * (x - mean), by channel.
struct ChannelSums {
  float dn, dnx;
};

template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Chunk {
  T value[kVector];
};

// Where a thread stands; channels beyond what the block holds at once come in several tiles.
struct Lines {
  int chunks, columns, lines, column, line;

  __device__ __forceinline__ Lines(const GroupNormSiluInput& in, int vector) {
    const int thread = static_cast<int>(threadIdx.x);
    chunks = static_cast<int>(in.channels) / vector;
    columns = chunks < kNormThreads ? chunks : kNormThreads;
    lines = kNormThreads / columns;
    column = thread % columns;
    line = thread / columns;
  }
  __device__ __forceinline__ bool active(int tile) const {
    return line < lines && tile + column < chunks;
  }
  // Of `count` rows dealt to the lines in turn.
  __device__ __forceinline__ int rows(int count) const {
    return line < count ? (count - line - 1) / lines + 1 : 0;
  }
};

// body(chunks) for `count` positions that are `step` elements apart, one chunk of each source; the
// loads of kAhead positions are under way at once.
template <int kAhead, int kSources, class T, int kVector, class Body>
__device__ __forceinline__ void over_run(const T* const (&sources)[kSources], index_t step,
                                         int count, const Body& body) {
  using C = Chunk<T, kVector>;
  for (int i = 0; i < count; i += kAhead) {
    C read[kAhead][kSources];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
#pragma unroll
      for (int s = 0; s < kSources; ++s)
        if (i + j < count) read[j][s] = *reinterpret_cast<const C*>(sources[s] + (i + j) * step);
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count) body((i + j) * step, read[j]);
  }
}

template <class T, int kVector, class Value>
__device__ __forceinline__ void store_chunk(T* to, const Value& value) {
  Chunk<T, kVector> chunk;
  if constexpr (sizeof(T) == 2 && kVector % 2 == 0) {
#pragma unroll
    for (int v = 0; v < kVector; v += 2) {
      const std::uint32_t pair = pack_pair<T>(value(v), value(v + 1));
      memcpy(chunk.value + v, &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) chunk.value[v] = static_cast<T>(value(v));
  }
  *reinterpret_cast<Chunk<T, kVector>*>(to) = chunk;
}

// 1 / (1 + exp(-u)): to the last bits for float32; to 2^-20 and better where 8 or 11 bits remain.
template <class T>
__device__ __forceinline__ float sigmoid(float u) {
  if constexpr (sizeof(T) == 4)
    return 1.0f / (1.0f + expf(-u));
  else
    return __fdividef(1.0f, 1.0f + __expf(-u));
}

// d loss / du from dy = d loss / d act(u).
template <bool kSilu, class T>
__device__ __forceinline__ float through_activation(float dy, float u) {
  if constexpr (kSilu) {
    const float s = sigmoid<T>(u);
    return dy * (s * (1.0f + u * (1.0f - s)));
  } else {
    return dy;
  }
}

template <bool kSilu, class T>
__device__ __forceinline__ float activate(float u) {
  if constexpr (kSilu)
    return u * sigmoid<T>(u);
  else
    return u;
}

// norm(x) * weight + bias = (x - center) * gain + offset, and with a cell's scale and shift
// u = (x - center) * steep + level.
template <int kVector>
struct Affine {
  float center[kVector], gain[kVector], offset[kVector], steep[kVector], level[kVector];

  // visit(v, group) for the thread's channels: one division, not one a channel.
  template <class Visit>
  static __device__ __forceinline__ void over_groups(const GroupNormSiluInput& in, int first,
                                                     const Visit& visit) {
    const int size = static_cast<int>(in.channels / in.groups);
    int group = first / size, inside = first % size;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      visit(v, group);
      if (++inside == size) inside = 0, ++group;
    }
  }

  // Channels from `first` on; `stats` those of the span.
  __device__ __forceinline__ Affine(const GroupNormSiluInput& in, const GroupStats* stats,
                                    int first) {
    over_groups(in, first, [&](int v, int group) {
      const GroupStats s = stats[group];
      center[v] = s.mean;
      gain[v] = steep[v] = s.rstd * (in.weight != nullptr ? in.weight[first + v] : 1.0f);
      offset[v] = level[v] =
          (in.bias != nullptr ? in.bias[first + v] : 0.0f) - s.mean_rest * gain[v];
    });
  }
};

// Scale and shift of one cell: steep and level of an Affine; `slope` (1 + scale), where wanted.
template <class T, int kVector>
__device__ __forceinline__ void condition(const GroupNormSiluInput& in, index_t frame, int row,
                                          int across, int channel, Affine<kVector>* affine,
                                          float* slope) {
  using C = Chunk<T, kVector>;
  const index_t b = frame / in.frames, t = (frame % in.frames + in.skipped) / in.cell[0];
  const auto place = [&](const index_t(&stride)[4]) {
    return b * stride[0] + t * stride[1] + row * stride[2] + across * stride[3] + channel;
  };
  C scale{}, shift{};
  if (in.scale != nullptr)
    scale = *reinterpret_cast<const C*>(static_cast<const T*>(in.scale) + place(in.scale_stride));
  if (in.shift != nullptr)
    shift = *reinterpret_cast<const C*>(static_cast<const T*>(in.shift) + place(in.shift_stride));
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const float s = 1.0f + (in.scale != nullptr ? static_cast<float>(scale.value[v]) : 0.0f);
    affine->steep[v] = affine->gain[v] * s;
    affine->level[v] =
        affine->offset[v] * s + (in.shift != nullptr ? static_cast<float>(shift.value[v]) : 0.0f);
    if (slope != nullptr) slope[v] = s;
  }
}

// One slab as this thread sees it. begin(row of cells, cell of the row), then run(first position of
// the frame, step in positions, count) once or more, then end(row, cell).
template <bool kByCell, class Begin, class OneRun, class End>
__device__ __forceinline__ void over_slab(const GroupNormSiluInput& in, const NormPlan& plan,
                                          const NormSlab& slab, const Lines& at, const Begin& begin,
                                          const OneRun& run, const End& end) {
  if constexpr (!kByCell) {
    begin(slab.cell_row, 0);
    run(slab.first + at.line, at.lines, at.rows(slab.count));
    end(slab.cell_row, 0);
  } else {
    const int width = static_cast<int>(in.width), high = static_cast<int>(in.cell[1]);
    const int wide = static_cast<int>(in.cell[2]);
    const int cells = slab.count / (high * wide);
    for (int cell = at.line; cell < cells; cell += at.lines) {
      const int down = cell / plan.cells_across, across = cell % plan.cells_across;
      begin(slab.cell_row + down, across);
      const int corner = slab.first + down * high * width + across * wide;
      for (int y = 0; y < high; ++y) run(corner + y * width, 1, wide);
      end(slab.cell_row + down, across);
    }
  }
}

// What the lines of a block found, two numbers a channel, one after another: add(channel of the
// tile, line, numbers), then done(channel of the tile).
struct LineSums {
  float2 at[kNormThreads];
};
template <int kVector, class Mine, class Done>
__device__ __forceinline__ void over_lines(const Lines& at, int tile, LineSums* scratch,
                                           const Mine& mine, const Done& done) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the tile before has been read
#pragma unroll
  for (int v = 0; v < kVector; ++v) scratch[v].at[thread] = mine(v);
  __syncthreads();
  for (int c = thread; c < at.columns * kVector; c += kNormThreads) {
    const int column = c / kVector;
    if (tile + column >= at.chunks) continue;
    done(tile * kVector + c,
         [&](int line) { return scratch[c % kVector].at[line * at.columns + column]; });
  }
}

inline bool aligned_16(const void* at) { return reinterpret_cast<std::uintptr_t>(at) % 16 == 0; }

// Whether scale and shift can be read 16 bytes at a time.
inline bool maps_aligned(const GroupNormSiluInput& in, int vector) {
  const auto fits = [&](const void* map, const index_t(&stride)[4]) {
    bool even = aligned_16(map);
    for (const index_t s : stride) even = even && s % vector == 0;
    return map == nullptr || even;
  };
  return fits(in.scale, in.scale_stride) && fits(in.shift, in.shift_stride);
}

// Once for each value of a flag that is the same for a whole launch.
template <class Next>
MF_HOST_DEVICE inline void with_flag(bool flag, const Next& next) {
  flag ? next(std::true_type{}) : next(std::false_type{});
}

// body(T{}, channels of a thread, by_cell), the last two as compile-time constants.
template <class Body>
void with_kernel(const GroupNormSiluInput& in, const NormPlan& plan, bool aligned,
                 const Body& body) {
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    with_flag(aligned && in.channels % kWide == 0 && maps_aligned(in, kWide), [&](auto wide) {
      with_flag(plan.by_cell, [&](auto by_cell) {
        body(type, std::integral_constant<int, decltype(wide)::value ? kWide : 1>{}, by_cell);
      });
    });
  });
}

// Every pass: one block a slab.
inline unsigned slab_blocks(const NormPlan& plan) {
  return grid_blocks(plan.slabs, "group_norm_silu: too many slabs for one grid");
}

// cuda_forward.cu
void norm_statistics(const GroupNormSiluInput& in, const NormPlan& plan, void* workspace,
                     GroupStats* stats, const DeviceGuard& guard, const ExecContext& ctx);
void norm_apply(const GroupNormSiluForward& params, const NormPlan& plan, const DeviceGuard& guard,
                const ExecContext& ctx);
index_t norm_statistics_bytes(const GroupNormSiluInput& in, const NormPlan& plan);

// cuda_backward.cu
void norm_backward(const GroupNormSiluBackward& params, const NormPlan& plan,
                   const DeviceGuard& guard, const ExecContext& ctx);
index_t norm_backward_bytes(const GroupNormSiluInput& in, const NormPlan& plan);

}  // namespace magvit_fast::cuda
