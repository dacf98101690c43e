// causal_conv3d: hands out pieces of the caller's workspace, or measures it without memory.
// Previous hop: cpu.cpp, cpu_weight_grad.cpp.
// Next hop: none.
#pragma once

#include <cstddef>

#include "common/shape.h"

namespace magvit_fast {

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  // count elements on a cache line of their own; null while measuring.
  template <class T>
  T* take(index_t count) {
    const std::size_t start = used_;
    used_ += round_up(static_cast<std::size_t>(count) * sizeof(T), std::size_t{64});
    return base_ ? reinterpret_cast<T*>(base_ + start) : nullptr;
  }
  std::size_t bytes() const { return used_; }
  bool measuring() const { return base_ == nullptr; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace magvit_fast
