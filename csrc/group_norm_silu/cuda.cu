// group_norm_silu on CUDA: moments by slab, statistics by group, then one pass over the elements.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// x is read twice forward (the second time mostly from L2: a slab is 64 KiB of float32) and written
// once; the backward reads x and dy twice and writes dx. Norm and SiLU are computed again rather
// than stored. Sums have a fixed order (threads of a block, slabs, spans): no floating-point
// atomics, results are bit-reproducible.
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "group_norm_silu/group_norm_silu.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr index_t kSlabBytes = 65536;

// Of one channel of one slab: mean and squared deviations, or sums of dn and dn * (x - mean).
struct ChannelSums {
  double first, second;
};
struct GroupTerms {
  float dn, dnx;  // means over the group of weight * dn and of weight * dn * xhat
};

struct Workspace {
  ChannelSums* slabs;  // [slabs, C]
  ChannelSums* spans;  // [spans, C]
  GroupTerms* terms;   // [spans, groups]
  index_t bytes;

  Workspace(void* base, const GroupNormSiluInput& in, const GroupNormSiluPlan& plan) {
    slabs = static_cast<ChannelSums*>(base);
    spans = slabs + plan.slabs * in.channels;
    terms = reinterpret_cast<GroupTerms*>(spans + in.spans() * in.channels);
    bytes = (plan.slabs + in.spans()) * in.channels * index_t{sizeof(ChannelSums)} +
            in.spans() * in.groups * index_t{sizeof(GroupTerms)};
  }
};

// What one element needs: its place, the affine form of the norm, and its scale and shift.
struct Element {
  float away;          // x - mean, but for the digits of mean_rest
  float gain, normed;  // rstd * weight; xhat * weight + bias
  float slope, u;      // 1 + scale; the value before the activation
};

template <class T>
__device__ __forceinline__ Element element(const GroupNormSiluInput& in, const GroupStats* stats,
                                           float x, index_t position, index_t c) {
  const index_t frame = position / (in.height * in.width);
  const index_t span = in.per_frame ? frame : frame / in.frames;
  const GroupStats s = stats[span * in.groups + c / (in.channels / in.groups)];
  Element e;
  e.away = x - s.mean;
  e.gain = s.rstd * (in.weight != nullptr ? in.weight[c] : 1.0f);
  e.normed = (e.away - s.mean_rest) * e.gain + (in.bias != nullptr ? in.bias[c] : 0.0f);
  e.slope = 1.0f;
  e.u = e.normed;
  if (!in.adaptive()) return e;
  const index_t rest = position % (in.height * in.width);
  const index_t b = frame / in.frames, t = (frame % in.frames + in.skipped) / in.cell[0];
  const index_t h = rest / in.width / in.cell[1], w = rest % in.width / in.cell[2];
  if (in.scale != nullptr) {
    const index_t* stride = in.scale_stride;
    e.slope += static_cast<float>(static_cast<const T*>(
        in.scale)[b * stride[0] + t * stride[1] + h * stride[2] + w * stride[3] + c]);
  }
  e.u = e.normed * e.slope;
  if (in.shift != nullptr) {
    const index_t* stride = in.shift_stride;
    e.u += static_cast<float>(static_cast<const T*>(
        in.shift)[b * stride[0] + t * stride[1] + h * stride[2] + w * stride[3] + c]);
  }
  return e;
}

__device__ __forceinline__ float sigmoid(float u) { return 1.0f / (1.0f + expf(-u)); }

// d loss / du from dy = d loss / d act(u).
__device__ __forceinline__ float through_activation(bool silu, float dy, float u) {
  if (!silu) return dy;
  const float s = sigmoid(u);
  return dy * (s * (1.0f + u * (1.0f - s)));
}

