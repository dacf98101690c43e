// blur_pool3d, one source per instruction set: rows of the filtered and subsampled tensor.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// All taps of the three axes at once, in float32: with stride 2 that is 27 multiply-adds for 8
// values read from memory (the transpose: 3.4 a value written), below what the memory allows; the
// rows that several outputs read stay in cache. So no pass over a half-filtered tensor is worth it.
#include "blur_pool3d/blur_pool3d.h"
#include "common/simd.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr int kTile = 4;  // vectors of channels whose sums stay in registers

template <class T>
struct Reads {
  const T* from[kBlurMaxTaps * kBlurMaxTaps * kBlurMaxTaps];
  float weight[kBlurMaxTaps * kBlurMaxTaps * kBlurMaxTaps];
  int count;
};

template <int kVectors, class T>
inline void add_up(const Reads<T>& reads, index_t c, T* to) {
  vf sum[kVectors] = {};
  for (int i = 0; i < reads.count; ++i) {
    const T* from = reads.from[i] + c;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += load(from + v * kLanes) * reads.weight[i];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(to + c + v * kLanes, sum[v]);
}

template <class T>
void run(const BlurPool3dParams& p, index_t begin, index_t end) {
  const index_t channels = p.channels, width = p.axis[2].result;
  const index_t frames = p.axis[0].result, height = p.axis[1].result;
  Reads<T> reads;
  for (index_t row = begin; row < end; ++row) {
    const index_t b = row / height / frames;
    const BlurReads along_t(p, 0, row / height % frames), along_h(p, 1, row % height);
    for (index_t w = 0; w < width; ++w) {
      const BlurReads along_w(p, 2, w);
      reads.count = 0;
      for (int i = 0; i < along_t.count; ++i)
        for (int j = 0; j < along_h.count; ++j) {
          const index_t first =
              ((b * p.axis[0].source + along_t.source[i]) * p.axis[1].source + along_h.source[j]) *
              p.axis[2].source;
          const float weight = along_t.weight[i] * along_h.weight[j];
          for (int k = 0; k < along_w.count; ++k) {
            reads.from[reads.count] =
                static_cast<const T*>(p.from) + (first + along_w.source[k]) * channels;
            reads.weight[reads.count++] = weight * along_w.weight[k];
          }
        }
      T* to = static_cast<T*>(p.to) + (row * width + w) * channels;
      index_t c = 0;
      for (; c + kTile * kLanes <= channels; c += kTile * kLanes) add_up<kTile>(reads, c, to);
      for (; c + kLanes <= channels; c += kLanes) add_up<1>(reads, c, to);
      if (c == channels) continue;
      const int rest = static_cast<int>(channels - c);
      vf sum{};
      for (int i = 0; i < reads.count; ++i)
        sum += load_some(reads.from[i] + c, rest) * reads.weight[i];
      store_some(to + c, sum, rest);
    }
  }
}

}  // namespace

void blur_pool3d_rows(const BlurPool3dParams& params, index_t begin, index_t end) {
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
