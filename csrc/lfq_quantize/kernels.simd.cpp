// lfq_quantize, one source per instruction set: signs and packed bits of a range of positions.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// One pass: z is read once, quantized and indices are written once. Channels-last runs position by
// position, a vector of channels at a time, whose comparison is bits of the index already;
// channels-first runs a block of positions through all channels, so that both directions touch
// memory in order.
#include "common/simd_math.h"
#include "lfq_quantize/lfq_quantize.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kBlock = 256;  // positions whose index words stay in L1

// The lowest `count` bits in the opposite order.
inline std::uint64_t reversed(std::uint64_t x, index_t count) {
  x = ((x >> 1) & 0x5555555555555555u) | ((x & 0x5555555555555555u) << 1);
  x = ((x >> 2) & 0x3333333333333333u) | ((x & 0x3333333333333333u) << 2);
  x = ((x >> 4) & 0x0f0f0f0f0f0f0f0fu) | ((x & 0x0f0f0f0f0f0f0f0fu) << 4);
  return __builtin_bswap64(x) >> (64 - count);
}

// A position whose channels are adjacent: writes their signs, returns the index.
template <class T>
inline std::int64_t adjacent(const T* z, T* q, index_t channels, bool msb_first) {
  std::uint64_t word = 0;
  const auto signs = [&](vf x, index_t c) {
    const vi positive = x > 0.0f;
    word |= static_cast<std::uint64_t>(lane_bits(positive)) << c;
    return select(positive, splat(1.0f), splat(-1.0f));
  };
  index_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(q + c, signs(load(z + c), c));
  if (c < channels && channels > kLanes) {  // a last vector over the end of the one before
    c = channels - kLanes;
    store(q + c, signs(load(z + c), c));
  } else if (c < channels) {  // the missing lanes are zero, not positive
    const int rest = static_cast<int>(channels - c);
    store_some(q + c, signs(load_some(z + c, rest), c), rest);
  }
  return static_cast<std::int64_t>(msb_first ? reversed(word, channels) : word);
}

template <class T>
void run(const LfqQuantizeParams& p, index_t begin, index_t end) {
  const T* z = static_cast<const T*>(p.z);
  T* q = static_cast<T*>(p.quantized);
  const T plus = from_float<T>(1.0f), minus = from_float<T>(-1.0f);
  index_t position = begin;
  while (position < end) {
    const index_t o = position / p.inner, i = position % p.inner;
    index_t count = p.inner - i;
    if (count > end - position) count = end - position;
    if (count > kBlock) count = kBlock;
    const index_t base = o * p.outer_stride + i * p.inner_stride;
    std::int64_t* out = p.indices + position;
    if (p.inner_stride == 1) {
      std::int64_t words[kBlock] = {};
      for (index_t c = 0; c < p.channels; ++c) {
        const T* zc = z + base + c * p.channel_stride;
        T* qc = q + base + c * p.channel_stride;
        const int bit = lfq_bit(c, p.channels, p.msb_first);
        for (index_t k = 0; k < count; ++k) {
          const bool positive = to_float(zc[k]) > 0.0f;
          qc[k] = positive ? plus : minus;
          words[k] |= static_cast<std::int64_t>(positive) << bit;
        }
      }
      std::memcpy(out, words, sizeof(std::int64_t) * static_cast<std::size_t>(count));
    } else if (p.channel_stride == 1) {
      for (index_t k = 0; k < count; ++k) {
        const index_t offset = base + k * p.inner_stride;
        out[k] = adjacent(z + offset, q + offset, p.channels, p.msb_first);
      }
    } else {
      for (index_t k = 0; k < count; ++k) {
        const index_t offset = base + k * p.inner_stride;
        std::int64_t word = 0;
        for (index_t c = 0; c < p.channels; ++c) {
          const bool positive = to_float(z[offset + c * p.channel_stride]) > 0.0f;
          q[offset + c * p.channel_stride] = positive ? plus : minus;
          word |= static_cast<std::int64_t>(positive) << lfq_bit(c, p.channels, p.msb_first);
        }
        out[k] = word;
      }
    }
    position += count;
  }
}

}  // namespace

void lfq_quantize_range(const LfqQuantizeParams& params, index_t begin, index_t end) {
  switch (params.dtype) {
    case DType::f32:
      return run<float>(params, begin, end);
    case DType::bf16:
      return run<bf16_t>(params, begin, end);
    case DType::f16:
      return run<f16_t>(params, begin, end);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
