// After the rotations of a pass: order, new rows, rows that stand in for dead ones. After the last: the cut,
// the results.
#pragma once

#include <cmath>

#include "common/reduce.cuh"
#include "linalg/prepare_kernels.cuh"

namespace fastrank::linalg {

constexpr float kTrustedShare =
    1.0f / 256;  // of sigma_1^2: from here up the first pass is accurate to about 1e-4
constexpr float kMadeShare =
    1.0f / 64;  // of a dead row's greatest norm: that of the row that stands in for it
constexpr int kRankDoubles = kThreads + 1;

enum class Kind { kSubgradient, kProjection, kFactors };

// order[r] = the index of the r-th largest of n values; equal ones keep their order. The caller's block works
// together.
__device__ __forceinline__ void sort_falling(const float* values, int n, int* order) {
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int before = 0;
    for (int j = 0; j < n; ++j) before += values[j] > values[i] || (values[j] == values[i] && j < i);
    order[before] = i;
  }
  __syncthreads();
}

// Smallest k with sum of the first k squares >= energy * sum of all, in [1, n]; float64, added one after the
// other.
__device__ __forceinline__ int energy_rank(const float* squares, const int* order, int n, double energy,
                                           double* scratch) {
  double total = 0.0, wanted = 0.0;
  int below = 0;
  for (int round = 0; round < 2; ++round) {
    double partial = 0.0;
    for (int start = 0; start < n; start += kThreads) {
      const int i = start + static_cast<int>(threadIdx.x);
      __syncthreads();
      scratch[threadIdx.x] = i < n ? static_cast<double>(fmaxf(squares[order[i]], 0.0f)) : 0.0;
      __syncthreads();
      if (threadIdx.x > 0) continue;
      const int count = n - start < kThreads ? n - start : kThreads;
      for (int j = 0; j < count; ++j) {
        partial += scratch[j];
        below += round == 1 && partial < wanted;
      }
    }
    total = partial;
    wanted = energy * total;
  }
  if (threadIdx.x == 0) scratch[kThreads] = below + 1 < n ? below + 1 : n;
  __syncthreads();
  return static_cast<int>(scratch[kThreads]);
}

// One block a matrix: the rows by falling eigenvalue, sigma_1^2, and whether this pass is enough.
// `energy` < 0: never (singular vectors are wanted); 0: all rows count; else those that the energy keeps.
static __global__ void __launch_bounds__(kThreads)
    order_kernel(const __grid_constant__ Batch batch, int pass, int sweeps, double energy) {
  FASTRANK_SHARED(double, scratch);  // kRankDoubles
  const int matrix = blockIdx.x;
  State* state = state_of(batch, matrix);
  if (!finite(*state) || !state->bad[pass]) return;
  const Work w = work_of(batch, matrix);
  for (int i = threadIdx.x; i < w.n; i += kThreads)
    w.weights[i] = w.gram[static_cast<int64_t>(i) * (w.padded + 1)];
  __syncthreads();
  sort_falling(w.weights, w.n, w.order);
  for (int r = threadIdx.x; r < w.n; r += kThreads)
    w.made_after(pass)[r] = pass > 1 ? w.made_after(pass - 1)[w.order[r]] : 0;
  const float largest = w.weights[w.order[0]];
  bool enough = energy >= 0.0 && !state->active[pass * kMaxSweeps + sweeps - 1];
  if (enough) {
    const int k = energy > 0.0 ? energy_rank(w.weights, w.order, w.n, energy, scratch) : w.n;
    enough = w.weights[w.order[k - 1]] >= kTrustedShare * largest;
  }
  if (threadIdx.x == 0) {
    state->top = largest;
    if (enough) state->trusted = 1;
  }
}

