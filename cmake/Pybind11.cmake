# The headers of pybind11: from its own package, or else the copy that torch carries (machines with torch
# and a compiler but nothing to install from). mf_python_module(<name> <sources>) is a Python module on them.
find_package(pybind11 CONFIG QUIET)
set(MF_PYBIND11_FROM "CMake package ${pybind11_VERSION}")
if(NOT pybind11_FOUND)
  foreach(_source pybind11 torch)
    if(_source STREQUAL "pybind11")
      set(_code "import pybind11; print(pybind11.get_include())")
    else()  # found without importing it, which takes seconds
      set(_code "import importlib.util, os; print(os.path.join(os.path.dirname(importlib.util.find_spec('torch').origin), 'include'))")
    endif()
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${_code}"
      OUTPUT_VARIABLE _include OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _failed)
    if(NOT _failed AND EXISTS "${_include}/pybind11/pybind11.h")
      set(pybind11_INCLUDE_DIRS "${_include}")
      set(MF_PYBIND11_FROM "${_include}")
      break()
    endif()
  endforeach()
endif()
if(NOT pybind11_INCLUDE_DIRS)
  message(FATAL_ERROR "magvit_fast: pybind11 was not found: install it for ${Python_EXECUTABLE} "
    "(pip install pybind11); a torch installation there would do, too")
endif()
message(STATUS "magvit_fast: pybind11 headers from ${MF_PYBIND11_FROM}")

function(mf_python_module name)
  Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${pybind11_INCLUDE_DIRS})
endfunction()
