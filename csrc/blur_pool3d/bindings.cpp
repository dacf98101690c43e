// blur_pool3d: the Python door, addresses and numbers to BlurPool3dParams.
// Previous hop: magvit_fast/ops/blur_pool3d.py.
// Next hop: blur_pool3d.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "blur_pool3d/blur_pool3d.h"
#include "common/check.h"

namespace magvit_fast {

void bind_blur_pool3d(pybind11::module_& m) {
  m.def(
      "blur_pool3d_filter",
      [](std::uintptr_t source, std::uintptr_t result, index_t batch, index_t channels,
         const std::vector<index_t>& axes, int taps, bool transpose, int dtype, long long where,
         unsigned long long how) {
        check(axes.size() == 12, "blur_pool3d: expected 12 numbers for the axes");
        check(taps >= 1 && taps <= kBlurMaxTaps, "blur_pool3d: 1 to 8 taps");
        BlurPool3dParams p{};  // axes: source, result, stride, before of t, then of h, then of w
        p.from = reinterpret_cast<const void*>(source);
        p.to = reinterpret_cast<void*>(result);
        p.batch = batch;
        p.channels = channels;
        for (std::size_t a = 0; a < 3; ++a) {
          const index_t* n = axes.data() + 4 * a;
          check(n[2] >= 1, "blur_pool3d: strides must be positive");
          p.axis[a] = {n[0], n[1], n[2], n[3]};
        }
        double binomial = 1.0;  // of (taps - 1 over k), exact, and so is its part of the sum
        for (int k = 0; k < taps; ++k) {
          p.taps[k] = static_cast<float>(binomial / static_cast<double>(1 << (taps - 1)));
          binomial = binomial * (taps - 1 - k) / (k + 1);
        }
        p.count = taps;
        p.transpose = transpose;
        p.dtype = static_cast<DType>(dtype);
        backend::blur_pool3d_filter(p, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
