# Instruction sets: every *.simd.cpp is compiled once per level and chosen at run time.
# The levels are cumulative; csrc/common/isa.h holds the same order.
include(CheckCXXCompilerFlag)
set(MF_ISA_LEVELS baseline)
set(MF_ISA_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(MF_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(MF_ISA_FLAGS_avx512 ${MF_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
  set(MF_ISA_FLAGS_avx512_bf16 ${MF_ISA_FLAGS_avx512} -mavx512bf16)
  foreach(_level avx2 avx512 avx512_bf16)
    list(JOIN MF_ISA_FLAGS_${_level} " " _flags)
    check_cxx_compiler_flag("${_flags}" MF_COMPILER_HAS_${_level})
    if(NOT MF_COMPILER_HAS_${_level})
      message(FATAL_ERROR "magvit_fast: the compiler lacks ${_flags}; gcc >= 10 or clang >= 9 is needed")
    endif()
    list(APPEND MF_ISA_LEVELS ${_level})
  endforeach()
endif()

# What a sanitizer adds to every access makes the largest of these files take minutes at -O3.
set(MF_SIMD_OPTIMIZATION -O3)
if(MAGVIT_FAST_SANITIZE)
  set(MF_SIMD_OPTIMIZATION -O1)
endif()

# mf_add_simd(<target> <op> <file>): the file once per level, its code in namespace magvit_fast::<level>.
function(mf_add_simd target op file)
  get_filename_component(stem "${file}" NAME_WE)
  foreach(level IN LISTS MF_ISA_LEVELS)
    set(object "mf_${op}_${stem}_${level}")
    add_library(${object} OBJECT "${file}")
    target_include_directories(${object} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
    # The namespace is part of every symbol, so no helper built with newer instructions can be picked
    # by the linker for older ones.
    target_compile_definitions(${object} PRIVATE MF_ISA=${level} MF_ISA_${level}=1)
    target_compile_options(${object} PRIVATE ${MF_SIMD_OPTIMIZATION} -ffp-contract=fast -fno-math-errno
      -fno-trapping-math ${MF_ISA_FLAGS_${level}})
    target_link_libraries(${object} PRIVATE mf_warnings mf_openmp)
    if(level MATCHES "avx512")
      # gcc 12 warns of its own AVX-512 header (PR 105593: the "undefined" operand of some intrinsics);
      # the other levels compile the same source with the warning on.
      target_compile_options(${object} PRIVATE
        $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()
