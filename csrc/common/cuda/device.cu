// Facts about the CUDA build and its devices; creates no context by being loaded.
// Previous hop: module.cpp of _core_cuda.
// Next hop: the CUDA runtime, linked statically.
#include <cuda_runtime.h>

#include "common/cuda/device.h"

namespace magvit_fast::cuda {

int runtime_version() { return CUDART_VERSION; }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device: an answer, not a failure
    return 0;
  }
  return count;
}

}  // namespace magvit_fast::cuda
