// Tensor maps of the emulator: the view itself, held to the driver's rules.
// Previous hop: launchers of kernels for sm_90a, which include "common/cuda/tensor_map.h".
// Next hop: hopper.cuh of this folder.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_view.h"

namespace magvit_fast::cuda {

struct alignas(64) TensorMap {
  TensorView view;
};

inline TensorMap tensor_map(const TensorView& view, const char* op) {
  const auto demand = [&](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string(op) + ": emulated tensor map: " + what);
  };
  demand(view.base != nullptr && reinterpret_cast<std::uintptr_t>(view.base) % 16 == 0, "address");
  demand(view.stride[0] == 1, "channels are not innermost");
  demand(view.box[0] * 2 <= 128, "a box of more than 128 bytes of channels");
  for (int i = 0; i < TensorView::kRank; ++i) {
    demand(view.size[i] >= 1 && view.size[i] <= (index_t{1} << 32), "size");
    demand(view.box[i] >= 1 && view.box[i] <= 256, "box");
    if (i > 0)
      demand(view.stride[i] * 2 % 16 == 0 && view.stride[i] * 2 < (index_t{1} << 40), "stride");
  }
  return {view};
}

}  // namespace magvit_fast::cuda
