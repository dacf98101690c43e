// vq_nearest: the Python door, addresses and numbers to VqNearestParams.
// Previous hop: magvit_fast/ops/vq_nearest.py.
// Next hop: vq_nearest.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "vq_nearest/vq_nearest.h"

namespace magvit_fast {

void bind_vq_nearest(pybind11::module_& m) {
  m.def("vq_nearest_workspace_bytes",
        [](index_t codes, index_t channels, long long where, unsigned long long how) {
          return backend::vq_nearest_workspace_bytes(codes, channels, make_context(where, how));
        });
  m.def(
      "vq_nearest_search",
      [](std::uintptr_t z, std::uintptr_t codebook, std::uintptr_t indices,
         std::uintptr_t workspace, index_t outer, index_t channels, index_t inner,
         index_t outer_stride, index_t channel_stride, index_t inner_stride, index_t codes,
         int dtype, long long where, unsigned long long how) {
        const VqNearestParams params{reinterpret_cast<const void*>(z),
                                     reinterpret_cast<const float*>(codebook),
                                     reinterpret_cast<std::int64_t*>(indices),
                                     reinterpret_cast<void*>(workspace),
                                     outer,
                                     channels,
                                     inner,
                                     outer_stride,
                                     channel_stride,
                                     inner_stride,
                                     codes,
                                     static_cast<DType>(dtype)};
        backend::vq_nearest_search(params, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
