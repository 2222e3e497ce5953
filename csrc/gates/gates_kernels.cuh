// Kernels of gated factors and gates, each over a list of tensors. fp32 arithmetic (fp64 in the proximal
// step), sums in a fixed order.
#pragma once

#include <type_traits>

#include "common/reduce.cuh"
#include "gates/table.cuh"

namespace fastrank::gates {

// A slice whose sum of squares is no normal float32 counts as zero: its normalised slice and gradients are 0.
__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  return sum_of_squares < kSmallestNormal ? 0.0f : 1.0f / sqrtf(sum_of_squares);
}

// The sum over the threads that share a slice, in each of them. All threads of the block call it.
__device__ __forceinline__ float slice_sum(float value, int lanes, float* scratch) {
  if (lanes > kWarpSize) return block_sum<kThreads>(value, scratch);
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// This thread's share of a block's slices: packs lane, lane + lanes, ... of slice `row`, and none past the
// last row.
struct Share {
  int64_t row, packs;
  int lane;

  template <int kPointers>
  __device__ __forceinline__ Share(const Entry<kPointers>& entry, int64_t block, int pack) {
    row = block * (kThreads / entry.lanes) + static_cast<int>(threadIdx.x) / entry.lanes;
    packs = row < entry.rows ? entry.row_size / pack : 0;
    lane = static_cast<int>(threadIdx.x) % entry.lanes;
  }
};

template <typename Pack, typename T, int kPointers>
__device__ __forceinline__ Pack* slice_of(const Entry<kPointers>& entry, int pointer, int64_t row) {
  return reinterpret_cast<Pack*>(static_cast<T*>(entry.at[pointer]) + row * entry.row_size);
}

// The pointers of an entry: first those that are read and written in packs.
enum Forward { kDirection, kOut, kGate, kForwardPointers };
enum Backward { kGrad, kOfDirection, kGradDirection, kOfGate, kGradGate, kBackwardPointers };

template <typename T, int kPack, int kPointers>
__device__ __forceinline__ void factor_slices(const Entry<kPointers>& entry, int64_t block, float* scratch) {
  using Pack = fastrank::Pack<T, kPack>;
  const Share own(entry, block, kPack);
  const Pack* source = slice_of<const Pack, const T>(entry, kDirection, own.row);
  Pack* target = slice_of<Pack, T>(entry, kOut, own.row);
  const int64_t beyond = own.lane + static_cast<int64_t>(kHeld) * entry.lanes;

  Pack held[kHeld];
  float squares = 0.0f;
  const auto add = [&](const Pack& v) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) squares += to_float(v.at[e]) * to_float(v.at[e]);
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (own.lane + h * entry.lanes < own.packs) held[h] = source[own.lane + h * entry.lanes];
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (own.lane + h * entry.lanes < own.packs) add(held[h]);
  }
  for (int64_t i = beyond; i < own.packs; i += entry.lanes) add(source[i]);
  const float inverse = inverse_norm(slice_sum(squares, entry.lanes, scratch));
  if (own.packs == 0) return;
  const float scale = to_float(static_cast<const T*>(entry.at[kGate])[own.row]) * inverse;

  const auto scaled = [&](const Pack& v) {
    Pack result;
#pragma unroll
    for (int e = 0; e < kPack; ++e) result.at[e] = from_float<T>(scale * to_float(v.at[e]));
    return result;
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (own.lane + h * entry.lanes < own.packs) target[own.lane + h * entry.lanes] = scaled(held[h]);
  }
  for (int64_t i = beyond; i < own.packs; i += entry.lanes) target[i] = scaled(source[i]);
}

template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads) gated_factors_kernel(FASTRANK_ARGUMENT(Tensors, table)) {
  FASTRANK_SHARED(float, scratch);
  const int index = find_entry(table.first, table.count, blockIdx.x);
  const auto& entry = table.entries[index];
  const int64_t block = blockIdx.x - table.first[index];
  if (entry.pack == 1) {
    factor_slices<T, 1>(entry, block, scratch);
  } else {
    factor_slices<T, kPackBytes / sizeof(T)>(entry, block, scratch);
  }
}

