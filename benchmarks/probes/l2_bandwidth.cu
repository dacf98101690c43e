// Probe: how fast all multiprocessors together read what the second-level cache holds.
// Previous hop: benchmarks/gpu_probes.py, which compiles and runs it.
// Next hop: none.
//
// Every block reads the whole buffer, 16 bytes a thread past the first-level cache, from a start of
// its own. Prints TB/s for buffers that fit (8 to 32 MB) and one that does not.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>

namespace {

constexpr int kThreads = 512, kUnroll = 8;

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

// `units` of 16 bytes, a multiple of kThreads * kUnroll; each block reads `share` of them.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* data, std::int64_t units, std::int64_t share, std::uint32_t* sink) {
  std::uint32_t sum = 0;
  const std::int64_t start = units / gridDim.x * blockIdx.x / kThreads * kThreads;
  for (std::int64_t i = 0; i < share; i += kThreads * kUnroll) {
    uint4 value[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      value[k] = __ldcg(data + (start + i + k * kThreads + threadIdx.x) % units);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) sum += value[k].x ^ value[k].y ^ value[k].z ^ value[k].w;
  }
  if (sum == 1) *sink = sum;  // never: the buffer is zero
}

double terabytes_a_second(const uint4* data, std::int64_t bytes, int blocks, std::uint32_t* sink) {
  const std::int64_t units = bytes / 16;
  const std::int64_t share = std::min<std::int64_t>(units, (std::int64_t{64} << 20) / 16);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 5; ++i) {
    check(cudaEventRecord(begin));
    read_kernel<<<static_cast<unsigned>(blocks), kThreads>>>(data, units, share, sink);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, begin, end));
    best = std::min(best, ms);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return static_cast<double>(share) * 16 * blocks / best / 1e9;
}

void run() {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  constexpr std::int64_t kMost = std::int64_t{2} << 30;
  void* data = nullptr;
  void* sink = nullptr;
  check(cudaMalloc(&data, kMost));
  check(cudaMemset(data, 0, kMost));
  check(cudaMalloc(&sink, 4));
  std::printf("{");
  for (const std::int64_t mib : {8, 16, 24, 32, 2048})
    std::printf("%s\"%lld MiB, TB/s\": %.2f", mib == 8 ? "" : ", ", static_cast<long long>(mib),
                terabytes_a_second(static_cast<const uint4*>(data), mib << 20, 4 * multiprocessors,
                                   static_cast<std::uint32_t*>(sink)));
  std::printf("}\n");
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
