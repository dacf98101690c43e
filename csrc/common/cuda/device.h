// Facts about the CUDA build and its devices.
// Previous hop: module.cpp of _core_cuda.
// Next hop: device.cu.
#pragma once

namespace magvit_fast::cuda {

int runtime_version();  // of the runtime that was linked, e.g. 13000
int device_count();     // 0 without a driver

}  // namespace magvit_fast::cuda
