// lfq_codes: the Python door, addresses and numbers to LfqCodesParams.
// Previous hop: magvit_fast/ops/lfq_codes.py.
// Next hop: lfq_codes.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "lfq_codes/lfq_codes.h"

namespace magvit_fast {

void bind_lfq_codes(pybind11::module_& m) {
  m.def(
      "lfq_codes_forward",
      [](std::uintptr_t indices, std::uintptr_t codes, std::uintptr_t bad, index_t outer,
         index_t channels, index_t inner, int dtype, bool msb_first, long long where,
         unsigned long long how) {
        LfqCodesParams params{};
        params.indices = reinterpret_cast<const std::int64_t*>(indices);
        params.codes = reinterpret_cast<void*>(codes);
        params.bad = reinterpret_cast<std::int64_t*>(bad);
        params.outer = outer;
        params.channels = channels;
        params.inner = inner;
        params.dtype = static_cast<DType>(dtype);
        params.msb_first = msb_first;
        backend::lfq_codes_forward(params, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
