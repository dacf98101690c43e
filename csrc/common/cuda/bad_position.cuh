// How a kernel says where its input is bad, without the host waiting for it.
// Previous hop: lfq_codes, factorized_embedding, confidence_remask.
// Next hop: none.
#pragma once

#include <cuda_runtime.h>

#include "common/shape.h"

namespace magvit_fast::cuda {

// *bad starts at -1, which is the largest number when read unsigned; the smallest position stays.
__device__ __forceinline__ void report_bad(std::int64_t* bad, index_t position) {
  atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(position));
}

}  // namespace magvit_fast::cuda
