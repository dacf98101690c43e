// The instructions of csrc/common/cuda/hopper.cuh, written after the PTX manual.
// Previous hop: kernels for sm_90a, which include "common/cuda/hopper.cuh" and find this one first.
// Next hop: emulator.h.
//
// Box copies happen at some moment after they are asked for, products at some moment before they
// are waited for: a stage that is read too early or overwritten too early shows as a wrong result.
#pragma once

#include <vector>

#include "common/cuda/ptx.cuh"
#include "common/cuda/tensor_map.h"

#define MF_HAS_SM90A 1

namespace magvit_fast::cuda {

inline bool has_sm90a(const ExecContext&, const char*) { return true; }

// --- barriers: arrivals of a phase, what is pending of them, bytes still to come, the phase's
// parity
struct EmulatedBarrier {
  std::uint8_t arrivals, pending;
  std::uint16_t parity;
  std::int32_t bytes;
};
static_assert(sizeof(EmulatedBarrier) == 8);

inline EmulatedBarrier& barrier_at(std::uint32_t barrier) {
  return *reinterpret_cast<EmulatedBarrier*>(::emulator::shared_pointer(barrier, 8, 8));
}
inline void settle(EmulatedBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.pending = b.arrivals;
}
inline void barrier_init(std::uint32_t barrier, int arrivals) {
  const auto count = static_cast<std::uint8_t>(arrivals);
  barrier_at(barrier) = {count, count, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(std::uint32_t barrier) {
  EmulatedBarrier& b = barrier_at(barrier);
  if (b.pending == 0) ::emulator::fail("emulator: more arrivals at a barrier than it was made for");
  --b.pending;
  settle(b);
}
inline void barrier_arrive_expecting(std::uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(std::uint32_t barrier, int parity) {
  ::emulator::wait_until([=] { return barrier_at(barrier).parity != parity; });
}
inline void named_barrier(int id, int threads) { ::emulator::named_barrier(id, threads); }

// --- box copies
// visit(address in the swizzled tile, offset in the tensor or -1) for every 8 channels of a box
template <class Visit>
void for_each_of_box(const TensorView& view, std::uint32_t shared, const int (&at)[5],
                     const Visit& visit) {
  if (shared % 1024 != 0)
    ::emulator::fail("emulator: a swizzled tile off a multiple of 1024 bytes");
  if (at[0] % 8 != 0 || view.size[0] % 8 != 0 || view.box[0] != 64)
    ::emulator::fail("emulator: boxes are rows of 64 channels, tensors have channels in eights");
  int i[5];
  std::uint32_t linear = shared;
  for (i[4] = 0; i[4] < view.box[4]; ++i[4])
    for (i[3] = 0; i[3] < view.box[3]; ++i[3])
      for (i[2] = 0; i[2] < view.box[2]; ++i[2])
        for (i[1] = 0; i[1] < view.box[1]; ++i[1]) {
          index_t offset = at[0];
          bool inside = true;
          for (int d = 1; d < 5; ++d) {
            inside = inside && at[d] + i[d] >= 0 && at[d] + i[d] < view.size[d];
            offset += (at[d] + i[d]) * view.stride[d];
          }
          for (int c = 0; c < 64; c += 8, linear += 16) {
            const bool here = inside && at[0] + c >= 0 && at[0] + c < view.size[0];
            visit(linear ^ ((linear >> 7 & 7u) << 4), here ? offset + c : -1);
          }
        }
}
inline int box_bytes(const TensorView& view) {
  return 2 * view.box[0] * view.box[1] * view.box[2] * view.box[3] * view.box[4];
}
inline void prefetch_map(const TensorMap*) {}
inline void copy_box_in(std::uint32_t shared, const TensorMap* map, std::uint32_t barrier, int c,
                        int w, int h, int t, int n) {
  const TensorView view = map->view;
  ::emulator::shared_pointer(shared, static_cast<std::uint32_t>(box_bytes(view)), 1024);
  ::emulator::later(false, [=] {
    const int at[5] = {c, w, h, t, n};
    const auto* base = static_cast<const std::uint16_t*>(view.base);
    for_each_of_box(view, shared, at, [&](std::uint32_t address, index_t offset) {
      unsigned char* to = ::emulator::shared_pointer(address, 16, 16);
      offset < 0 ? std::memset(to, 0, 16) : std::memcpy(to, base + offset, 16);
    });
    ::emulator::shared_changed(shared, static_cast<std::uint32_t>(box_bytes(view)));
    EmulatedBarrier& b = barrier_at(barrier);
    b.bytes -= box_bytes(view);
    settle(b);
  });
}
inline void copy_box_out(const TensorMap* map, std::uint32_t shared, int c, int w, int h, int t,
                         int n) {
  const TensorView view = map->view;
  ::emulator::shared_pointer(shared, static_cast<std::uint32_t>(box_bytes(view)), 1024);
  ::emulator::demand_fenced();
  ::emulator::later(true, [=] {
    const int at[5] = {c, w, h, t, n};
    auto* base = static_cast<std::uint16_t*>(const_cast<void*>(view.base));
    for_each_of_box(view, shared, at, [&](std::uint32_t address, index_t offset) {
      if (offset >= 0) std::memcpy(base + offset, ::emulator::shared_pointer(address, 16, 16), 16);
    });
  });
}
inline void copy_out_commit() { ::emulator::bulk_commit(); }
template <int kPending>
inline void copy_out_wait_read() {
  ::emulator::bulk_wait(kPending);
}
inline void copy_out_wait() { ::emulator::bulk_wait(0); }
inline void copy_engine_fence() { ::emulator::fence_shared(); }

// --- registers and matrix stores
template <int kCount>
inline void release_registers() {}
template <int kCount>
inline void request_registers() {}
inline void store_matrix_transposed(std::uint32_t row, const std::uint32_t (&fragment)[4]) {
  struct Operand {
    std::uint32_t row, fragment[4];
  } mine{row, {fragment[0], fragment[1], fragment[2], fragment[3]}};
  const auto* table = ::emulator::warp_exchange(0xffffffffu, &mine, sizeof(mine));
  const int lane = ::emulator::lane(), matrix = lane / 8, column = lane % 8;
  unsigned banks = 0;
  for (int i = 0; i < 8; ++i)
    banks |= 1u << (::emulator::warp_read<Operand>(table, matrix * 8 + i).row / 16 % 8);
  if (banks != 0xffu) ::emulator::fail("emulator: a matrix store with bank conflicts");
  std::uint16_t written[8];
  for (int i = 0; i < 8; ++i) {
    const auto from = ::emulator::warp_read<Operand>(table, i * 4 + column / 2);
    written[i] = static_cast<std::uint16_t>(from.fragment[matrix] >> (16 * (column % 2)));
  }
  std::memcpy(::emulator::shared_pointer(row, 16, 16), written, 16);
  ::emulator::wrote_shared(row, 16);
}

inline void load_matrix_transposed(std::uint32_t (&fragment)[4], std::uint32_t row) {
  load_matrix_transposed(fragment, ::emulator::shared_pointer(row, 16, 16));
}

// --- warpgroup products
inline void product_begin() {}
inline void product_commit() { ::emulator::product_commit(); }
template <int kPending>
inline void product_wait() {
  ::emulator::product_wait(kPending);
}
template <int kCount>
inline void product_sums_ready(float (&)[kCount]) {}

// Where a descriptor puts elements, after the manual's table of canonical layouts: index i of the
// rows (columns) of the result and k of the sum, before the swizzle.
//   K-major   ((8, m), 16): ((128 bytes, stride), 2 bytes), inside of a row of 128 bytes
//   MN-major  ((64, m), (8, 2)): ((2 bytes, leading), (128 bytes, stride))
struct Descriptor {
  std::uint32_t start, leading, stride;
  bool mn_major;

  Descriptor(std::uint64_t bits, bool mn_major_) : mn_major(mn_major_) {
    if ((bits >> 62) != 1 || (bits >> 49 & 7) != 0)
      ::emulator::fail("emulator: a descriptor other than of a 128-byte swizzle from its start");
    start = static_cast<std::uint32_t>(bits & 0x3fff) << 4;
    leading = static_cast<std::uint32_t>(bits >> 16 & 0x3fff) << 4;
    stride = static_cast<std::uint32_t>(bits >> 32 & 0x3fff) << 4;
    // Off the period of the swizzle, the base offset would have to say so.
    if (stride % 1024 != 0 || (mn_major && (start % 1024 != 0 || leading % 1024 != 0)))
      ::emulator::fail("emulator: a descriptor off the period of the swizzle");
  }
  std::uint32_t at(std::uint32_t i, std::uint32_t k) const {
    if (mn_major) return start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128;
    return start + i / 8 * stride + i % 8 * 128 + k * 2;
  }
};

// 16 elements of each of `rows`, widened, [16][rows].
template <class T>
std::vector<float> operand(const Descriptor& descriptor, int rows) {
  std::vector<float> values(static_cast<std::size_t>(rows) * 16);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < 16; ++k) {
      const std::uint32_t plain =
          descriptor.at(static_cast<std::uint32_t>(r), static_cast<std::uint32_t>(k));
      T value;
      std::memcpy(&value, ::emulator::shared_pointer(plain ^ ((plain >> 7 & 7u) << 4), 2, 2), 2);
      values[static_cast<std::size_t>(k * rows + r)] = static_cast<float>(value);
    }
  return values;
}

// The whole 64 x kColumns product, kept for the other threads of the warpgroup until what it was
// made of changes.
template <class T, int kColumns, bool kMnMajor>
__attribute__((optimize("O3"))) const float* whole_product(std::uint64_t a, std::uint64_t b) {
  struct Kept {
    std::uint64_t a = 0, b = 0;
    unsigned long version = 0;
    std::vector<float> values;
  };
  static Kept cache[32];
  static unsigned next = 0;
  const Descriptor of_a(a, kMnMajor), of_b(b, kMnMajor);
  const auto version_of = [](const Descriptor& d, std::uint32_t rows) {
    const std::uint32_t first = d.start & ~1023u;
    return ::emulator::shared_version(first, d.at(rows - 1, 15) - first);
  };
  const unsigned long version_a = version_of(of_a, 64), version_b = version_of(of_b, kColumns);
  const unsigned long version = version_a > version_b ? version_a : version_b;
  for (const Kept& kept : cache)
    if (kept.a == a && kept.b == b && kept.version == version) return kept.values.data();
  const std::vector<float> left = operand<T>(of_a, 64), right = operand<T>(of_b, kColumns);
  Kept& kept = cache[next++ % 32];
  kept.a = a, kept.b = b, kept.version = version;
  kept.values.assign(64 * kColumns, 0.0f);
  for (int row = 0; row < 64; ++row) {
    float* to = kept.values.data() + row * kColumns;
    for (int k = 0; k < 16; ++k) {
      const float x = left[static_cast<std::size_t>(k * 64 + row)];
      const float* y = right.data() + k * kColumns;
      for (int column = 0; column < kColumns; ++column) to[column] += x * y[column];
    }
  }
  return kept.values.data();
}

template <class T, int kColumns, bool kMnMajor>
inline void any_product(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool keep) {
  const int thread = ::emulator::thread() % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  float* sums = d;
  ::emulator::product([=] {
    const float* whole = whole_product<T, kColumns, kMnMajor>(a, b);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int r = row + (i % 4 >= 2 ? 8 : 0), c = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums[i] = (keep ? sums[i] : 0.0f) + whole[r * kColumns + c];
    }
  });
}
template <class T, int kColumns>
inline void product(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool keep) {
  any_product<T, kColumns, false>(d, a, b, keep);
}
template <class T, int kColumns>
inline void product_mn(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool keep) {
  any_product<T, kColumns, true>(d, a, b, keep);
}

}  // namespace magvit_fast::cuda