// A block and one slab: threads stand in columns of channels; body(c, line, lines) sums the
// column's rows line, line + lines, ...; store(c, sum) gets the sum over the column's threads.
template <class Body, class Store>
__device__ __forceinline__ void over_columns(index_t channels, float2* scratch, const Body& body,
                                             const Store& store) {
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = channels < kThreads ? static_cast<int>(channels) : kThreads;
  const int lines = kThreads / columns, column = thread % columns, line = thread / columns;
  for (index_t first = 0; first < channels; first += columns) {
    const index_t c = first + column;
    const bool active = line < lines && c < channels;
    scratch[thread] = active ? body(c, line, lines) : make_float2(0.0f, 0.0f);
    __syncthreads();
    if (active && line == 0) {
      float2 sum = scratch[column];
      for (int l = 1; l < lines; ++l) {
        sum.x += scratch[l * columns + column].x;
        sum.y += scratch[l * columns + column].y;
      }
      store(c, sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(GroupNormSiluInput in, GroupNormSiluPlan plan, ChannelSums* out) {
  __shared__ float2 scratch[kThreads];
  const GroupNormSiluSlab slab(in, plan, blockIdx.x);
  const index_t rows = (slab.last - slab.first) * in.width;
  const T* x = static_cast<const T*>(in.x) + slab.frame * in.frame_elements() +
               slab.first * in.width * in.channels;
  ChannelSums* to = out + static_cast<index_t>(blockIdx.x) * in.channels;
  // Relative to the slab's first value, so that a large mean costs no digits.
  over_columns(
      in.channels, scratch,
      [&](index_t c, index_t line, index_t lines) {
        const float pivot = static_cast<float>(x[c]);
        float sum = 0.0f;
        for (index_t r = line; r < rows; r += lines)
          sum += static_cast<float>(x[r * in.channels + c]) - pivot;
        return make_float2(sum, 0.0f);
      },
      [&](index_t c, float2 sum) {
        to[c].first = static_cast<double>(sum.x) / static_cast<double>(rows);
      });
  over_columns(
      in.channels, scratch,
      [&](index_t c, index_t line, index_t lines) {
        const float pivot = static_cast<float>(x[c]), mean = static_cast<float>(to[c].first);
        float sum = 0.0f;
        for (index_t r = line; r < rows; r += lines) {
          const float d = static_cast<float>(x[r * in.channels + c]) - pivot - mean;
          sum += d * d;
        }
        return make_float2(sum, 0.0f);
      },
      [&](index_t c, float2 sum) {
        to[c].first += static_cast<double>(static_cast<float>(x[c]));
        to[c].second = static_cast<double>(sum.x);
      });
}

// One thread a group of a span: the moments of its channels and slabs, merged in order (Chan).
__global__ void __launch_bounds__(kThreads)
    stats_kernel(GroupNormSiluInput in, GroupNormSiluPlan plan, const ChannelSums* slabs,
                 GroupStats* stats) {
  const index_t id = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= in.spans() * in.groups) return;
  const index_t span = id / in.groups, size = in.channels / in.groups;
  double count = 0.0, mean = 0.0, squares = 0.0;
  for (index_t s = span * plan.slabs_per_span; s < (span + 1) * plan.slabs_per_span; ++s) {
    const GroupNormSiluSlab slab(in, plan, s);
    const double more = static_cast<double>((slab.last - slab.first) * in.width);
    const ChannelSums* m = slabs + s * in.channels + id % in.groups * size;
    for (index_t c = 0; c < size; ++c) {
      const double delta = m[c].first - mean, total = count + more;
      mean += delta * more / total;
      squares += m[c].second + delta * delta * count * more / total;
      count = total;
    }
  }
  const float rounded = static_cast<float>(mean);
  stats[id] = {rounded, static_cast<float>(mean - static_cast<double>(rounded)),
               static_cast<float>(1.0 / sqrt(squares / count + static_cast<double>(in.eps)))};
}

template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Run {
  T value[kVector];
};

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(GroupNormSiluInput in, const GroupStats* stats, void* y) {
  using Chunk = Run<T, kVector>;
  const index_t chunks = in.channels / kVector;
  const index_t total = in.batch * in.frames * in.height * in.width * chunks;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const index_t position = i / chunks, c = i % chunks * kVector;
    const Chunk x = static_cast<const Chunk*>(in.x)[i];
    Chunk result;
    for (int v = 0; v < kVector; ++v) {
      const float u = element<T>(in, stats, static_cast<float>(x.value[v]), position, c + v).u;
      result.value[v] = static_cast<T>(in.silu ? u * sigmoid(u) : u);
    }
    static_cast<Chunk*>(y)[i] = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(GroupNormSiluBackward p, GroupNormSiluPlan plan, ChannelSums* out) {
  __shared__ float2 scratch[kThreads];
  const GroupNormSiluInput& in = p.in;
  const GroupNormSiluSlab slab(in, plan, blockIdx.x);
  const index_t rows = (slab.last - slab.first) * in.width;
  const index_t first = slab.frame * in.height * in.width + slab.first * in.width;
  ChannelSums* to = out + static_cast<index_t>(blockIdx.x) * in.channels;
  over_columns(
      in.channels, scratch,
      [&](index_t c, index_t line, index_t lines) {
        float2 sum = make_float2(0.0f, 0.0f);
        for (index_t r = line; r < rows; r += lines) {
          const index_t at = (first + r) * in.channels + c;
          const Element e = element<T>(
              in, p.stats, static_cast<float>(static_cast<const T*>(in.x)[at]), first + r, c);
          const float dy = static_cast<float>(static_cast<const T*>(p.dy)[at]);
          const float dn = through_activation(in.silu, dy, e.u) * e.slope;
          sum.x += dn;
          sum.y += dn * e.away;
        }
        return sum;
      },
      [&](index_t c, float2 sum) {
        to[c] = {static_cast<double>(sum.x), static_cast<double>(sum.y)};
      });
}

// One thread a group of a span: totals of dn and dn * xhat by channel, and the group's terms.
__global__ void __launch_bounds__(kThreads)
    terms_kernel(GroupNormSiluBackward p, GroupNormSiluPlan plan, const ChannelSums* slabs,
                 ChannelSums* spans, GroupTerms* terms) {
  const GroupNormSiluInput& in = p.in;
  const index_t id = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= in.spans() * in.groups) return;
  const index_t span = id / in.groups, size = in.channels / in.groups;
  const GroupStats s = p.stats[id];
  double mean_dn = 0.0, mean_dnx = 0.0;
  for (index_t c = id % in.groups * size; c < (id % in.groups + 1) * size; ++c) {
    ChannelSums sum = {0.0, 0.0};
    for (index_t k = span * plan.slabs_per_span; k < (span + 1) * plan.slabs_per_span; ++k) {
      sum.first += slabs[k * in.channels + c].first;
      sum.second += slabs[k * in.channels + c].second;
    }
    sum.second =
        (sum.second - static_cast<double>(s.mean_rest) * sum.first) * static_cast<double>(s.rstd);
    spans[span * in.channels + c] = sum;
    const double weight = in.weight != nullptr ? static_cast<double>(in.weight[c]) : 1.0;
    mean_dn += weight * sum.first;
    mean_dnx += weight * sum.second;
  }
  const index_t frames = in.per_frame ? 1 : in.frames;
  const double count = static_cast<double>(frames * in.height * in.width * size);
  terms[id] = {static_cast<float>(mean_dn / count), static_cast<float>(mean_dnx / count)};
}

__global__ void __launch_bounds__(kThreads)
    channel_grads_kernel(GroupNormSiluBackward p, const ChannelSums* spans) {
  const index_t c = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.in.channels) return;
  double bias = 0.0, weight = 0.0;
  for (index_t span = 0; span < p.in.spans(); ++span) {
    bias += spans[span * p.in.channels + c].first;
    weight += spans[span * p.in.channels + c].second;
  }
  p.dbias[c] = static_cast<float>(bias);
  p.dweight[c] = static_cast<float>(weight);
}

// One thread a channel of a cell of a frame.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cells_kernel(GroupNormSiluBackward p, index_t down, index_t across) {
  const GroupNormSiluInput& in = p.in;
  const index_t total = in.batch * in.frames * down * across * in.channels;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const index_t c = i % in.channels, cell = i / in.channels;
    const index_t frame = cell / (down * across);
    const index_t top = cell / across % down * in.cell[1], left = cell % across * in.cell[2];
    const index_t bottom = top + in.cell[1] < in.height ? top + in.cell[1] : in.height;
    const index_t right = left + in.cell[2] < in.width ? left + in.cell[2] : in.width;
    float dscale = 0.0f, dshift = 0.0f;
    for (index_t h = top; h < bottom; ++h)
      for (index_t w = left; w < right; ++w) {
        const index_t position = (frame * in.height + h) * in.width + w;
        const index_t at = position * in.channels + c;
        const Element e = element<T>(
            in, p.stats, static_cast<float>(static_cast<const T*>(in.x)[at]), position, c);
        const float du =
            through_activation(in.silu, static_cast<float>(static_cast<const T*>(p.dy)[at]), e.u);
        dscale += du * e.normed;
        dshift += du;
      }
    p.dscale[i] = dscale;
    p.dshift[i] = dshift;
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(GroupNormSiluBackward p, const GroupTerms* terms) {
  using Chunk = Run<T, kVector>;
  const GroupNormSiluInput& in = p.in;
  const index_t chunks = in.channels / kVector, size = in.channels / in.groups;
  const index_t total = in.batch * in.frames * in.height * in.width * chunks;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const index_t position = i / chunks, c = i % chunks * kVector;
    const index_t frame = position / (in.height * in.width);
    const index_t span = in.per_frame ? frame : frame / in.frames;
    const Chunk x = static_cast<const Chunk*>(in.x)[i], dy = static_cast<const Chunk*>(p.dy)[i];
    Chunk result;
    for (int v = 0; v < kVector; ++v) {
      const Element e = element<T>(in, p.stats, static_cast<float>(x.value[v]), position, c + v);
      const float dn = through_activation(in.silu, static_cast<float>(dy.value[v]), e.u) * e.slope;
      const index_t group = span * in.groups + (c + v) / size;
      const GroupStats s = p.stats[group];
      const float xhat = (e.away - s.mean_rest) * s.rstd;
      result.value[v] =
          static_cast<T>(dn * e.gain - s.rstd * (terms[group].dn + xhat * terms[group].dnx));
    }
    static_cast<Chunk*>(p.dx)[i] = result;
  }
}

bool aligned(const void* at) { return reinterpret_cast<std::uintptr_t>(at) % 16 == 0; }

void check_input(const GroupNormSiluInput& in) {
  check(in.groups >= 1 && in.channels % in.groups == 0,
        "group_norm_silu: groups must divide the channels");
  check(in.cell[0] >= 1 && in.cell[1] >= 1 && in.cell[2] >= 1,
        "group_norm_silu: cells must have a size");
  check(!in.planes, "group_norm_silu: the CUDA kernels read the channels-last layout");
}

unsigned slab_blocks(const GroupNormSiluPlan& plan) {
  return grid_blocks(plan.slabs, "group_norm_silu: too many slabs for one grid");
}

}  // namespace

