// depth_to_space3d: the Python door, addresses and numbers to DepthToSpace3dParams.
// Previous hop: magvit_fast/ops/depth_to_space3d.py.
// Next hop: depth_to_space3d.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "depth_to_space3d/depth_to_space3d.h"

namespace magvit_fast {

void bind_depth_to_space3d(pybind11::module_& m) {
  m.def(
      "depth_to_space3d_permute",
      [](std::uintptr_t source, std::uintptr_t result, index_t batch, index_t channels,
         index_t frames, index_t height, index_t width, index_t factor_t, index_t factor_h,
         index_t factor_w, index_t dropped, int element_bytes, bool channels_last, bool to_depth,
         long long where, unsigned long long how) {
        check(element_bytes == 1 || element_bytes == 2 || element_bytes == 4 || element_bytes == 8,
              "depth_to_space3d: elements must have 1, 2, 4 or 8 bytes");
        check(factor_t >= 1 && factor_h >= 1 && factor_w >= 1,
              "depth_to_space3d: factors must be positive");
        const DepthToSpace3dParams params{reinterpret_cast<const void*>(source),
                                          reinterpret_cast<void*>(result),
                                          batch,
                                          channels,
                                          frames,
                                          height,
                                          width,
                                          {factor_t, factor_h, factor_w},
                                          dropped,
                                          element_bytes,
                                          channels_last,
                                          to_depth};
        backend::depth_to_space3d_permute(params, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