template <typename T, int kPack, int kPointers>
__device__ __forceinline__ void differentiate_slices(const Entry<kPointers>& entry, int64_t block,
                                                     float* scratch) {
  using Pack = fastrank::Pack<T, kPack>;
  const Share own(entry, block, kPack);
  const Pack* upstream = slice_of<const Pack, const T>(entry, kGrad, own.row);
  const Pack* source = slice_of<const Pack, const T>(entry, kOfDirection, own.row);
  Pack* target = slice_of<Pack, T>(entry, kGradDirection, own.row);
  const int64_t beyond = own.lane + static_cast<int64_t>(kHeldPairs) * entry.lanes;

  Pack held_v[kHeldPairs], held_g[kHeldPairs];
  float squares = 0.0f, dot = 0.0f;
  const auto add = [&](const Pack& v, const Pack& g) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      squares += to_float(v.at[e]) * to_float(v.at[e]);
      dot += to_float(g.at[e]) * to_float(v.at[e]);
    }
  };
#pragma unroll
  for (int h = 0; h < kHeldPairs; ++h) {
    if (own.lane + h * entry.lanes < own.packs) {
      held_v[h] = source[own.lane + h * entry.lanes];
      held_g[h] = upstream[own.lane + h * entry.lanes];
    }
  }
#pragma unroll
  for (int h = 0; h < kHeldPairs; ++h) {
    if (own.lane + h * entry.lanes < own.packs) add(held_v[h], held_g[h]);
  }
  for (int64_t i = beyond; i < own.packs; i += entry.lanes) add(source[i], upstream[i]);
  const float inverse = inverse_norm(slice_sum(squares, entry.lanes, scratch));
  // <grad, direction / norm>
  const float along = slice_sum(dot, entry.lanes, scratch + kThreads / kWarpSize) * inverse;
  if (own.packs == 0) return;
  if (own.lane == 0) static_cast<T*>(entry.at[kGradGate])[own.row] = from_float<T>(along);
  const float scale = to_float(static_cast<const T*>(entry.at[kOfGate])[own.row]) * inverse;
  const float radial = along * inverse;

  const auto across = [&](const Pack& v, const Pack& g) {
    Pack result;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      result.at[e] = from_float<T>(scale * (to_float(g.at[e]) - radial * to_float(v.at[e])));
    }
    return result;
  };
#pragma unroll
  for (int h = 0; h < kHeldPairs; ++h) {
    if (own.lane + h * entry.lanes < own.packs)
      target[own.lane + h * entry.lanes] = across(held_v[h], held_g[h]);
  }
  for (int64_t i = beyond; i < own.packs; i += entry.lanes) target[i] = across(source[i], upstream[i]);
}

template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads)
    gated_factors_backward_kernel(FASTRANK_ARGUMENT(Tensors, table)) {
  FASTRANK_SHARED(float, scratch);
  const int index = find_entry(table.first, table.count, blockIdx.x);
  const auto& entry = table.entries[index];
  const int64_t block = blockIdx.x - table.first[index];
  if (entry.pack == 1) {
    differentiate_slices<T, 1>(entry, block, scratch);
  } else {
    differentiate_slices<T, kPackBytes / sizeof(T)>(entry, block, scratch);
  }
}

// Call `visit(index, size constant)` for this thread's elements [index, index + size) of elements [begin,
// end), where begin is a multiple of every pack: whole packs first, then what is left one by one.
template <int kPack, typename Visitor>
__device__ __forceinline__ void visit_packs(int64_t begin, int64_t end, Visitor&& visit) {
  const int64_t whole = end / kPack * kPack;
  for (int64_t i = begin + kPack * threadIdx.x; i < whole; i += kPack * kThreads)
    visit(i, std::integral_constant<int, kPack>{});
  if constexpr (kPack > 1) {
    for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) visit(i, std::integral_constant<int, 1>{});
  }
}

template <typename T, int kPointers, typename Visitor>
__device__ __forceinline__ void visit_elements(const Entry<kPointers>& entry, int64_t begin, int64_t end,
                                               Visitor&& visit) {
  if (entry.pack == 1) {
    visit_packs<1>(begin, end, visit);
  } else {
    visit_packs<kPackBytes / sizeof(T)>(begin, end, visit);
  }
}

// The chunk of gates that this block takes.
template <typename T, typename Tensors, typename Visitor>
__device__ __forceinline__ void visit_chunk(const Tensors& table, Visitor&& visit) {
  const int index = find_entry(table.first, table.count, blockIdx.x);
  const auto& entry = table.entries[index];
  const int64_t begin = (blockIdx.x - table.first[index]) * kChunk;
  const int64_t end = begin + kChunk < entry.row_size ? begin + kChunk : entry.row_size;
  visit_elements<T>(entry, begin, end, [&](int64_t i, auto size) { visit(entry, i, size); });
}

template <typename T, int kPack>
__device__ __forceinline__ Pack<T, kPack>& pack_at(void* tensor, int64_t index) {
  return *reinterpret_cast<Pack<T, kPack>*>(static_cast<T*>(tensor) + index);
}

