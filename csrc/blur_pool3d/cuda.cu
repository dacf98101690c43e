// blur_pool3d on CUDA: one thread a value of the result, all taps at once.
// Previous hop: bindings.cpp.
// Next hop: none.
//
// Neighbors in a warp are neighboring channels; the inputs that several outputs read come from L2.
#include "blur_pool3d/blur_pool3d.h"
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"

namespace magvit_fast::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) filter_kernel(BlurPool3dParams p) {
  const index_t frames = p.axis[0].result, height = p.axis[1].result, width = p.axis[2].result;
  const index_t total = p.rows() * width * p.channels;
  const index_t step = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t n = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; n < total;
       n += step) {
    const index_t c = n % p.channels, position = n / p.channels, row = position / width;
    const index_t b = row / height / frames;
    const BlurReads along_t(p, 0, row / height % frames), along_h(p, 1, row % height);
    const BlurReads along_w(p, 2, position % width);
    float sum = 0.0f;
    for (int i = 0; i < along_t.count; ++i)
      for (int j = 0; j < along_h.count; ++j) {
        const index_t first =
            ((b * p.axis[0].source + along_t.source[i]) * p.axis[1].source + along_h.source[j]) *
            p.axis[2].source;
        const float weight = along_t.weight[i] * along_h.weight[j];
        for (int k = 0; k < along_w.count; ++k)
          sum += weight * along_w.weight[k] *
                 static_cast<float>(
                     static_cast<const T*>(p.from)[(first + along_w.source[k]) * p.channels + c]);
      }
    static_cast<T*>(p.to)[n] = static_cast<T>(sum);
  }
}

}  // namespace

void blur_pool3d_filter(const BlurPool3dParams& params, const ExecContext& ctx) {
  check(params.count >= 1 && params.count <= kBlurMaxTaps, "blur_pool3d: 1 to 8 taps");
  const index_t total = params.rows() * params.axis[2].result * params.channels;
  if (total == 0) return;
  const DeviceGuard guard(ctx, "blur_pool3d");
  with_type(params.dtype, [&](auto type) {
    launch(guard, ctx, filter_kernel<decltype(type)>, blocks_for(total, kThreads), kThreads, 0,
           params);
  });
  guard.finish();
}

}  // namespace magvit_fast::cuda
