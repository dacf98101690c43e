// The element types of the kernels, by the codes of magvit_fast._native.DTYPE_CODES.
// Previous hop: bindings.cpp receives the code.
// Next hop: kernels switch on it.
#pragma once

namespace magvit_fast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace magvit_fast
