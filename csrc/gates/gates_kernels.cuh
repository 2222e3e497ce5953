// Kernels of the gated factors and of the funnel penalty. fp32 arithmetic, sums in a fixed order.
#pragma once

#include "common/reduce.cuh"
#include "gates/gates.h"

namespace fastrank::gates {

// A slice whose sum of squares is no normal float32 counts as zero: its normalised slice and gradients are 0.
__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  return sum_of_squares < kSmallestNormal ? 0.0f : 1.0f / sqrtf(sum_of_squares);
}

// The sum over the kLanes threads that share a row, in each of them.
template <int kLanes>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
  if constexpr (kLanes == kWarpSize) {
    return warp_sum(value);
  } else {
    return block_sum<kLanes>(value, scratch);
  }
}

template <typename T, int kPack, int kLanes>
static __global__ void __launch_bounds__(kThreads)
    gated_factor_kernel(const T* __restrict__ direction, const T* __restrict__ gate, T* __restrict__ out,
                        int64_t rows, int64_t row_size) {
  using Pack = fastrank::Pack<T, kPack>;
  FASTRANK_SHARED(float, scratch);
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= rows) return;  // whole warps, where a warp takes a row; never, where a block does
  const Pack* source = reinterpret_cast<const Pack*>(direction + row * row_size);
  Pack* target = reinterpret_cast<Pack*>(out + row * row_size);
  const int64_t packs = row_size / kPack;

  float squares = 0.0f;
  for (int64_t i = lane; i < packs; i += kLanes) {
    const Pack v = source[i];
#pragma unroll
    for (int e = 0; e < kPack; ++e) squares += to_float(v.at[e]) * to_float(v.at[e]);
  }
  const float scale = to_float(gate[row]) * inverse_norm(row_sum<kLanes>(squares, scratch));

  for (int64_t i = lane; i < packs; i += kLanes) {
    const Pack v = source[i];
    Pack result;
#pragma unroll
    for (int e = 0; e < kPack; ++e) result.at[e] = from_float<T>(scale * to_float(v.at[e]));
    target[i] = result;
  }
}

template <typename T, int kPack, int kLanes>
static __global__ void __launch_bounds__(kThreads)
    gated_factor_backward_kernel(const T* __restrict__ grad, const T* __restrict__ direction,
                                 const T* __restrict__ gate, T* __restrict__ grad_direction,
                                 T* __restrict__ grad_gate, int64_t rows, int64_t row_size) {
  using Pack = fastrank::Pack<T, kPack>;
  FASTRANK_SHARED(float, scratch);
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= rows) return;
  const Pack* upstream = reinterpret_cast<const Pack*>(grad + row * row_size);
  const Pack* source = reinterpret_cast<const Pack*>(direction + row * row_size);
  Pack* target = reinterpret_cast<Pack*>(grad_direction + row * row_size);
  const int64_t packs = row_size / kPack;

  float squares = 0.0f, dot = 0.0f;
  for (int64_t i = lane; i < packs; i += kLanes) {
    const Pack v = source[i], g = upstream[i];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      squares += to_float(v.at[e]) * to_float(v.at[e]);
      dot += to_float(g.at[e]) * to_float(v.at[e]);
    }
  }
  const float inverse = inverse_norm(row_sum<kLanes>(squares, scratch));
  const float along =
      row_sum<kLanes>(dot, scratch + kThreads / kWarpSize) * inverse;  // <grad, direction / norm>
  if (lane == 0) grad_gate[row] = from_float<T>(along);
  const float scale = to_float(gate[row]) * inverse;
  const float radial = along * inverse;

  for (int64_t i = lane; i < packs; i += kLanes) {
    const Pack v = source[i], g = upstream[i];
    Pack result;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      result.at[e] = from_float<T>(scale * (to_float(g.at[e]) - radial * to_float(v.at[e])));
    }
    target[i] = result;
  }
}

// The tensors of one launch. Block b takes chunk b - first_chunk[t] of the last tensor t with first_chunk[t]
// <= b.
template <typename T>
struct FunnelTable {
  const T* gates[kTableTensors];
  T* grads[kTableTensors];
  int64_t sizes[kTableTensors];
  int64_t first_chunk[kTableTensors];
  int count;
};

// The half-open range of elements that this block takes of tensor `tensor`.
struct Chunk {
  int tensor;
  int64_t begin, end;
};

template <typename T>
__device__ __forceinline__ Chunk own_chunk(const FunnelTable<T>& table) {
  int tensor = 0;
  while (tensor + 1 < table.count && table.first_chunk[tensor + 1] <= static_cast<int64_t>(blockIdx.x))
    ++tensor;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_chunk[tensor]) * kChunk;
  const int64_t end = begin + kChunk;
  return {tensor, begin, end < table.sizes[tensor] ? end : table.sizes[tensor]};
}

template <typename T>
static __global__ void __launch_bounds__(kThreads)
    funnel_partials_kernel(const __grid_constant__ FunnelTable<T> table, float c,
                           float* __restrict__ partials) {
  FASTRANK_SHARED(float, scratch);
  const Chunk chunk = own_chunk(table);
  const T* gates = table.gates[chunk.tensor];
  float sum = 0.0f;
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const float size = fabsf(to_float(gates[i]));
    sum += size == 0.0f ? 0.0f : size / (size + c);
  }
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block: out[0] = scale * sum of the partial sums.
static __global__ void __launch_bounds__(kThreads)
    funnel_finish_kernel(const float* __restrict__ partials, int64_t count, float scale,
                         float* __restrict__ out) {
  FASTRANK_SHARED(float, scratch);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) out[0] = scale * sum;
}

template <typename T>
static __global__ void __launch_bounds__(kThreads)
    funnel_backward_kernel(const __grid_constant__ FunnelTable<T> table, const float* __restrict__ grad,
                           float c, float scale) {
  const Chunk chunk = own_chunk(table);
  const T* gates = table.gates[chunk.tensor];
  T* grads = table.grads[chunk.tensor];
  const float upstream = grad[0] * scale;
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const float gate = to_float(gates[i]);
    const float width = fabsf(gate) + c;
    // Two divisions instead of a square: c * c is no normal number for a small c.
    const float slope = gate == 0.0f ? 0.0f : copysignf((1.0f / width) * (c / width), gate);
    grads[i] = from_float<T>(upstream * slope);
  }
}

}  // namespace fastrank::gates
