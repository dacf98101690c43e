// Checks of what reaches a kernel's door; the caller in Python has checked shapes already.
// Previous hop: bindings.cpp and the entry points of an op.
// Next hop: pybind11 makes ValueError of std::invalid_argument, RuntimeError of runtime_error.
#pragma once

#include <stdexcept>
#include <string>

namespace magvit_fast {

inline void check(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

}  // namespace magvit_fast
