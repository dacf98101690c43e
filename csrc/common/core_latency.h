// How long a cache line takes from one thread of the pool to another. Two cores that share a cache
// need some 30 ns, two that do not 5 times as long, and a virtual machine may be moved from the one
// to the other at any time: a figure of a kernel whose threads exchange data needs this beside it.
// Previous hop: module.cpp (benchmarks/conftest.py). Next hop: none.
#pragma once

#include <atomic>
#include <chrono>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace magvit_fast {

// Nanoseconds of one handover, the least of many windows; 0 where the pool has one thread. Takes a
// millisecond, or half a second where both threads have only one core and wait for its scheduler.
inline double core_latency_ns() {
  double least = 0.0;
#ifdef _OPENMP
  using Clock = std::chrono::steady_clock;
  constexpr int kWindows = 50, kHandovers = 100;
  std::atomic<int> turn{0};  // even: thread 0's; negative: over
#pragma omp parallel num_threads(2)
  if (omp_get_num_threads() == 2) {
    if (omp_get_thread_num() == 0) {
      const auto begin = Clock::now();
      for (int window = 0; window < kWindows; ++window) {
        const auto start = Clock::now();
        for (int i = 0; i < kHandovers; i += 2) {
          turn.store(1, std::memory_order_release);
          while (turn.load(std::memory_order_acquire) != 0) {
          }
        }
        const auto end = Clock::now();
        const double ns =
            std::chrono::duration<double, std::nano>(end - start).count() / kHandovers;
        if (window == 0 || ns < least) least = ns;
        if (end - begin > std::chrono::milliseconds(20)) break;
      }
      turn.store(-1, std::memory_order_release);
    } else {
      for (int seen; (seen = turn.load(std::memory_order_acquire)) >= 0;)
        if (seen == 1) turn.store(0, std::memory_order_release);
    }
  }
#endif
  return least;
}

}  // namespace magvit_fast
