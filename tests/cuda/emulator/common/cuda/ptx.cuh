// The instructions of csrc/common/cuda/ptx.cuh, written after the PTX manual's tables of fragments.
// Previous hop: the kernels, which include "common/cuda/ptx.cuh" and find this one first.
// Next hop: emulator.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace magvit_fast::cuda {

inline unsigned char* dynamic_shared() { return ::emulator::dynamic_shared(); }
inline std::uint32_t shared_address(const void* p) { return ::emulator::shared_address(p); }

inline void check_aligned(const void* p, unsigned bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0)
    ::emulator::fail("emulator: a misaligned address of an asynchronous copy or a matrix load");
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  check_aligned(shared, 16);
  if (valid) check_aligned(global, 16);
  ::emulator::copy_async(shared, global, 16, valid);
}
inline void copy_async_8(void* shared, const void* global, bool valid) {
  check_aligned(shared, 8);
  if (valid) check_aligned(global, 8);
  ::emulator::copy_async(shared, global, 8, valid);
}
inline void copy_async_commit() { ::emulator::copy_commit(); }
template <int kStillPending>
inline void copy_async_wait() {
  ::emulator::copy_wait(kStillPending);
}

inline std::uint32_t pack_half_pair(float first, float second) {
  const __half pair[2] = {first, second};
  std::uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

// ldmatrix: lanes 8i..8i+7 give the rows of matrix i; thread t receives the pair (row t/4, columns
// 2(t%4), +1) of each, or of the transposed matrix.
inline void load_matrix_x4(std::uint32_t (&fragment)[4], const void* row, bool transposed) {
  check_aligned(row, 16);
  const auto* table = ::emulator::warp_exchange(0xffffffffu, &row, sizeof(row));
  const int lane = ::emulator::lane();
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;  // groups of four banks that the eight rows of this matrix lie in
    for (int r = 0; r < 8; ++r)
      banks |= 1u << (reinterpret_cast<std::uintptr_t>(
                          ::emulator::warp_read<const void*>(table, m * 8 + r)) /
                      16 % 8);
    if (banks != 0xffu) ::emulator::fail("emulator: a matrix load with bank conflicts");
    std::uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int fixed = lane / 4, running = 2 * (lane % 4) + j;
      const int r = transposed ? running : fixed, c = transposed ? fixed : running;
      const auto* source = ::emulator::warp_read<const std::uint16_t*>(table, m * 8 + r);
      pair[j] = source[c];
    }
    std::memcpy(&fragment[m], pair, 4);
  }
}
inline void load_matrix(std::uint32_t (&fragment)[4], const void* row) {
  load_matrix_x4(fragment, row, false);
}
inline void load_matrix_transposed(std::uint32_t (&fragment)[4], const void* row) {
  load_matrix_x4(fragment, row, true);
}

// mma.m16n8k16, A row-major, B column-major, float32 accumulators.
template <class T>
inline void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
  struct Operand {
    std::uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  static_assert(sizeof(Operand) <= ::emulator::kSlotBytes);
  const auto* table = ::emulator::warp_exchange(0xffffffffu, &mine, sizeof(mine));
  const int lane = ::emulator::lane();
  const auto half_of = [](std::uint32_t word, int which) {
    T value;
    const std::uint16_t bits = static_cast<std::uint16_t>(word >> (16 * which));
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + (i & 1);
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      // A: register 0 rows 0-7 k 0-7, 1: rows 8-15 k 0-7, 2: rows 0-7 k 8-15, 3: rows 8-15 k 8-15.
      const auto a_of = ::emulator::warp_read<Operand>(table, row % 8 * 4 + k % 8 / 2);
      const auto b_of = ::emulator::warp_read<Operand>(table, column * 4 + k % 8 / 2);
      sum += half_of(a_of.a[(row >= 8) + 2 * (k >= 8)], k & 1) * half_of(b_of.b[k >= 8], k & 1);
    }
    d[i] += sum;
  }
}

}  // namespace magvit_fast::cuda
