// What a kernel may know of its surroundings: everything comes in, nothing is looked up.
// Previous hop: an op's bindings.cpp, which fills it from the last two arguments of the call.
// Next hop: cpu.cpp (isa, num_threads) or cuda.cu (device, stream).
#pragma once

namespace magvit_fast {

struct ExecContext {
  int isa = 0;             // index into Isa (common/isa.h), at most what detect_isa() found
  int num_threads = 1;     // torch.get_num_threads() of the calling thread
  int device = 0;          // CUDA device index
  void* stream = nullptr;  // cudaStream_t, current at the call
};

#ifdef MAGVIT_FAST_CUDA_MODULE
inline ExecContext make_context(long long device, unsigned long long stream) {
  ExecContext ctx;
  ctx.device = static_cast<int>(device);
  ctx.stream = reinterpret_cast<void*>(stream);
  return ctx;
}
#else
inline ExecContext make_context(long long isa, unsigned long long num_threads) {
  ExecContext ctx;
  ctx.isa = static_cast<int>(isa);
  ctx.num_threads = num_threads < 1 ? 1 : static_cast<int>(num_threads);
  return ctx;
}
#endif

// The twin namespaces cpu and cuda carry the same entry points; one bindings.cpp serves both.
namespace cpu {}
namespace cuda {}
#ifdef MAGVIT_FAST_CUDA_MODULE
namespace backend = cuda;
#else
namespace backend = cpu;
#endif

}  // namespace magvit_fast
