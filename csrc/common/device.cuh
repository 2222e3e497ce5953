// One kernel source for nvcc and for a plain C++ compiler: what the two spell differently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares `type* name`, the block's dynamic shared memory.
#define FASTRANK_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char fastrank_shared[]; \
  type* name = reinterpret_cast<type*>(fastrank_shared)
// The same where the tensor cores read it: its first byte is a multiple of 1024.
#define FASTRANK_SHARED_1024(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char fastrank_shared_1024[]; \
  type* name = reinterpret_cast<type*>(fastrank_shared_1024)

#else

#include "common/host_shim.h"

#define FASTRANK_SHARED(type, name) type* name = reinterpret_cast<type*>(fastrank::host::block().shared())
#define FASTRANK_SHARED_1024(type, name) FASTRANK_SHARED(type, name)

#endif

namespace fastrank {

constexpr int kWarpSize = 32;

// `N` elements that one instruction loads or stores.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

__device__ __forceinline__ float to_float(float x) {
  return x;
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit numbers as one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  Pack<T, 2> both;
  both.at[0] = from_float<T>(low), both.at[1] = from_float<T>(high);
  uint32_t word;
  memcpy(&word, &both, sizeof(word));
  return word;
}

template <typename T>
__device__ __forceinline__ float unpack_low(uint32_t word) {
  Pack<T, 2> both;
  memcpy(&both, &word, sizeof(word));
  return to_float(both.at[0]);
}

template <typename T>
__device__ __forceinline__ float unpack_high(uint32_t word) {
  Pack<T, 2> both;
  memcpy(&both, &word, sizeof(word));
  return to_float(both.at[1]);
}

}  // namespace fastrank
