// confidence_remask: the Python door, addresses and numbers to ConfidenceRemaskParams.
// Previous hop: magvit_fast/ops/confidence_remask.py.
// Next hop: confidence_remask.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "confidence_remask/confidence_remask.h"

namespace magvit_fast {

void bind_confidence_remask(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "confidence_remask",
      [](Address logits, Address tokens, Address unknown, Address num_unknown, Address value_noise,
         Address choice_noise, Address new_tokens, Address new_unknown, Address bad,
         Address workspace, index_t batch, index_t length, int groups, int bits, int dtype,
         double temperature, double choice_temperature, std::uint64_t seed, std::uint32_t step,
         long long where, unsigned long long how) {
        ConfidenceRemaskParams params{};
        params.logits = reinterpret_cast<const void*>(logits);
        params.tokens = reinterpret_cast<const std::int64_t*>(tokens);
        params.unknown = reinterpret_cast<const std::uint8_t*>(unknown);
        params.num_unknown = reinterpret_cast<const std::int64_t*>(num_unknown);
        params.value_noise = reinterpret_cast<const float*>(value_noise);
        params.choice_noise = reinterpret_cast<const float*>(choice_noise);
        params.new_tokens = reinterpret_cast<std::int64_t*>(new_tokens);
        params.new_unknown = reinterpret_cast<std::uint8_t*>(new_unknown);
        params.bad = reinterpret_cast<std::int64_t*>(bad);
        params.workspace = reinterpret_cast<void*>(workspace);
        params.batch = batch;
        params.length = length;
        params.groups = groups;
        params.bits = bits;
        params.dtype = static_cast<DType>(dtype);
        params.temperature = static_cast<float>(temperature);
        params.choice_temperature = static_cast<float>(choice_temperature);
        params.seed = seed;
        params.step = step;
        backend::confidence_remask(params, make_context(where, how));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace magvit_fast
