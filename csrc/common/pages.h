// Large pages for fresh memory: a hint to the kernel, without which the first writing of a large
// result costs several times its bytes. Previous hop: module.cpp (_native.in_huge_pages). Next hop:
// madvise, where the system has it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace magvit_fast {

// Asks for 2 MiB pages where they fit whole into [address, address + bytes). Contents are not
// touched, and a refusal changes nothing: the result is the same memory in small pages.
inline void advise_huge_pages(std::uintptr_t address, std::uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const std::uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (address + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace magvit_fast