// One tile a block: [B | Q^T] turned by the pass and sorted.
static __global__ void __launch_bounds__(kThreads, kProductBlocks)
    rotate_kernel(const __grid_constant__ Batch batch, int pass) {
  FASTRANK_SHARED(float, shared);  // kProductFloats
  const Place at = place(batch);
  const State* state = state_of(batch, at.matrix);
  if (!finite(*state) || !state->bad[pass]) return;
  const Work w = work_of(batch, at.matrix);
  const int across = ceil_div(w.width, kTile);
  const int top_row = at.item / across * kTile, left = at.item % across * kTile;
  const float* source = w.rows_after(pass - 1);
  const auto basis = [=](int k, int i) {
    return top_row + i < w.n ? w.basis[w.order[top_row + i] * w.padded + k] : 0.0f;
  };
  const auto rows = [=](int k, int i) { return left + i < w.width ? source[k * w.width + left + i] : 0.0f; };
  Fragment sum;
  product<true, false>(0, w.n, basis, rows, shared, sum);
  float* out = w.rows_after(pass);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = top_row + own_row() + r;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = left + own_column() + c;
      if (row < w.n && column < w.width) out[row * w.width + column] = sum[r][c];
    }
  }
}

// A fixed number in [-1, -1/2] or [1/2, 1] for every (a, b): integer mixing after Murmur3's finaliser.
__device__ __forceinline__ float scatter(unsigned a, unsigned b) {
  unsigned x = a * 0x9e3779b1u ^ (b + 0x7f4a7c15u) * 0x85ebca6bu;
  x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
  const float size = 0.5f + static_cast<float>(x >> 9) * (1.0f / 16777216.0f);
  return x & 1u ? size : -size;
}

// One warp a row: its norm; and, where singular vectors are wanted, something else in the place of a dead
// row, so small that it disturbs none of the others: nearly a unit vector, with a little in every direction.
// The passes to come turn it away from the live rows, and its singular value is reported as 0.
static __global__ void __launch_bounds__(kThreads)
    settle_kernel(const __grid_constant__ Batch batch, int pass, bool complete) {
  const Place at = place(batch);
  const State* state = state_of(batch, at.matrix);
  if (!finite(*state) || !state->bad[pass]) return;
  const Work w = work_of(batch, at.matrix);
  const int lane = threadIdx.x % kWarpSize;
  const int row = at.item * (kThreads / kWarpSize) + static_cast<int>(threadIdx.x) / kWarpSize;
  if (row >= w.n) return;  // whole warps
  float* values = w.rows_after(pass) + static_cast<int64_t>(row) * w.width;
  float norm = 0.0f;
  for (int c = lane; c < w.m; c += kWarpSize) norm += values[c] * values[c];
  norm = warp_sum(norm);
  if (lane == 0) w.diagonal[row] = norm;
  int* made = w.made_after(pass) + row;
  const float dead = dead_norm(*state), made_norm = kMadeShare * kMadeShare * dead;
  // A stand-in that the live rows swallowed whole is drawn anew.
  if (!complete || norm > (*made ? made_norm * 1e-8f : dead)) return;
  const float size = sqrtf(made_norm), little = 0.25f / sqrtf(static_cast<float>(w.m));
  for (int c = lane; c < w.m; c += kWarpSize)
    values[c] = size * ((c == row ? 1.0f : 0.0f) + little * scatter(row + pass * w.n, c));
  if (lane == 0) *made = 1;
}

