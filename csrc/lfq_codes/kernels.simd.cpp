// lfq_codes, one source per instruction set: the bits of a range of indices as -1 / +1.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// The sign bit is all that differs between -1 and +1: code = one | (bit ? 0 : sign), in the type's
// own bits, so that no number is converted. Channels-first runs a block of positions through all
// channels. Channels-last shifts one index by another amount in each lane; vectors may reach into
// the next position's channels, which are written after.
#include "common/simd.h"
#include "lfq_codes/lfq_codes.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kBlock = 256;  // positions whose index words stay in L1

template <class U>
struct Codes {
  U minus, sign, nan;  // -1, its sign bit, and a quiet NaN
};

template <class U>
index_t run(const LfqCodesParams& p, Codes<U> codes, index_t begin, index_t end) {
  U* out = static_cast<U*>(p.codes);
  index_t first_bad = -1;
  for (index_t position = begin; position < end;) {
    const index_t o = position / p.inner, i = position % p.inner;
    index_t count = p.inner - i;
    if (count > end - position) count = end - position;
    if (count > kBlock) count = kBlock;
    const std::int64_t* indices = p.indices + position;
    U* to = out + o * p.channels * p.inner + i;
    std::uint64_t any_bad = 0;
    for (index_t k = 0; k < count; ++k) any_bad |= lfq_index_out_of_range(indices[k], p.channels);
    for (index_t c = 0; c < p.channels; ++c) {
      const int bit = lfq_bit(c, p.channels, p.msb_first);
      U* row = to + c * p.inner;
      for (index_t k = 0; k < count; ++k) {
        const U positive = static_cast<U>((static_cast<std::uint64_t>(indices[k]) >> bit) & 1u);
        row[k] = static_cast<U>(codes.minus ^ static_cast<U>(codes.sign * positive));
      }
    }
    if (any_bad)
      for (index_t k = 0; k < count; ++k)
        if (lfq_index_out_of_range(indices[k], p.channels)) {
          if (first_bad < 0) first_bad = position + k;
          for (index_t c = 0; c < p.channels; ++c) to[c * p.inner + k] = codes.nan;
        }
    position += count;
  }
  return first_bad;
}

inline void store_bits(std::uint32_t* to, vu bits) { store_as(to, bits); }
inline void store_bits(std::uint16_t* to, vu bits) {
  store_as(to, __builtin_convertvector(bits, vh));
}

// Channels-last: the channels of a position are adjacent.
template <class U>
index_t run_last(const LfqCodesParams& p, Codes<U> codes, index_t begin, index_t end) {
  constexpr int kSign = 8 * sizeof(U) - 1;
  const index_t channels = p.channels;
  vu lane;  // how far lane i's bit stands above the lowest of a vector
  for (int i = 0; i < kLanes; ++i)
    lane[i] = static_cast<std::uint32_t>(p.msb_first ? kLanes - 1 - i : i);
  index_t first_bad = -1;
  for (index_t position = begin; position < end; ++position) {
    const std::int64_t index = p.indices[position];
    U* to = static_cast<U*>(p.codes) + position * channels;
    if (lfq_index_out_of_range(index, channels)) {
      if (first_bad < 0) first_bad = position;
      for (index_t c = 0; c < channels; ++c) to[c] = codes.nan;
      continue;
    }
    const auto word = static_cast<std::uint64_t>(index);
    const index_t room = (end - position) * channels;  // of this thread, from `to` on
    for (index_t c = 0; c < channels; c += kLanes) {
      const index_t lowest = p.msb_first ? channels - c - kLanes : c;
      const auto part = static_cast<std::uint32_t>(lowest < 0 ? word << -lowest : word >> lowest);
      const vu positive = ((part - vu{}) >> lane) & 1u;
      const vu bits = (positive << kSign) ^ static_cast<std::uint32_t>(codes.minus);
      if (c + kLanes <= room) {
        store_bits(to + c, bits);
      } else {
        U last[kLanes];
        store_bits(last, bits);
        for (index_t i = c; i < channels; ++i) to[i] = last[i - c];
      }
    }
  }
  return first_bad;
}

template <class U>
index_t run_either(const LfqCodesParams& p, Codes<U> codes, index_t begin, index_t end) {
  return p.inner == 1 ? run_last<U>(p, codes, begin, end) : run<U>(p, codes, begin, end);
}

}  // namespace

index_t lfq_codes_range(const LfqCodesParams& params, index_t begin, index_t end) {
  switch (params.dtype) {
    case DType::f32:
      return run_either<std::uint32_t>(params, {0xbf800000u, 0x80000000u, 0x7fc00000u}, begin, end);
    case DType::bf16:
      return run_either<std::uint16_t>(params, {0xbf80, 0x8000, 0x7fc0}, begin, end);
    case DType::f16:
      return run_either<std::uint16_t>(params, {0xbc00, 0x8000, 0x7e00}, begin, end);
  }
  return -1;
}

}  // namespace MF_ISA
}  // namespace magvit_fast
