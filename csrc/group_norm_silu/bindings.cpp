// group_norm_silu: the Python door, addresses and numbers to the params structs.
// Previous hop: magvit_fast/ops/group_norm_silu.py.
// Next hop: group_norm_silu.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/check.h"
#include "group_norm_silu/group_norm_silu.h"

namespace magvit_fast {
namespace {

template <class T>
T* at(index_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// The numbers of magvit_fast/ops/group_norm_silu.py, _numbers(), in its order.
GroupNormSiluInput input(const std::vector<index_t>& n, double eps) {
  check(n.size() == 27, "group_norm_silu: expected 27 numbers");
  return {at<const void>(n[0]),
          at<const float>(n[1]),
          at<const float>(n[2]),
          at<const void>(n[3]),
          at<const void>(n[4]),
          n[5],
          n[6],
          n[7],
          n[8],
          n[9],
          n[10],
          {n[11], n[12], n[13]},
          n[14],
          {n[15], n[16], n[17], n[18]},
          {n[19], n[20], n[21], n[22]},
          n[23] != 0,
          n[24] != 0,
          n[25] != 0,
          static_cast<float>(eps),
          static_cast<DType>(n[26])};
}

}  // namespace

void bind_group_norm_silu(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("group_norm_silu_takes_planes",
        [](bool adaptive) { return backend::group_norm_silu_takes_planes(adaptive); });
  m.def("group_norm_silu_workspace_bytes", [](const std::vector<index_t>& numbers, long long where,
                                              unsigned long long how) {
    return backend::group_norm_silu_workspace_bytes(input(numbers, 0.0), make_context(where, how));
  });
  m.def(
      "group_norm_silu_forward",
      [](const std::vector<index_t>& numbers, double eps, index_t y, index_t stats,
         index_t workspace, bool ready, long long where, unsigned long long how) {
        backend::group_norm_silu_forward(
            {input(numbers, eps), at<void>(y), at<GroupStats>(stats), at<void>(workspace), ready},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "group_norm_silu_backward",
      [](const std::vector<index_t>& numbers, index_t dy, index_t stats, index_t dx,
         index_t dweight, index_t dbias, index_t dscale, index_t dshift, index_t workspace,
         long long where, unsigned long long how) {
        backend::group_norm_silu_backward(
            {input(numbers, 0.0), at<const void>(dy), at<const GroupStats>(stats), at<void>(dx),
             at<float>(dweight), at<float>(dbias), at<float>(dscale), at<float>(dshift),
             at<void>(workspace)},
            make_context(where, how));
      },
      no_gil);
}

}  // namespace magvit_fast