template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads)
    funnel_partials_kernel(FASTRANK_ARGUMENT(Tensors, table), float c, float* __restrict__ partials) {
  FASTRANK_SHARED(float, scratch);
  float sum = 0.0f;
  visit_chunk<T>(table, [&](const auto& entry, int64_t i, auto size) {
    const auto gates = pack_at<T, decltype(size)::value>(entry.at[0], i);
#pragma unroll
    for (int e = 0; e < decltype(size)::value; ++e) {
      const float width = fabsf(to_float(gates.at[e]));
      sum += width == 0.0f ? 0.0f : width / (width + c);
    }
  });
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

template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads)
    funnel_backward_kernel(FASTRANK_ARGUMENT(Tensors, table), const float* __restrict__ grad, float c,
                           float scale) {
  const float upstream = grad[0] * scale;
  visit_chunk<T>(table, [&](const auto& entry, int64_t i, auto size) {
    const auto gates = pack_at<T, decltype(size)::value>(entry.at[0], i);
    auto& grads = pack_at<T, decltype(size)::value>(entry.at[1], i);
#pragma unroll
    for (int e = 0; e < decltype(size)::value; ++e) {
      const float gate = to_float(gates.at[e]);
      const float width = fabsf(gate) + c;
      // Two divisions instead of a square: c * c is no normal number for a small c.
      const float slope = gate == 0.0f ? 0.0f : copysignf((1.0f / width) * (c / width), gate);
      grads.at[e] = from_float<T>(upstream * slope);
    }
  });
}

// By how much the funnel moves a gate of size v above its threshold: s u with s = v + c and u the smallest
// root of u (1 - u)^2 = eta c / s^3, which lies in [0, 1/3]. The start is within a twentieth of u and of 1/3
// - u, where Newton's steps square the error.
__device__ __forceinline__ double funnel_move(double size, double eta, double c) {
  const double s = size + c;
  const double kappa = (eta / s) * (c / s) / s;
  const double q = 6.75 * kappa;
  if (q >= 1.0) return s / 3.0;
  const double w = sqrt(1.0 - q);
  double u = q / (1.0 + w) * (1.0 / 3.0 - 0.0515668 * w);
#pragma unroll 1
  for (int step = 0; step < 5; ++step) {
    u -= (u * (1.0 - u) * (1.0 - u) - kappa) / ((1.0 - u) * (1.0 - 3.0 * u));
  }
  return s * u;
}

__device__ __forceinline__ double proximal_point(double gate, double eta, double c, double threshold,
                                                 Penalty penalty) {
  if (penalty == Penalty::kL2) return gate / (1.0 + 2.0 * eta);
  const double size = fabs(gate);
  if (size <= threshold) return 0.0;
  const double moved = penalty == Penalty::kL1 ? eta : funnel_move(size, eta, c);
  return copysign(size - moved < 0.0 ? 0.0 : size - moved, gate);  // NaN stays
}

template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads)
    funnel_proximal_kernel(FASTRANK_ARGUMENT(Tensors, table), double eta, double c, double threshold,
                           Penalty penalty) {
  // Double precision takes more time than memory does here, and more registers than packs leave.
  visit_chunk<T>(table, [&](const auto& entry, int64_t i, auto) {
    T& gate = static_cast<T*>(entry.at[0])[i];
    const double point = proximal_point(to_float(gate), eta, c, threshold, penalty);
    gate = from_float<T>(static_cast<float>(point));
  });
}

// One block a tensor: counts[block] = how many of its gates are smaller than the threshold.
template <typename T, typename Tensors>
static __global__ void __launch_bounds__(kThreads)
    count_below_kernel(FASTRANK_ARGUMENT(Tensors, table), double threshold, int64_t* __restrict__ counts) {
  FASTRANK_SHARED(long long, scratch);
  const auto& entry = table.entries[blockIdx.x];
  long long below = 0;
  visit_elements<T>(entry, 0, entry.row_size, [&](int64_t i, auto size) {
    const auto gates = pack_at<T, decltype(size)::value>(entry.at[0], i);
#pragma unroll
    for (int e = 0; e < decltype(size)::value; ++e) {
      below += fabs(static_cast<double>(to_float(gates.at[e]))) < threshold;
    }
  });
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    below += __shfl_xor_sync(0xffffffffu, below, offset);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = below;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) below += scratch[warp];
  counts[blockIdx.x] = below;
}

}  // namespace fastrank::gates
