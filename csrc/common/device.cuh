// One kernel source for nvcc and for a plain C++ compiler: what the two spell differently.
#pragma once

#include <cstddef>
#include <cstdint>
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

#else

#include "common/host_shim.h"

#define FASTRANK_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(fastrank::host::block().shared.data())

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

#ifdef __CUDACC__
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
#endif

}  // namespace fastrank
