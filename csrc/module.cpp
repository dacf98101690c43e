// The Python modules: built once as _core (CPU) and once as _core_cuda, from the same rooms.
// Previous hop: magvit_fast/_native.py.
// Next hop: bind_<op> in csrc/<op>/bindings.cpp, listed by mf_add_op (generated ops.h).
#include "common/isa.h"
#include "ops.h"
#ifdef MAGVIT_FAST_CUDA_MODULE
#include "common/cuda/device.h"
#else
#include "common/core_latency.h"
#include "common/pages.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(MF_MODULE_NAME, m) {
  m.doc() = "Kernels of magvit_fast: addresses, sizes and numbers in, nothing allocated.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = "gcc " __VERSION__;
    info["isa_levels"] = MF_BUILT_ISA_LEVELS;
    info["openmp"] = MF_BUILT_OPENMP;
    info["sanitizers"] = MF_BUILT_SANITIZERS;
#ifdef MAGVIT_FAST_CUDA_MODULE
    info["cuda_archs"] = MF_BUILT_CUDA_ARCHS;
    info["cuda_runtime"] = magvit_fast::cuda::runtime_version();
#endif
    return info;
  });
#ifdef MAGVIT_FAST_CUDA_MODULE
  m.def("device_count", &magvit_fast::cuda::device_count);
#else
  m.def("detect_isa", &magvit_fast::detect_isa);
  m.def("advise_huge_pages", &magvit_fast::advise_huge_pages);
  m.def("core_latency_ns", &magvit_fast::core_latency_ns, py::call_guard<py::gil_scoped_release>());
#endif
  magvit_fast::bind_all(m);
}
