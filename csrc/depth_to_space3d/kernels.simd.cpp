// depth_to_space3d, one source per instruction set: rows of wide, copied from or to deep.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// Channels-last: f_w * C adjacent elements are adjacent on both sides, copied as one run; by
// vectors in place, because a run is a few hundred bytes and a call of memcpy for each costs a
// fifth more (35.7 MB, one thread: 6.3 to 4.7 ms; one copy of all of it 3.8). Channels-first: a row
// interleaves f_w rows of the other side.
#include "common/simd.h"
#include "depth_to_space3d/depth_to_space3d.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

inline void copy_run(char* to, const char* from, index_t bytes) {
  constexpr index_t kBytes = kLanes * 4;
  if (bytes < kBytes) {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return;
  }
  for (index_t i = 0; i + kBytes <= bytes; i += kBytes) store_as(to + i, load_as<vi>(from + i));
  const index_t last = bytes - kBytes;  // may overlap what is written already
  if (bytes % kBytes) store_as(to + last, load_as<vi>(from + last));
}

void runs(const DepthToSpace3dParams& p, const DepthToSpace3dRow& row) {
  const index_t size = p.element_bytes;
  const index_t bytes = p.factor[2] * p.channels * size;
  const char* from = static_cast<const char*>(p.from);
  char* to = static_cast<char*>(p.to);
  for (index_t w = 0; w < p.width; ++w) {
    const index_t deep = (row.deep + w * row.step) * size;
    const index_t wide = (row.wide + w * p.factor[2] * p.channels) * size;
    if (!p.to_depth)
      copy_run(to + wide, from + deep, bytes);
    else if (row.dropped)
      std::memset(to + deep, 0, static_cast<std::size_t>(bytes));
    else
      copy_run(to + deep, from + wide, bytes);
  }
}

template <class T>
void interleave(const DepthToSpace3dParams& p, const DepthToSpace3dRow& row) {
  const index_t factor = p.factor[2];
  const T* from = static_cast<const T*>(p.from);
  T* to = static_cast<T*>(p.to);
  for (index_t k = 0; k < factor; ++k) {
    const index_t deep = row.deep + k * row.part, wide = row.wide + k;
    if (!p.to_depth)
      for (index_t w = 0; w < p.width; ++w) to[wide + w * factor] = from[deep + w];
    else if (row.dropped)
      for (index_t w = 0; w < p.width; ++w) to[deep + w] = T{};
    else
      for (index_t w = 0; w < p.width; ++w) to[deep + w] = from[wide + w * factor];
  }
}

}  // namespace

void depth_to_space3d_rows(const DepthToSpace3dParams& params, index_t begin, index_t end) {
  for (index_t r = begin; r < end; ++r) {
    const DepthToSpace3dRow row(params, r);
    if (row.dropped && !params.to_depth) continue;
    if (params.channels_last)
      runs(params, row);
    else if (params.element_bytes == 4)
      interleave<std::uint32_t>(params, row);
    else if (params.element_bytes == 2)
      interleave<std::uint16_t>(params, row);
    else if (params.element_bytes == 8)
      interleave<std::uint64_t>(params, row);
    else
      interleave<std::uint8_t>(params, row);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