bool group_norm_silu_takes_planes(bool) { return false; }

index_t group_norm_silu_workspace_bytes(const GroupNormSiluInput& in, const ExecContext&) {
  check_input(in);
  return Workspace(nullptr, in, GroupNormSiluPlan(in, kSlabBytes)).bytes;
}

void group_norm_silu_forward(const GroupNormSiluForward& params, const ExecContext& ctx) {
  const GroupNormSiluInput& in = params.in;
  check_input(in);
  const index_t elements = in.batch * in.frames * in.frame_elements();
  if (elements == 0) return;
  const GroupNormSiluPlan plan(in, kSlabBytes);
  const Workspace space(params.workspace, in, plan);
  const DeviceGuard guard(ctx, "group_norm_silu");
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    launch(guard, ctx, moments_kernel<T>, slab_blocks(plan), kThreads, 0, in, plan, space.slabs);
    launch(guard, ctx, stats_kernel, blocks_for(in.spans() * in.groups, kThreads), kThreads, 0, in,
           plan, static_cast<const ChannelSums*>(space.slabs), params.stats);
    const GroupStats* stats = params.stats;
    if (in.channels % kVector == 0 && aligned(in.x) && aligned(params.y))
      launch(guard, ctx, apply_kernel<T, kVector>, blocks_for(elements / kVector, kThreads),
             kThreads, 0, in, stats, params.y);
    else
      launch(guard, ctx, apply_kernel<T, 1>, blocks_for(elements, kThreads), kThreads, 0, in, stats,
             params.y);
  });
  guard.finish();
}

