// Products of a warpgroup's 64 rows on Hopper's tensor cores (wgmma, sm_90a), and what they do on the host.
//
// B, and A where it is not in registers, are chunks of rows of 128 bytes (64 numbers of the summed dimension)
// swizzled as tucker2/plan.h says; a step takes 16 of the 64. Results lie as mma.cuh describes, warp w
// holding rows 16 w to 16 w + 15: d[4 j + i] belongs to columns 8 j to 8 j + 7.
#pragma once

#include "common/mma.cuh"

namespace fastrank {

// The operand that begins at `chunk`, 16 * `step` numbers into its rows. Both must be the same in a warp.
__device__ __forceinline__ uint64_t operand(const void* chunk, int step) {
  const uint64_t address = shared_address(chunk) + 32 * static_cast<uint32_t>(step);
  // Address and strides count 16 bytes: 8 rows are 1024 bytes apart; bit 62 names the 128-byte swizzle.
  return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before the first product, and after registers of one were written otherwise.
__device__ __forceinline__ void products_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void products_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` groups of products are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#ifndef __CUDACC__
namespace host {

// Number k of row `row` of an operand in shared memory.
template <typename T>
float element(uint64_t operand, int row, int k) {
  const uint32_t start = static_cast<uint32_t>(operand & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4;
  if (operand >> 62 != 1) throw std::runtime_error("the host build knows the 128-byte swizzle only");
  const uint32_t plain = start + row / 8 * stride + row % 8 * 128 + 2 * k;
  Pack<T, 1> value;
  std::memcpy(&value, block().shared() + (plain ^ (plain >> 7 & 7) << 4), sizeof(value));
  return to_float(value.at[0]);
}

template <typename T, int N>
void multiply(float (&d)[N / 2], const float (&upper)[16], const float (&lower)[16], uint64_t b) {
  for (int j = 0; j < N / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      float high = d[4 * j + c], low = d[4 * j + 2 + c];
      for (int k = 0; k < 16; ++k) {
        const float value = element<T>(b, 8 * j + lane() % 4 * 2 + c, k);
        high += upper[k] * value, low += lower[k] * value;
      }
      d[4 * j + c] = high, d[4 * j + 2 + c] = low;
    }
  }
}

}  // namespace host
#endif

// d (64 x N) += A B^T over 16 numbers of the summed dimension, with A from registers or from shared memory,
// where warp w reads rows 16 w to 16 w + 15.
template <typename T, int N>
struct Products;

#ifdef __CUDACC__

// The lists of operands of an instruction: accumulators in the assembler's text and in the compiler's.
#define FASTRANK_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTRANK_TEXT_32 \
  FASTRANK_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTRANK_TEXT_48 \
  FASTRANK_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTRANK_TEXT_64 \
  FASTRANK_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTRANK_TEXT_80 \
  FASTRANK_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTRANK_TEXT_112                                                            \
  FASTRANK_TEXT_80                                                                   \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTRANK_LIST_8(i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTRANK_LIST_16_AT(i) FASTRANK_LIST_8(i), FASTRANK_LIST_8(i + 8)
#define FASTRANK_LIST_16 FASTRANK_LIST_16_AT(0)
#define FASTRANK_LIST_32 FASTRANK_LIST_16, FASTRANK_LIST_16_AT(16)
#define FASTRANK_LIST_48 FASTRANK_LIST_32, FASTRANK_LIST_16_AT(32)
#define FASTRANK_LIST_64 FASTRANK_LIST_48, FASTRANK_LIST_16_AT(48)
#define FASTRANK_LIST_80 FASTRANK_LIST_64, FASTRANK_LIST_16_AT(64)
#define FASTRANK_LIST_112 FASTRANK_LIST_80, FASTRANK_LIST_16_AT(80), FASTRANK_LIST_16_AT(96)

// Operands behind the accumulators: A's registers or descriptor, and B's descriptor.
#define FASTRANK_PRODUCTS(T, NAME, N, HALF, P0, P1, P2, P3, P4)                                              \
  template <>                                                                                                \
  struct Products<T, N> {                                                                                    \
    __device__ __forceinline__ static void registers(float (&d)[HALF], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FASTRANK_TEXT_##HALF \
                   "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", 1, 1, 1, 0;"                      \
                   : FASTRANK_LIST_##HALF                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
    }                                                                                                        \
    __device__ __forceinline__ static void shared(float (&d)[HALF], uint64_t a, uint64_t b) {                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FASTRANK_TEXT_##HALF \
                   "}, %" #P0 ", %" #P1 ", 1, 1, 1, 0, 0;"                                                   \
                   : FASTRANK_LIST_##HALF                                                                    \
                   : "l"(a), "l"(b));                                                                        \
    }                                                                                                        \
  };
#define FASTRANK_PRODUCTS_OF(N, HALF, ...)               \
  FASTRANK_PRODUCTS(__half, "f16", N, HALF, __VA_ARGS__) \
  FASTRANK_PRODUCTS(__nv_bfloat16, "bf16", N, HALF, __VA_ARGS__)
FASTRANK_PRODUCTS_OF(32, 16, 16, 17, 18, 19, 20)
FASTRANK_PRODUCTS_OF(64, 32, 32, 33, 34, 35, 36)
FASTRANK_PRODUCTS_OF(96, 48, 48, 49, 50, 51, 52)
FASTRANK_PRODUCTS_OF(128, 64, 64, 65, 66, 67, 68)
FASTRANK_PRODUCTS_OF(160, 80, 80, 81, 82, 83, 84)
FASTRANK_PRODUCTS_OF(224, 112, 112, 113, 114, 115, 116)

#else

template <typename T, int N>
struct Products {
  static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    float upper[16], lower[16];
    host::rows_of<T>(a, upper, lower);
    host::multiply<T, N>(d, upper, lower, b);
  }
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
    float upper[16], lower[16];
    const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + host::lane() / 4;
    for (int k = 0; k < 16; ++k)
      upper[k] = host::element<T>(a, row, k), lower[k] = host::element<T>(a, row + 8, k);
    host::multiply<T, N>(d, upper, lower, b);
  }
};

#endif
#endif  // Hopper

}  // namespace fastrank
