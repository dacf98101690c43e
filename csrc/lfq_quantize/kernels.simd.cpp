// lfq_quantize, one source per instruction set: signs and packed bits of a range of positions.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// One pass: z is read once, quantized and indices are written once. Channels-last runs position by
// position; channels-first runs a block of positions through all channels, so that both directions
// touch memory in order.
#include "common/simd.h"
#include "lfq_quantize/lfq_quantize.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kBlock = 256;  // positions whose index words stay in L1

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
