# CUDA: found, required or left out; the summary line of Ops.cmake says which.
set(MF_WITH_CUDA OFF)
if(NOT MAGVIT_FAST_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # given per target below
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(MF_WITH_CUDA ON)
  elseif(MAGVIT_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MAGVIT_FAST_CUDA=ON, but no CUDA compiler was found: put nvcc on the PATH "
      "or set CUDACXX, or build with MAGVIT_FAST_CUDA=OFF")
  endif()
endif()

# One -gencode per architecture; the plain ones (80) also carry PTX, so that newer devices can run them.
function(mf_cuda_target target)
  foreach(arch IN LISTS MAGVIT_FAST_CUDA_ARCHS)
    if(arch MATCHES "a$")
      set(code "sm_${arch}")
    else()
      set(code "[sm_${arch},compute_${arch}]")
    endif()
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode=arch=compute_${arch},code=${code}>")
  endforeach()
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-lineinfo --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra>")
  if(MAGVIT_FAST_WERROR)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
  endif()
  # Static: the module then loads on a machine without CUDA, driver or device.
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES OFF
    CUDA_SEPARABLE_COMPILATION OFF CUDA_VISIBILITY_PRESET hidden)
endfunction()
