// causal_conv3d on CUDA: packs weights, or finds that what was packed before still holds.
// Previous hop: cuda.cu.
// Next hop: none.
//
// Bytes (unmeasured): weights are read, and written where they changed: 14 MB each way for 512 ->
// 512, 3x3x3 in 16 bits, 6.6 us at 4.3 TB/s; 3.3 us and a launch where they did not.
#include "causal_conv3d/cuda_pack.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/reduce.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr int kThreads = 256, kPackOuts = 32, kPackBytes = 32 * 1024;

// How weights are cut: a block moves kPackOuts x `wide` x all taps.
struct PackTiles {
  int outs, channels, taps, wide;

  explicit PackTiles(const GemmShape& s)
      : outs(s.out_channels), channels(s.group_in()), taps(s.taps()) {
    const index_t column = column_bytes(s);
    check(column <= 192 * 1024, "causal_conv3d: more taps than the packing of weights holds");
    const int fit = static_cast<int>(kPackBytes / column);
    wide = fit < 1 ? 1 : fit < 16 ? fit : 16;
  }
  static index_t column_bytes(const GemmShape& s) {
    return index_t{kPackOuts} * s.taps() * dtype_bytes(s.dtype);
  }
  index_t blocks() const { return index_t{ceil_div(outs, kPackOuts)} * ceil_div(channels, wide); }
};

template <class T>
__device__ __forceinline__ std::uint32_t bits_of(T value) {
  std::uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}

// A bijection whose every bit depends on all of x (the finalizer of SplitMix64).
__device__ __forceinline__ unsigned long long mixed(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// [Cout, channels, taps] to another order, through shared memory: whole rows are read, and runs
// along whichever index is innermost written.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const T* weight, T* packed, std::uint64_t* marks, PackedOrder order,
                       PackTiles t) {
  __shared__ unsigned long long scratch[kThreads / kWarpSize];
  T* tile = reinterpret_cast<T*>(dynamic_shared());  // [kPackOuts][wide][taps]
  const int column_tiles = ceil_div(t.channels, t.wide);
  const int first_out = static_cast<int>(blockIdx.x) / column_tiles * kPackOuts;
  const int first_in = static_cast<int>(blockIdx.x) % column_tiles * t.wide;
  const int row = t.wide * t.taps, all = kPackOuts * row;
  unsigned long long mark = threadIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
    const int out = first_out + i / row, rest = i % row;
    if (out < t.outs && first_in + rest / t.taps < t.channels) {
      tile[i] = weight[(static_cast<index_t>(out) * t.channels + first_in) * t.taps + rest];
      mark = mark * 0x9e3779b97f4a7c15ull + bits_of(tile[i]);
    }
  }
  if (marks != nullptr) {
    mark = block_sum<kThreads>(mixed(mark), scratch) | 1u;
    if (*static_cast<volatile std::uint64_t*>(marks + blockIdx.x) == mark) return;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
    int out, in, tap;
    if (order.in == 1) {
      in = i % t.wide, tap = i / t.wide % t.taps, out = i / t.wide / t.taps;
    } else {
      out = i % kPackOuts, in = i / kPackOuts % t.wide, tap = i / kPackOuts / t.wide;
    }
    if (first_out + out < t.outs && first_in + in < t.channels)
      packed[(first_out + out) * order.out + (first_in + in) * order.in + tap * order.tap] =
          tile[(out * t.wide + in) * t.taps + tap];
  }
  if (marks == nullptr) return;
  __threadfence();  // who sees the mark sees the weights
  __syncthreads();
  if (threadIdx.x == 0) *static_cast<volatile std::uint64_t*>(marks + blockIdx.x) = mark;
}

}  // namespace

std::size_t packed_bytes(const GemmShape& s) {
  return static_cast<std::size_t>(round_up(s.weights() * dtype_bytes(s.dtype), index_t{64}));
}

std::size_t marks_bytes(const GemmShape& s) {
  return static_cast<std::size_t>(PackTiles(s).blocks()) * sizeof(std::uint64_t);
}

void pack_weight(const GemmShape& s, const PackedOrder& order, const void* weight, void* packed,
                 std::uint64_t* marks, const DeviceGuard& guard, const ExecContext& ctx) {
  const PackTiles tiles(s);
  with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    launch(guard, ctx, pack_weight_kernel<T>,
           dim3(grid_blocks(tiles.blocks(), "causal_conv3d: more than 2^31 - 1 blocks of weights")),
           kThreads, static_cast<std::size_t>(PackTiles::column_bytes(s)) * tiles.wide,
           static_cast<const T*>(weight), static_cast<T*>(packed), marks, order, tiles);
  });
}

}  // namespace magvit_fast::cuda
