// The instructions of sm_90a that CUDA C++ has no word for: barriers that count bytes, box copies,
// warpgroup products, register hand-over. Previous hop: kernels sm90_*.cu. Next hop: PTX of sm_90a.
// The tests put an emulation of this file before it on the include path.
//
// Shared memory is named by its 32-bit address (shared_address in ptx.cuh). Kernels put their
// bodies under `if constexpr (MF_HAS_SM90A)`: other architectures compile them to nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda/ptx.cuh"
#include "common/cuda/tensor_map.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MF_HAS_SM90A 1
#else
#define MF_HAS_SM90A 0
#endif

namespace magvit_fast::cuda {

// Whether this build and this device run code for sm_90a.
inline bool has_sm90a(const ExecContext& ctx, const char* op) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ctx.device), op);
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ctx.device), op);
  return major == 9 && minor == 0 && std::strstr(MF_BUILT_CUDA_ARCHS, "90a") != nullptr;
}

#if MF_HAS_SM90A && defined(__CUDA_ARCH__)
#define MF_SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define MF_SM90A_ASM(...) ((void)0)
#endif

// --- barriers in shared memory
// -------------------------------------------------------------------- A phase ends when `arrivals`
// threads have arrived and every expected byte has come. Waiting for phase n is waiting for parity
// n & 1; before the first phase ends, parity 1 counts as done.
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  MF_SM90A_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, before __syncthreads: makes it visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  MF_SM90A_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
  MF_SM90A_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  MF_SM90A_ASM("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(std::uint32_t barrier, int bytes) {
  MF_SM90A_ASM("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int parity) {
  MF_SM90A_ASM(
      "{\n"
      ".reg .pred done;\n"
      "mf_again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra mf_through;\n"
      "bra mf_again;\n"
      "mf_through:\n"
      "}\n" ::"r"(barrier),
      "r"(parity) : "memory");
}
// Among `threads` threads of the block; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  MF_SM90A_ASM("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- box copies --------------------------------------------------------------------------------
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  MF_SM90A_ASM("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Reads a box; its bytes (all of them, zeros included) are counted by the barrier.
__device__ __forceinline__ void copy_box_in(std::uint32_t shared, const TensorMap* map,
                                            std::uint32_t barrier, int c, int w, int h, int t,
                                            int n) {
  MF_SM90A_ASM(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(t), "r"(n) : "memory");
}
__device__ __forceinline__ void copy_box_out(const TensorMap* map, std::uint32_t shared, int c,
                                             int w, int h, int t, int n) {
  MF_SM90A_ASM(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(c), "r"(w), "r"(h), "r"(t), "r"(n) : "memory");
}
__device__ __forceinline__ void copy_out_commit() {
  MF_SM90A_ASM("cp.async.bulk.commit_group;" :: : "memory");
}
// Until at most kPending of this thread's committed groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void copy_out_wait_read() {
  MF_SM90A_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all of this thread's groups have been written.
__device__ __forceinline__ void copy_out_wait() {
  MF_SM90A_ASM("cp.async.bulk.wait_group 0;" :: : "memory");
}
// Orders this thread's plain writes to shared memory before what the copy engine does after the
// next barrier.
__device__ __forceinline__ void copy_engine_fence() {
  MF_SM90A_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}

// --- registers and matrix stores
// ------------------------------------------------------------------
template <int kCount>
__device__ __forceinline__ void release_registers() {
  MF_SM90A_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void request_registers() {
  MF_SM90A_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Four 8x8 matrices of 16-bit elements, each written transposed: thread t holds of matrix i (row
// t / 4, columns 2 (t % 4), + 1); lane 8 i + j gives the address that column j is written to.
__device__ __forceinline__ void store_matrix_transposed(std::uint32_t row,
                                                        const std::uint32_t (&fragment)[4]) {
  MF_SM90A_ASM("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]) : "memory");
}
// Its inverse: thread t receives of matrix i (row t / 4, columns 2 (t % 4), + 1), where lane 8 i +
// j gives the address of column j.
__device__ __forceinline__ void load_matrix_transposed(std::uint32_t (&fragment)[4],
                                                       std::uint32_t row) {
#if MF_HAS_SM90A && defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
#endif
}

// --- warpgroup products: d (64 x kColumns) += a (64 x 16) b^T (kColumns x 16), all of shared
// memory Thread t of the warpgroup holds of d, for every 8 columns j, the elements 4 j + {0, 1} of
// row 16 (t / 32) + t % 32 / 4 and 4 j + {2, 3} of the row 8 below, at columns 8 j + 2 (t % 4) +
// {0, 1}.
__device__ __forceinline__ void product_begin() {
  MF_SM90A_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ __forceinline__ void product_commit() {
  MF_SM90A_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}
template <int kPending>
__device__ __forceinline__ void product_wait() {
  MF_SM90A_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler knows nothing of products under way: between the wait and the first use of the sums.
template <int kCount>
__device__ __forceinline__ void product_sums_ready(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MF_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MF_D16(d, i) MF_D4(d, i), MF_D4(d, i + 4), MF_D4(d, i + 8), MF_D4(d, i + 12)
#define MF_D64(d, i) MF_D16(d, i), MF_D16(d, i + 16), MF_D16(d, i + 32), MF_D16(d, i + 48)
#define MF_D32(d, i) MF_D16(d, i), MF_D16(d, i + 16)
#define MF_LIST_32                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MF_LIST_64                                                                          \
  MF_LIST_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MF_LIST_96                                                                          \
  MF_LIST_64                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MF_LIST_128                                                                            \
  MF_LIST_96                                                                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define MF_PRODUCT(shape, type, list, a, b, keep, major)                               \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep                                       \
  ", 0;\n"                                                                             \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, " a ", " b \
  ", keep, 1, 1, " major ";\n}\n"

// `keep` false: d is overwritten. Both operands K-major.
template <class T, int kColumns>
__device__ __forceinline__ void product(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b,
                                        bool keep) {
  static_assert(kColumns == 256 || kColumns == 128);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  [[maybe_unused]] const int kept = keep ? 1 : 0;
  if constexpr (kColumns == 256 && kBf16)
    MF_SM90A_ASM(MF_PRODUCT("m64n256k16", "bf16", MF_LIST_128, "%128", "%129", "%130",
                            "0, 0") : MF_D64(d, 0),
                 MF_D64(d, 64) : "l"(a), "l"(b), "r"(kept));
  else if constexpr (kColumns == 256)
    MF_SM90A_ASM(
        MF_PRODUCT("m64n256k16", "f16", MF_LIST_128, "%128", "%129", "%130", "0, 0") : MF_D64(d, 0),
        MF_D64(d, 64) : "l"(a), "l"(b), "r"(kept));
  else if constexpr (kBf16)
    MF_SM90A_ASM(MF_PRODUCT("m64n128k16", "bf16", MF_LIST_64, "%64", "%65", "%66", "0, 0") : MF_D64(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
  else
    MF_SM90A_ASM(MF_PRODUCT("m64n128k16", "f16", MF_LIST_64, "%64", "%65", "%66", "0, 0") : MF_D64(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
}

// Both operands MN-major (wgmma_descriptor_mn).
template <class T, int kColumns>
__device__ __forceinline__ void product_mn(float (&d)[kColumns / 2], std::uint64_t a,
                                           std::uint64_t b, bool keep) {
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 192);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  [[maybe_unused]] const int kept = keep ? 1 : 0;
  if constexpr (kColumns == 192 && kBf16)
    MF_SM90A_ASM(
        MF_PRODUCT("m64n192k16", "bf16", MF_LIST_96, "%96", "%97", "%98", "1, 1") : MF_D64(d, 0),
        MF_D32(d, 64) : "l"(a), "l"(b), "r"(kept));
  else if constexpr (kColumns == 192)
    MF_SM90A_ASM(
        MF_PRODUCT("m64n192k16", "f16", MF_LIST_96, "%96", "%97", "%98", "1, 1") : MF_D64(d, 0),
        MF_D32(d, 64) : "l"(a), "l"(b), "r"(kept));
  else if constexpr (kColumns == 128 && kBf16)
    MF_SM90A_ASM(MF_PRODUCT("m64n128k16", "bf16", MF_LIST_64, "%64", "%65", "%66", "1, 1") : MF_D64(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
  else if constexpr (kColumns == 128)
    MF_SM90A_ASM(MF_PRODUCT("m64n128k16", "f16", MF_LIST_64, "%64", "%65", "%66", "1, 1") : MF_D64(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
  else if constexpr (kBf16)
    MF_SM90A_ASM(MF_PRODUCT("m64n64k16", "bf16", MF_LIST_32, "%32", "%33", "%34", "1, 1") : MF_D32(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
  else
    MF_SM90A_ASM(MF_PRODUCT("m64n64k16", "f16", MF_LIST_32, "%32", "%33", "%34", "1, 1") : MF_D32(
                     d, 0) : "l"(a),
                 "l"(b), "r"(kept));
}
#undef MF_PRODUCT
#undef MF_LIST_128
#undef MF_LIST_96
#undef MF_LIST_64
#undef MF_LIST_32
#undef MF_D64
#undef MF_D32
#undef MF_D16
#undef MF_D4

}  // namespace magvit_fast::cuda