// One block a matrix: singular values, rank, the weight of each singular pair, status.
static __global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Places places,
                  const __grid_constant__ Factors factors, Kind kind, double energy, int passes,
                  int64_t* ranks, int* status) {
  FASTRANK_SHARED(double, scratch);  // kRankDoubles
  const int matrix = blockIdx.x, slot = places.at[matrix];
  State* state = state_of(batch, matrix);
  const Work w = work_of(batch, matrix);
  if (!finite(*state)) {
    if (threadIdx.x == 0) {
      status[slot] = kNonFinite;
      if (kind != Kind::kFactors) ranks[slot] = 0;
    }
    for (int r = threadIdx.x; kind == Kind::kFactors && r < w.n; r += kThreads)
      factors.values[matrix][r] = NAN;
    return;
  }
  sort_falling(w.diagonal, w.n, w.order);
  const float largest = sqrtf(w.diagonal[w.order[0]]);
  const float cut = kEpsilon * static_cast<float>(w.m) * largest;
  int rank = 0;  // numerical: how many singular values stand above the cut
  for (int r = threadIdx.x; r < w.n; r += kThreads) {
    const float square = w.diagonal[w.order[r]], sigma = sqrtf(square);
    w.weights[r] = kind == Kind::kProjection ? 1.0f : sigma > 0.0f ? 1.0f / sigma : 0.0f;
    if (kind == Kind::kFactors)
      factors.values[matrix][r] = square > dead_norm(*state) ? scalbnf(sigma, exponent(*state)) : 0.0f;
  }
  if (kind != Kind::kFactors) {
    while (kind == Kind::kSubgradient && rank < w.n && sqrtf(w.diagonal[w.order[rank]]) > cut) ++rank;
    if (kind == Kind::kProjection || energy > 0.0) {
      const int kept = energy_rank(w.diagonal, w.order, w.n, energy, scratch);
      rank = kind == Kind::kProjection || kept < rank ? kept : rank;
    }
  }
  if (threadIdx.x > 0) return;
  status[slot] = state->bad[passes + 1] && !state->trusted ? kNotConverged : 0;
  if (kind == Kind::kFactors) return;
  state->rank = rank;
  ranks[slot] = rank;
}

// One tile of a result a block: the sum of the kept singular pairs, in the caller's orientation and dtype.
static __global__ void __launch_bounds__(kThreads, kProductBlocks)
    result_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Outputs outputs, Kind kind,
                  int passes) {
  FASTRANK_SHARED(float, shared);  // kProductFloats
  const Place at = place(batch);
  const State* state = state_of(batch, at.matrix);
  const Work w = work_of(batch, at.matrix);
  const bool transposed = outputs.transposed[at.matrix];
  const int height = transposed ? w.m : w.n, width = transposed ? w.n : w.m, across = ceil_div(width, kTile);
  const int top_row = at.item / across * kTile, left = at.item % across * kTile;
  const float* source = w.rows_after(passes_done(*state, passes));
  // Row k of B, then row k of Q^T behind it: which one gives the rows of the result is the orientation's
  // matter.
  const int first = transposed ? 0 : w.m, second = transposed ? w.m : 0;
  const auto tall = [=](int k, int i) {
    if (top_row + i >= height) return 0.0f;
    return w.weights[k] * source[w.order[k] * w.width + first + top_row + i];
  };
  const auto wide = [=](int k, int i) {
    return left + i < width ? source[w.order[k] * w.width + second + left + i] : 0.0f;
  };
  const bool usable = finite(*state);
  Fragment sum;
  product<false, false>(0, usable ? state->rank : 0, tall, wide, shared, sum);
  const int shift = usable && kind == Kind::kProjection ? exponent(*state) : 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = top_row + own_row() + r;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = left + own_column() + c;
      if (row >= height || column >= width) continue;
      store(outputs.data[at.matrix], row * width + column, outputs.dtype[at.matrix],
            usable ? scalbnf(sum[r][c], shift) : NAN);
    }
  }
}

// kThreads elements of one row a block: the singular vectors, by falling singular value.
static __global__ void __launch_bounds__(kThreads)
    factors_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Factors factors, int passes) {
  const Place at = place(batch);
  const State* state = state_of(batch, at.matrix);
  const Work w = work_of(batch, at.matrix);
  const int across = ceil_div(w.width, kThreads), row = at.item / across;
  const int column = at.item % across * kThreads + static_cast<int>(threadIdx.x);
  if (column >= w.width) return;
  float* left = factors.left[at.matrix] + static_cast<int64_t>(row) * w.n;
  float* right = factors.right[at.matrix] + static_cast<int64_t>(row) * w.m;
  float value = NAN;
  if (finite(*state)) {
    const float* source = w.rows_after(passes_done(*state, passes));
    value = source[static_cast<int64_t>(w.order[row]) * w.width + column];
    if (column < w.m) value *= w.weights[row];
  }
  if (column < w.m) {
    right[column] = value;
  } else {
    left[column - w.m] = value;
  }
}

}  // namespace fastrank::linalg
