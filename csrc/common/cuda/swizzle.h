// The 128-byte swizzle of shared memory, and the descriptors by which wgmma reads swizzled tiles.
// Previous hop: kernels for sm_90a (hopper.cuh).
// Next hop: none; host and device share it, tests/ops/test_causal_conv3d_sm90_plan.py holds it.
//
// A tile is rows of 128 bytes (64 elements of 16 bits) at a multiple of 1024 bytes. The copy engine
// stores the 16-byte piece c of row r at piece c ^ (r & 7), so that the same piece of eight rows
// lies in eight different groups of banks; wgmma undoes it, provided that the address bits which
// tell the row (7 to 9) are those of the tile.
#pragma once

#include "common/shape.h"

namespace magvit_fast::cuda {

constexpr int kSwizzleRowBytes = 128;    // one row of a tile
constexpr int kSwizzleAtomBytes = 1024;  // eight rows: the pattern's period and its alignment

MF_HOST_DEVICE constexpr std::uint32_t swizzle_128(std::uint32_t offset) {
  return offset ^ ((offset >> 3) & 0x70u);
}

// PTX ISA, "asynchronous warpgroup level matrix instructions: matrix descriptor". Bits 0-13:
// address / 16. 16-29: leading dimension / 16, which K-major swizzled tiles do not use (1 by
// convention). 32-45: stride dimension / 16, from eight rows to the next eight. 49-51: base offset,
// 0 as tiles start at a multiple of 1024. 62-63: 1 for the 128-byte swizzle. The start may advance
// along a row by 32 bytes (16 elements) from one k-slice to the next.
MF_HOST_DEVICE constexpr std::uint64_t wgmma_descriptor(std::uint32_t shared_address) {
  return static_cast<std::uint64_t>((shared_address & 0x3ffffu) >> 4) | std::uint64_t{1} << 16 |
         static_cast<std::uint64_t>(kSwizzleAtomBytes >> 4) << 32 | std::uint64_t{1} << 62;
}
constexpr std::uint64_t kWgmmaSlice = 32 >> 4;  // what a k-slice adds to a descriptor

// The same for an operand whose rows are what is summed over (MN-major: row k of the tile holds 64
// neighbors of the other index). Leading dimension: from 64 of them to the next 64. Stride
// dimension: from eight k to the next eight, 1024 bytes in a dense tile. `start` and `leading` are
// multiples of 1024; a k-slice of 16 adds 2048 bytes.
MF_HOST_DEVICE constexpr std::uint64_t wgmma_descriptor_mn(std::uint32_t start,
                                                           std::uint32_t leading) {
  return static_cast<std::uint64_t>((start & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(kSwizzleAtomBytes >> 4) << 32 | std::uint64_t{1} << 62;
}

}  // namespace magvit_fast::cuda
