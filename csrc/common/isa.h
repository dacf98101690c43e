// The instruction-set levels that *.simd.cpp is built for, in rising order (cmake/Isa.cmake).
// Previous hop: module.cpp (detect_isa) and cpu.cpp of every op (MF_PICK_SIMD).
// Next hop: the per-level functions in namespaces baseline, avx2, avx512, avx512_bf16.
#pragma once

namespace magvit_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The highest level that both this machine (processor and operating system) and this build have.
int detect_isa();

}  // namespace magvit_fast

// MF_DECLARE_SIMD(ret, f, (args)), inside namespace magvit_fast, declares f for every level;
// MF_PICK_SIMD(f, isa) is the function for `isa`.
#if defined(__x86_64__)
#define MF_DECLARE_SIMD(ret, name, args) \
  namespace baseline {                   \
  ret name args;                         \
  }                                      \
  namespace avx2 {                       \
  ret name args;                         \
  }                                      \
  namespace avx512 {                     \
  ret name args;                         \
  }                                      \
  namespace avx512_bf16 {                \
  ret name args;                         \
  }
#define MF_PICK_SIMD(name, isa)                    \
  ((isa) >= 3   ? ::magvit_fast::avx512_bf16::name \
   : (isa) == 2 ? ::magvit_fast::avx512::name      \
   : (isa) == 1 ? ::magvit_fast::avx2::name        \
                : ::magvit_fast::baseline::name)
#else
#define MF_DECLARE_SIMD(ret, name, args) \
  namespace baseline {                   \
  ret name args;                         \
  }
#define MF_PICK_SIMD(name, isa) ((void)(isa), ::magvit_fast::baseline::name)
#endif
