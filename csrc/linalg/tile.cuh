// The one matrix product of this family: a 64 x 64 tile a block, fp32, sums in a fixed order and on two
// levels.
#pragma once

#include "linalg/layout.cuh"

namespace fastrank::linalg {

constexpr int kStep = 32;  // of the sum: what shared memory holds at a time
constexpr int kStride =
    kTile + 4;  // of a row of shared memory: float4 loads stay aligned, transposed stores conflict-free
constexpr int kFetches = kStep * kTile / kThreads;
constexpr int kProductBlocks = 2;  // thread blocks of a product that a multiprocessor has to have room for
constexpr int kProductFloats = 2 * kStep * kStride;
constexpr int kTurnFloats = 2 * kTile * kStride;

using Fragment = float[4][4];

// The corner of the 4 x 4 part of a tile that this thread holds.
__device__ __forceinline__ int own_row() {
  return static_cast<int>(threadIdx.x) / (kTile / 4) * 4;
}
__device__ __forceinline__ int own_column() {
  return static_cast<int>(threadIdx.x) % (kTile / 4) * 4;
}

// sum[r][c] += sum over k < kDepth of a[k][own_row + r] * b[k][own_column + c], both in shared memory.
template <int kDepth>
__device__ __forceinline__ void multiply(const float* a, const float* b, Fragment& sum) {
  using Four = Pack<float, 4>;
  a += own_row(), b += own_column();
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    const Four x = *reinterpret_cast<const Four*>(a + k * kStride);
    const Four y = *reinterpret_cast<const Four*>(b + k * kStride);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] += x.at[r] * y.at[c];
    }
  }
}

// Which element (k, i) of a kStep x kTile slab this thread's fetch e moves. `kAcross`: memory is contiguous
// along k, else along i. Either way a warp reads whole sectors and writes to 32 banks.
struct Element {
  int k, i;
};

template <bool kAcross>
__device__ __forceinline__ Element element(int e) {
  const int thread = threadIdx.x;
  if constexpr (kAcross) {
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    return {e % 4 * 8 + lane % 8, (e / 4 * (kThreads / kWarpSize) + warp) * 4 + lane / 8};
  } else {
    return {(e * kThreads + thread) / kTile, (e * kThreads + thread) % kTile};
  }
}

// sum[r][c] = sum over k in [begin, end) of a(k, own_row + r) * b(k, own_column + c). a and b give 0 outside
// their operand. Each slab of kStep is summed by itself, then added: the error grows with sqrt(kStep) +
// sqrt(slabs).
template <bool kAcrossA, bool kAcrossB, typename A, typename B>
__device__ __forceinline__ void product(int begin, int end, const A& a, const B& b, float* shared,
                                        Fragment& sum) {
  float* left = shared;
  float* right = shared + kStep * kStride;
  float next_left[kFetches], next_right[kFetches];
  const auto fetch = [&](int start) {
#pragma unroll
    for (int e = 0; e < kFetches; ++e) {
      const Element x = element<kAcrossA>(e), y = element<kAcrossB>(e);
      next_left[e] = start + x.k < end ? a(start + x.k, x.i) : 0.0f;
      next_right[e] = start + y.k < end ? b(start + y.k, y.i) : 0.0f;
    }
  };
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[r][c] = 0.0f;
  }
  if (begin < end) fetch(begin);
  for (int start = begin; start < end; start += kStep) {
#pragma unroll
    for (int e = 0; e < kFetches; ++e) {
      const Element x = element<kAcrossA>(e), y = element<kAcrossB>(e);
      left[x.k * kStride + x.i] = next_left[e];
      right[y.k * kStride + y.i] = next_right[e];
    }
    __syncthreads();
    if (start + kStep < end) fetch(start + kStep);
    Fragment part = {};
    multiply<kStep>(left, right, part);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] += part[r][c];
    }
    __syncthreads();
  }
}

}  // namespace fastrank::linalg
