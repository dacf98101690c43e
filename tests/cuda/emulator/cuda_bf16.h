// bfloat16 as the CUDA headers name it, with the arithmetic of csrc/common/half.h.
// Previous hop: common/cuda/convert.cuh.
// Next hop: csrc/common/half.h.
#pragma once

#include "common/half.h"

struct __nv_bfloat16 {
  magvit_fast::bf16_t value;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : value(magvit_fast::from_float<magvit_fast::bf16_t>(x)) {}
  operator float() const { return magvit_fast::to_float(value); }
};
