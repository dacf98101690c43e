// One way to spread work over threads: torch's own OpenMP pool, as many threads as torch is set to.
// Previous hop: cpu.cpp of every op.
// Next hop: libgomp, the copy that torch has loaded.
#pragma once

#include <exception>

#include "common/shape.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace magvit_fast {
namespace {  // per translation unit: *.simd.cpp files are built with different instructions

// body(begin, end, thread) over [0, count) in contiguous parts, one a thread. One thread opens no
// parallel region at all (data-loader workers fork). Nothing may escape a region, so the first
// exception is carried out and rethrown.
template <class Body>
void parallel_ranges(index_t count, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int threads = num_threads < count ? num_threads : static_cast<int>(count);
#ifdef _OPENMP
  if (threads > 1) {
    std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(threads)
    {
      const index_t team = omp_get_num_threads();
      const index_t rank = omp_get_thread_num();
      try {
        body(count * rank / team, count * (rank + 1) / team, static_cast<int>(rank));
      } catch (...) {
#pragma omp critical(magvit_fast_error)
        if (!error) error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  body(index_t{0}, count, 0);
}

// body(item, thread) over [0, count), handed out one by one: for items of unequal cost.
template <class Body>
void parallel_items(index_t count, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int threads = num_threads < count ? num_threads : static_cast<int>(count);
#ifdef _OPENMP
  if (threads > 1) {
    std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(threads)
    {
      const int rank = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
      for (index_t item = 0; item < count; ++item) {
        try {
          body(item, rank);
        } catch (...) {
#pragma omp critical(magvit_fast_error)
          if (!error) error = std::current_exception();
        }
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (index_t item = 0; item < count; ++item) body(item, 0);
}

}  // namespace
}  // namespace magvit_fast
