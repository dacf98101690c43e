// lfq_quantize: the Python door, addresses and numbers to LfqQuantizeParams.
// Previous hop: magvit_fast/ops/lfq_quantize.py.
// Next hop: lfq_quantize.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "lfq_quantize/lfq_quantize.h"

namespace magvit_fast {

void bind_lfq_quantize(pybind11::module_& m) {
  m.def(
      "lfq_quantize_forward",
      [](std::uintptr_t z, std::uintptr_t quantized, std::uintptr_t indices, index_t outer,
         index_t channels, index_t inner, index_t outer_stride, index_t channel_stride,
         index_t inner_stride, int dtype, bool msb_first, long long where, unsigned long long how) {
        const LfqQuantizeParams params{reinterpret_cast<const void*>(z),
                                       reinterpret_cast<void*>(quantized),
                                       reinterpret_cast<std::int64_t*>(indices),
                                       outer,
                                       channels,
                                       inner,
                                       outer_stride,
                                       channel_stride,
                                       inner_stride,
                                       static_cast<DType>(dtype),
                                       msb_first};
        backend::lfq_quantize_forward(params, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
