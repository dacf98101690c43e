// The part of the CUDA runtime that the kernels use, on top of the emulator.
// Previous hop: csrc/**/*.cu compiled as C++ by tests/cuda/emulation.py.
// Next hop: emulator.h.
#pragma once

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define CUDART_VERSION 0

constexpr int warpSize = 32;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads() { ::emulator::block_barrier(false); }
inline int __syncthreads_or(int predicate) { return ::emulator::block_barrier(predicate != 0) > 0; }
inline int __syncthreads_count(int predicate) { return ::emulator::block_barrier(predicate != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  ::emulator::warp_exchange(mask, &nothing, 1);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const auto* table = ::emulator::warp_exchange(mask, &value, sizeof(T));
  const int lane = ::emulator::lane();
  return ::emulator::warp_read<T>(table, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return __shfl_sync(mask, value, (::emulator::lane() % width) ^ lane_mask, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::emulator::lane() % width;
  return __shfl_sync(mask, value, lane + delta < width ? lane + delta : lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::emulator::lane() % width;
  return __shfl_sync(mask, value, lane >= delta ? lane - delta : lane, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* table = ::emulator::warp_exchange(mask, &predicate, sizeof(predicate));
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l) & 1u)
      bits |= static_cast<unsigned>(::emulator::warp_read<int>(table, l) != 0) << l;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f ? x * 0.0f : x / y; }
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// One thread runs at a time, so plain arithmetic is atomic here.
template <class T, class U>
T atomicAdd(T* p, U value) {
  const T before = *p;
  *p = static_cast<T>(before + value);
  return before;
}
template <class T, class U>
T atomicMin(T* p, U value) {
  const T before = *p;
  *p = before < static_cast<T>(value) ? before : static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicOr(T* p, U value) {
  const T before = *p;
  *p = static_cast<T>(before | value);
  return before;
}
inline void __threadfence() {}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
// Few multiprocessors: persistent blocks then take several tiles each.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 * 1024;
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  return *p = std::malloc(bytes), cudaSuccess;
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : 1;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (block.x * block.y * block.z > 1024 || block.x * block.y * block.z == 0 || grid.x == 0 ||
      grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 ||
      config->dynamicSmemBytes > 227 * 1024)
    return 1;
  const std::tuple<Expected...> copy{std::forward<Actual>(arguments)...};
  ::emulator::run_grid(grid, block, config->dynamicSmemBytes, [&] { std::apply(kernel, copy); });
  return cudaSuccess;
}
