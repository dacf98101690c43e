// Tensor maps: how the copy engine of compute capability 9.0 finds a box of a strided tensor.
// Previous hop: the launchers of kernels for sm_90a.
// Next hop: cuTensorMapEncodeTiled, asked of the driver at run time (no link to libcuda).
// The tests put an emulation of this file before it on the include path.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_view.h"

namespace magvit_fast::cuda {

using TensorMap = CUtensorMap;

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled(const char* op) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &status),
             op);
  if (status != cudaDriverEntryPointSuccess || found == nullptr)
    throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(found);
}

// Boxes land in the 128-byte swizzle (swizzle.h); what lies outside of the tensor is read as zero
// and not written.
inline TensorMap tensor_map(const TensorView& view, const char* op) {
  cuuint64_t size[TensorView::kRank], stride_bytes[TensorView::kRank];
  cuuint32_t box[TensorView::kRank], step[TensorView::kRank];
  for (int i = 0; i < TensorView::kRank; ++i) {
    size[i] = static_cast<cuuint64_t>(view.size[i]);
    stride_bytes[i] = static_cast<cuuint64_t>(view.stride[i]) * 2;
    box[i] = static_cast<cuuint32_t>(view.box[i]);
    step[i] = 1;
  }
  TensorMap map;
  const CUresult code =
      encode_tiled(op)(&map,
                       view.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                       TensorView::kRank, const_cast<void*>(view.base), size, stride_bytes + 1, box,
                       step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled returned " +
                             std::to_string(static_cast<int>(code)));
  return map;
}

}  // namespace magvit_fast::cuda
