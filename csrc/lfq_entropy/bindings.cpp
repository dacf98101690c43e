// lfq_entropy: the Python door, addresses and numbers to the params structs.
// Previous hop: magvit_fast/ops/lfq_entropy.py.
// Next hop: lfq_entropy.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "lfq_entropy/lfq_entropy.h"

namespace magvit_fast {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_lfq_entropy(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("lfq_entropy_workspace_bytes", [](index_t positions, index_t channels, long long where,
                                          unsigned long long how) {
    return backend::lfq_entropy_workspace_bytes(positions, channels, make_context(where, how));
  });
  m.def(
      "lfq_entropy_sums",
      [](Address z, Address mask, index_t outer, index_t channels, index_t inner,
         index_t outer_stride, index_t channel_stride, index_t inner_stride, int dtype,
         double scale, Address stats, Address probs, Address workspace, bool full_precision,
         long long where, unsigned long long how) {
        const LfqEntropyInput in{at<const void>(z),
                                 at<const std::uint8_t>(mask),
                                 outer,
                                 channels,
                                 inner,
                                 outer_stride,
                                 channel_stride,
                                 inner_stride,
                                 static_cast<DType>(dtype),
                                 static_cast<float>(scale)};
        backend::lfq_entropy_sums(
            {in, at<double>(stats), at<float>(probs), at<void>(workspace), full_precision},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "lfq_entropy_codebook",
      [](Address probs, Address stats, Address per_sample, Address entropy, Address workspace,
         index_t codes, double eps, bool clamp, long long where, unsigned long long how) {
        backend::lfq_entropy_codebook(
            {at<const float>(probs), at<const double>(stats), at<float>(per_sample),
             at<float>(entropy), at<void>(workspace), codes, static_cast<float>(eps), clamp},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "lfq_entropy_backward",
      [](Address z, Address mask, index_t outer, index_t channels, index_t inner,
         index_t outer_stride, index_t channel_stride, index_t inner_stride, int dtype,
         double scale, Address probs, Address stats, Address grad_sample, Address grad_codebook,
         Address grad_z, Address workspace, double eps, bool clamp, bool full_precision,
         long long where, unsigned long long how) {
        const LfqEntropyInput in{at<const void>(z),
                                 at<const std::uint8_t>(mask),
                                 outer,
                                 channels,
                                 inner,
                                 outer_stride,
                                 channel_stride,
                                 inner_stride,
                                 static_cast<DType>(dtype),
                                 static_cast<float>(scale)};
        backend::lfq_entropy_backward(
            {in, at<const float>(probs), at<const double>(stats), at<const float>(grad_sample),
             at<const float>(grad_codebook), at<void>(grad_z), at<void>(workspace),
             static_cast<float>(eps), clamp, full_precision},
            make_context(where, how));
      },
      no_gil);
}

}  // namespace magvit_fast
