// Element types on the device, and the switch from a dtype code to a type.
// Previous hop: cuda.cu of every op.
// Next hop: the CUDA headers of bfloat16 and float16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/dtype.h"

namespace magvit_fast::cuda {

// body(T{}) for the type of a dtype code.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(__nv_bfloat16{});
    case DType::f16:
      return body(__half{});
  }
  throw std::invalid_argument("dtype: not one of the codes 0, 1, 2");
}

// The same for the types that tensor cores multiply with float32 sums.
template <class Body>
void with_half_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(__nv_bfloat16{});
    case DType::f16:
      return body(__half{});
    case DType::f32:
      break;
  }
  throw std::invalid_argument("dtype: expected a 16-bit type");
}

// kCount neighbors in one load or store; the address is a multiple of their size.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Run {
  T value[kCount];
};

// Two neighbors in one store; the address is a multiple of two elements.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};
template <class T>
__device__ __forceinline__ void store_pair(T* p, float first, float second) {
  *reinterpret_cast<Pair<T>*>(p) = Pair<T>{static_cast<T>(first), static_cast<T>(second)};
}

// Two 16-bit neighbors in a register, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack_pair(float first, float second) {
  const Pair<T> pair{static_cast<T>(first), static_cast<T>(second)};
  static_assert(sizeof(pair) == sizeof(std::uint32_t));
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t bits) {
  Pair<T> pair;
  memcpy(&pair, &bits, sizeof(bits));
  return make_float2(static_cast<float>(pair.first), static_cast<float>(pair.second));
}

}  // namespace magvit_fast::cuda
