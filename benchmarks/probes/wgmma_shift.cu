// Probe: whether wgmma reads rows that start off the pattern of the 128-byte swizzle, and in
// pitches. Previous hop: benchmarks/gpu_probes.py, which compiles and runs it (and a test, on the
// emulator). Next hop: common/cuda/hopper.cuh.
//
// A halo kernel keeps a tile of pixels and its border in shared memory once, and lets each tap
// start its operand at another pixel. That rests on how the unit finds row r of an operand: if it
// permutes 16-byte pieces by the bits of the final address, any start is right; if it counts rows
// from the start, the descriptor's base offset or planes without a swizzle must make up for it.
// Prints the number of wrong elements of each way; an argument
// leaves only what the emulator of the tests takes.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/cuda/hopper.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/swizzle.h"

namespace magvit_fast::cuda {
namespace {

constexpr int kChannels = 64, kPixels = 128, kRows = 320;  // of the halo
constexpr int kPlane = (kRows + 1) * 16;                   // bytes of one 16-byte piece of all rows
constexpr int kSharedBytes = kSwizzleAtomBytes * 2 + 64 * kSwizzleRowBytes + 8 * kPlane;

enum class Way { by_address, base_offset, planes };

struct Case {
  Way way;
  int first, pitch;  // row of pixel 0; rows from eight pixels to the next eight
};

MF_HOST_DEVICE int left_value(int m, int k) { return (m * 7 + k * 3) % 5 - 2; }
MF_HOST_DEVICE int right_value(int row, int k) { return (row * 13 + k * 11 + row / 7) % 7 - 3; }

__device__ std::uint64_t pixels_descriptor(const Case& c, std::uint32_t halo) {
  const bool planes = c.way == Way::planes;
  const std::uint32_t row_bytes = planes ? 16 : kSwizzleRowBytes;
  const std::uint32_t start = halo + static_cast<std::uint32_t>(c.first) * row_bytes;
  const std::uint64_t leading = planes ? kPlane >> 4 : 1;
  const std::uint64_t stride = static_cast<std::uint64_t>(c.pitch) * row_bytes >> 4;
  const std::uint64_t offset = c.way == Way::base_offset ? static_cast<unsigned>(c.first) % 8 : 0;
  return static_cast<std::uint64_t>((start & 0x3ffffu) >> 4) | leading << 16 | stride << 32 |
         offset << 49 | std::uint64_t{planes ? 0u : 1u} << 62;
}

__global__ void __launch_bounds__(128) probe_kernel(Case c, float* out) {
  if constexpr (MF_HAS_SM90A) {
    unsigned char* shared = dynamic_shared();
    shared +=
        round_up(shared_address(shared), std::uint32_t{kSwizzleAtomBytes}) - shared_address(shared);
    unsigned char* halo = shared + 64 * kSwizzleRowBytes;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < 64 * kChannels; i += 128) {
      const int m = i / kChannels, k = i % kChannels;
      const std::uint32_t at =
          swizzle_128(static_cast<std::uint32_t>(m * kSwizzleRowBytes + k * 2));
      *reinterpret_cast<__nv_bfloat16*>(shared + at) =
          __nv_bfloat16(static_cast<float>(left_value(m, k)));
    }
    for (int i = thread; i < kRows * kChannels; i += 128) {
      const int row = i / kChannels, k = i % kChannels;
      const std::uint32_t at =
          c.way == Way::planes
              ? static_cast<std::uint32_t>(k / 8 * kPlane + row * 16 + k % 8 * 2)
              : swizzle_128(static_cast<std::uint32_t>(row * kSwizzleRowBytes + k * 2));
      *reinterpret_cast<__nv_bfloat16*>(halo + at) =
          __nv_bfloat16(static_cast<float>(right_value(row, k)));
    }
    copy_engine_fence();
    __syncthreads();
    const std::uint64_t left = wgmma_descriptor(shared_address(shared));
    const std::uint64_t right = pixels_descriptor(c, shared_address(halo));
    const std::uint64_t slice = c.way == Way::planes ? 2 * (kPlane >> 4) : kWgmmaSlice;
    float sum[kPixels / 2];
    product_sums_ready(sum);
    product_begin();
#pragma unroll
    for (int k = 0; k < kChannels / 16; ++k)
      product<__nv_bfloat16, kPixels>(sum, left + k * kWgmmaSlice, right + k * slice, k > 0);
    product_commit();
    product_wait<0>();
    product_sums_ready(sum);
    const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kPixels / 2; ++i)
      out[(row + i % 4 / 2 * 8) * kPixels + i / 4 * 8 + thread % 4 * 2 + i % 2] = sum[i];
  }
}

// Elements of 64 x 128 that differ from the sum over channels, which is exact in float32.
int wrong_elements(const Case& c, float* device_out, const DeviceGuard& guard,
                   const ExecContext& ctx) {
  launch(guard, ctx, probe_kernel, dim3(1), 128, kSharedBytes, c, device_out);
  std::vector<float> out(64 * kPixels);
  check_cuda(cudaMemcpy(out.data(), device_out, out.size() * sizeof(float), cudaMemcpyDeviceToHost),
             guard.op());
  int wrong = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kPixels; ++n) {
      const int row = c.first + n / 8 * c.pitch + n % 8;
      int sum = 0;
      for (int k = 0; k < kChannels; ++k) sum += left_value(m, k) * right_value(row, k);
      wrong += out[static_cast<std::size_t>(m * kPixels + n)] != static_cast<float>(sum);
    }
  return wrong;
}

void run(bool emulated) {
  const ExecContext ctx{};
  const DeviceGuard guard(ctx, "wgmma_shift");
  float* out = nullptr;
  check_cuda(cudaMalloc(reinterpret_cast<void**>(&out), 64 * kPixels * sizeof(float)), guard.op());
  const char* names[] = {"by address", "base offset", "planes without swizzle"};
  std::printf("{");
  bool comma = false;
  for (int way = 0; way < (emulated ? 1 : 3); ++way)
    for (const int pitch : {8, 10, 18}) {
      if (emulated && pitch != 8) continue;
      for (const int first : {0, 1, 2, 3, 7, 8, 18, 19, 20}) {
        const int wrong = wrong_elements({static_cast<Way>(way), first, pitch}, out, guard, ctx);
        std::printf("%s\"%s, eights %d rows apart, start %d\": %d", comma ? ", " : "", names[way],
                    pitch, first, wrong);
        comma = true;
      }
    }
  std::printf("}\n");
  check_cuda(cudaFree(out), guard.op());
}

}  // namespace
}  // namespace magvit_fast::cuda

int main(int count, char**) {
  try {
    magvit_fast::cuda::run(count > 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
