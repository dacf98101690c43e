# mf_add_op(<op>) adds a room: csrc/<op>/{cpu*.cpp, *.simd.cpp, bindings.cpp} to _core, and
# {*.cu, bindings.cpp} to _core_cuda.

function(mf_core_target target)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc"
    "${CMAKE_CURRENT_BINARY_DIR}/generated")
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2>)
  target_link_libraries(${target} PRIVATE mf_warnings mf_openmp)
  if(MAGVIT_FAST_INPLACE)
    set_target_properties(${target} PROPERTIES
      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/python/magvit_fast")
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION magvit_fast)
endfunction()

macro(mf_begin_cores)
  mf_python_module(_core csrc/module.cpp csrc/common/isa.cpp)
  mf_core_target(_core)
  if(MF_WITH_CUDA)
    mf_python_module(_core_cuda csrc/module.cpp csrc/common/cuda/device.cu)
    mf_core_target(_core_cuda)
    mf_cuda_target(_core_cuda)
    target_compile_definitions(_core_cuda PRIVATE MAGVIT_FAST_CUDA_MODULE=1)
  endif()
  set(MF_OPS "")
  set(MF_CUDA_OPS "")
endmacro()

macro(mf_add_op op)
  list(APPEND MF_OPS ${op})
  set(_room "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${op}")
  file(GLOB _cpu CONFIGURE_DEPENDS "${_room}/cpu*.cpp")
  target_sources(_core PRIVATE ${_cpu} "${_room}/bindings.cpp")
  file(GLOB _simd CONFIGURE_DEPENDS "${_room}/*.simd.cpp")
  foreach(_file IN LISTS _simd)
    mf_add_simd(_core ${op} "${_file}")
  endforeach()
  if(MF_WITH_CUDA)
    file(GLOB _cuda CONFIGURE_DEPENDS "${_room}/*.cu")
    if(_cuda)  # a room may serve the CPU alone
      list(APPEND MF_CUDA_OPS ${op})
      target_sources(_core_cuda PRIVATE ${_cuda} "${_room}/bindings.cpp")
    endif()
  endif()
endmacro()

macro(mf_finish_cores)
  # The list of rooms reaches module.cpp as a generated header, so that adding an op is one line.
  set(_declarations "")
  foreach(_op IN LISTS MF_OPS)
    string(APPEND _declarations "void bind_${_op}(pybind11::module_& m);\n")
  endforeach()
  foreach(_list MF_OPS MF_CUDA_OPS)
    set(${_list}_CALLS "")
    foreach(_op IN LISTS ${_list})
      string(APPEND ${_list}_CALLS "  bind_${_op}(m);\n")
    endforeach()
  endforeach()
  file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/generated/ops.h" CONTENT
"#pragma once
#include <pybind11/pybind11.h>
namespace magvit_fast {
${_declarations}inline void bind_all(pybind11::module_& m) {
#ifdef MAGVIT_FAST_CUDA_MODULE
${MF_CUDA_OPS_CALLS}#else
${MF_OPS_CALLS}#endif
}
}  // namespace magvit_fast
")
  list(JOIN MF_ISA_LEVELS "," _levels)
  list(JOIN MAGVIT_FAST_CUDA_ARCHS "," _archs)
  list(JOIN MAGVIT_FAST_SANITIZE "," _sanitizers)
  foreach(_core_target _core _core_cuda)
    if(TARGET ${_core_target})
      target_compile_definitions(${_core_target} PRIVATE
        MF_BUILT_ISA_LEVELS="${_levels}" MF_BUILT_OPENMP="${MAGVIT_FAST_OPENMP}"
        MF_BUILT_SANITIZERS="${_sanitizers}"
        MF_BUILT_CUDA_ARCHS="${_archs}" MF_MODULE_NAME=${_core_target})
    endif()
  endforeach()
  if(MF_WITH_CUDA)
    set(_cuda_text "CUDA ${CMAKE_CUDA_COMPILER_VERSION} (${_archs})")
  else()
    set(_cuda_text "no CUDA (MAGVIT_FAST_CUDA=${MAGVIT_FAST_CUDA})")
  endif()
  message(STATUS "magvit_fast: CPU [${_levels}], OpenMP ${MAGVIT_FAST_OPENMP}, ${_cuda_text}")
endmacro()
