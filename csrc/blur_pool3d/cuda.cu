// blur_pool3d on CUDA: one thread 16 bytes of neighboring channels of the result, all taps at once.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Neighbors in a warp are neighboring channels; the inputs that several outputs read come from L2.
// Indices and taps are worked out once a thread, for eight 16-bit channels. Where channels do not
// fill 16 bytes a thread has one value. 4 x 4 x 4 taps at stride 2: 64 additions a value, about 150
// instructions: bound by issue, not by memory. Unmeasured.
#include "blur_pool3d/blur_pool3d.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"

namespace magvit_fast::cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kLoopThreads) filter_kernel(BlurPool3dParams p) {
  const index_t frames = p.axis[0].result, height = p.axis[1].result, width = p.axis[2].result;
  const index_t runs = p.channels / kCount, total = p.rows() * width * runs;
  for (index_t n = loop_begin(); n < total; n += loop_step()) {
    const index_t run = n % runs, position = n / runs, row = position / width;
    const index_t b = row / height / frames;
    const BlurReads along_t(p, 0, row / height % frames), along_h(p, 1, row % height);
    const BlurReads along_w(p, 2, position % width);
    float sum[kCount] = {};
    for (int i = 0; i < along_t.count; ++i)
      for (int j = 0; j < along_h.count; ++j) {
        const index_t first =
            ((b * p.axis[0].source + along_t.source[i]) * p.axis[1].source + along_h.source[j]) *
            p.axis[2].source;
        const float weight = along_t.weight[i] * along_h.weight[j];
        for (int k = 0; k < along_w.count; ++k) {
          const auto values =
              static_cast<const Run<T, kCount>*>(p.from)[(first + along_w.source[k]) * runs + run];
          const float each = weight * along_w.weight[k];
#pragma unroll
          for (int v = 0; v < kCount; ++v) sum[v] += each * static_cast<float>(values.value[v]);
        }
      }
    Run<T, kCount> result;
#pragma unroll
    for (int v = 0; v < kCount; ++v) result.value[v] = static_cast<T>(sum[v]);
    static_cast<Run<T, kCount>*>(p.to)[n] = result;
  }
}

}  // namespace

void blur_pool3d_filter(const BlurPool3dParams& params, const ExecContext& ctx) {
  check(params.count >= 1 && params.count <= kBlurMaxTaps, "blur_pool3d: 1 to 8 taps");
  const index_t total = params.rows() * params.axis[2].result * params.channels;
  with_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kRun = 16 / sizeof(T);
    if (params.channels % kRun == 0 && all_aligned_16(params.from, params.to))
      launch_loop(ctx, "blur_pool3d", total / kRun, filter_kernel<T, kRun>, params);
    else
      launch_loop(ctx, "blur_pool3d", total, filter_kernel<T, 1>, params);
  });
}

}  // namespace magvit_fast::cuda
