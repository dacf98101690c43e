// Run-time detection of the instruction-set level. Compiled with plain flags, so it runs anywhere.
// Previous hop: module.cpp (detect_isa of the Python module).
// Next hop: none; the answer travels back to the callers in ExecContext::isa.
#include "common/isa.h"

namespace magvit_fast {

int detect_isa() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")))
    return static_cast<int>(Isa::baseline);
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return static_cast<int>(Isa::avx2);
  if (!__builtin_cpu_supports("avx512bf16")) return static_cast<int>(Isa::avx512);
  return static_cast<int>(Isa::avx512_bf16);
#else
  return static_cast<int>(Isa::baseline);
#endif
}

}  // namespace magvit_fast
