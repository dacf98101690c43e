# Threads. torch ships a libgomp with the plain soname; linking to libgomp.so.1 makes both share it,
# whichever is loaded first. Another OpenMP runtime (clang's libomp) would be a second thread pool in
# the process, so there the cores are built without OpenMP.
add_library(mf_openmp INTERFACE)
set(MAGVIT_FAST_OPENMP "none")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  find_package(OpenMP COMPONENTS CXX)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(mf_openmp INTERFACE OpenMP::OpenMP_CXX)
    set(MAGVIT_FAST_OPENMP "libgomp")
  endif()
else()
  message(WARNING "magvit_fast: ${CMAKE_CXX_COMPILER_ID} does not link torch's libgomp; building without OpenMP")
endif()