void group_norm_silu_backward(const GroupNormSiluBackward& params, const ExecContext& ctx) {
  const GroupNormSiluInput& in = params.in;
  check_input(in);
  const index_t elements = in.batch * in.frames * in.frame_elements();
  if (elements == 0) return;
  const GroupNormSiluPlan plan(in, kSlabBytes);
  const Workspace space(params.workspace, in, plan);
  const DeviceGuard guard(ctx, "group_norm_silu backward");
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    const ChannelSums *slabs = space.slabs, *spans = space.spans;
    const GroupTerms* terms = space.terms;
    launch(guard, ctx, sums_kernel<T>, slab_blocks(plan), kThreads, 0, params, plan, space.slabs);
    launch(guard, ctx, terms_kernel, blocks_for(in.spans() * in.groups, kThreads), kThreads, 0,
           params, plan, slabs, space.spans, space.terms);
    launch(guard, ctx, channel_grads_kernel, blocks_for(in.channels, kThreads), kThreads, 0, params,
           spans);
    if (in.adaptive()) {
      const index_t down = ceil_div(in.height, in.cell[1]);
      const index_t across = ceil_div(in.width, in.cell[2]);
      launch(guard, ctx, cells_kernel<T>,
             blocks_for(in.batch * in.frames * down * across * in.channels, kThreads), kThreads, 0,
             params, down, across);
    }
    if (in.channels % kVector == 0 && aligned(in.x) && aligned(params.dy) && aligned(params.dx))
      launch(guard, ctx, input_grad_kernel<T, kVector>, blocks_for(elements / kVector, kThreads),
             kThreads, 0, params, terms);
    else
      launch(guard, ctx, input_grad_kernel<T, 1>, blocks_for(elements, kThreads), kThreads, 0,
             params, terms);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
