// From the caller's matrices to scaled rows, their Gram matrix, and whether the rows are orthogonal already.
#pragma once

#include "common/reduce.cuh"
#include "linalg/tile.cuh"

namespace fastrank::linalg {

// Element `index` of a tensor of one of the three dtypes. The host build has float32 only.
__device__ __forceinline__ float load(const void* data, int64_t index, unsigned char dtype) {
#ifdef __CUDACC__
  if (dtype == static_cast<unsigned char>(DType::kFloat16))
    return to_float(static_cast<const __half*>(data)[index]);
  if (dtype == static_cast<unsigned char>(DType::kBFloat16))
    return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
#endif
  return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ void store(void* data, int64_t index, unsigned char dtype, float value) {
#ifdef __CUDACC__
  if (dtype == static_cast<unsigned char>(DType::kFloat16)) {
    static_cast<__half*>(data)[index] = from_float<__half>(value);
    return;
  }
  if (dtype == static_cast<unsigned char>(DType::kBFloat16)) {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
    return;
  }
#endif
  static_cast<float*>(data)[index] = value;
}

// Place e of this thread in a tile, with the threads of a warp along the dimension that is nearer in memory.
struct Spot {
  int row, column;
};

__device__ __forceinline__ Spot spot(int e, bool down) {
  const int index = e * kThreads + static_cast<int>(threadIdx.x);
  const int near = index % kTile, far = index / kTile;
  return down ? Spot{near, far} : Spot{far, near};
}

constexpr int kSpots = kTile * kTile / kThreads;

__device__ __forceinline__ bool runs_down(const Inputs& inputs, int matrix) {
  const int64_t row = inputs.row_stride[matrix], column = inputs.column_stride[matrix];
  return (row < 0 ? -row : row) < (column < 0 ? -column : column);
}

// One tile of A a block: the largest |a|, as bits, which order like the numbers and put NaN above infinity.
static __global__ void __launch_bounds__(kThreads)
    measure_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Inputs inputs) {
  const Place at = place(batch);
  const int n = batch.n[at.matrix], m = batch.m[at.matrix], across = ceil_div(m, kTile);
  const int top_row = at.item / across * kTile, left = at.item % across * kTile;
  const bool down = runs_down(inputs, at.matrix);
  unsigned largest = 0;
#pragma unroll 4
  for (int e = 0; e < kSpots; ++e) {
    const Spot s = spot(e, down);
    const int row = top_row + s.row, column = left + s.column;
    if (row >= n || column >= m) continue;
    const int64_t index = row * inputs.row_stride[at.matrix] + column * inputs.column_stride[at.matrix];
    const unsigned bits =
        __float_as_uint(fabsf(load(inputs.data[at.matrix], index, inputs.dtype[at.matrix])));
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % kWarpSize == 0 && largest > 0) atomicMax(&state_of(batch, at.matrix)->largest, largest);
}

// One tile of [A | I] a block: scaled, in float32, row after row.
static __global__ void __launch_bounds__(kThreads)
    stage_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Inputs inputs) {
  FASTRANK_SHARED(float, tile);  // kTile x (kTile + 1)
  const Place at = place(batch);
  const State state = *state_of(batch, at.matrix);
  if (!finite(state)) return;
  const Work w = work_of(batch, at.matrix);
  const int across = ceil_div(w.width, kTile);
  const int top_row = at.item / across * kTile, left = at.item % across * kTile;
  const bool down = runs_down(inputs, at.matrix);
  const int shift = -exponent(state);
#pragma unroll 4
  for (int e = 0; e < kSpots; ++e) {
    const Spot s = spot(e, down);
    const int row = top_row + s.row, column = left + s.column;
    if (row >= w.n || column >= w.width) continue;
    float value = column - w.m == row ? 1.0f : 0.0f;
    if (column < w.m) {
      const int64_t index = row * inputs.row_stride[at.matrix] + column * inputs.column_stride[at.matrix];
      value = scalbnf(load(inputs.data[at.matrix], index, inputs.dtype[at.matrix]), shift);
    }
    tile[s.row * (kTile + 1) + s.column] = value;
  }
  __syncthreads();
#pragma unroll 4
  for (int e = 0; e < kSpots; ++e) {
    const Spot s = spot(e, false);
    const int row = top_row + s.row, column = left + s.column;
    if (row < w.n && column < w.width)
      w.rows_after(0)[static_cast<int64_t>(row) * w.width + column] = tile[s.row * (kTile + 1) + s.column];
  }
}

// One piece of the sum of one lower tile of B B^T a block.
static __global__ void __launch_bounds__(kThreads, kProductBlocks)
    gram_kernel(const __grid_constant__ Batch batch, int pass) {
  FASTRANK_SHARED(float, shared);  // kProductFloats
  const Place at = place(batch);
  if (!to_test(*state_of(batch, at.matrix), pass)) return;
  const Work w = work_of(batch, at.matrix);
  const int chunks = gram_chunks(w.n, w.m), chunk = at.item % chunks;
  const TilePair tile = lower_tile(at.item / chunks);
  const int length = ceil_div(ceil_div(w.m, chunks), kStep) * kStep;
  const int begin = chunk * length, end = begin + length < w.m ? begin + length : w.m;
  const float* rows = w.rows_after(pass - 1);
  const auto row_of = [&](int tile_row) {
    return [=](int k, int i) {
      const int row = tile_row * kTile + i;
      return row < w.n ? rows[static_cast<int64_t>(row) * w.width + k] : 0.0f;
    };
  };
  Fragment sum;
  product<true, true>(begin, end, row_of(tile.row), row_of(tile.column), shared, sum);
  float* out = w.partials + static_cast<int64_t>(at.item) * kTile * kTile;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) out[(own_row() + r) * kTile + own_column() + c] = sum[r][c];
  }
}

// The sum of an element's pieces, in turn. `tile` counts lower tiles.
__device__ __forceinline__ float gathered(const Work& w, int chunks, int tile, int row, int column) {
  const float* piece =
      w.partials + static_cast<int64_t>(tile) * chunks * kTile * kTile + row * kTile + column;
  float sum = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += piece[static_cast<int64_t>(chunk) * kTile * kTile];
  return sum;
}

// One lower tile a block: the Gram matrix in full, the rotation of the pass reset, and the test of the rows.
// `complete`: rows of nothing but rounding noise have to be replaced, so they fail the test until they are.
static __global__ void __launch_bounds__(kThreads)
    assemble_kernel(const __grid_constant__ Batch batch, int pass, bool complete) {
  FASTRANK_SHARED(float, shared);
  float* tile = shared;                         // kTile x (kTile + 1)
  float* norms = shared + kTile * (kTile + 1);  // squared, of the tile's rows, then of its columns
  int* asleep =
      reinterpret_cast<int*>(norms + 2 * kTile);  // rows that the test leaves out, in the same order
  const Place at = place(batch);
  State* state = state_of(batch, at.matrix);
  if (!to_test(*state, pass)) return;
  const Work w = work_of(batch, at.matrix);
  const int chunks = gram_chunks(w.n, w.m);
  const TilePair pair = lower_tile(at.item);
  const float quiet = asleep_norm(*state, w, complete);
  bool bad = false;
  if (threadIdx.x < 2 * kTile) {
    const int l = threadIdx.x % kTile, side = threadIdx.x < kTile ? pair.row : pair.column;
    const int row = side * kTile + l;
    const float norm = gathered(w, chunks, side * (side + 3) / 2, l, l);
    const bool made = pass > 1 && row < w.n && w.made_after(pass - 1)[row];
    norms[threadIdx.x] = norm;
    asleep[threadIdx.x] = row >= w.n || (norm <= quiet && !made);
    if (complete && row < w.n && asleep[threadIdx.x]) bad = true;
    if (pair.row == pair.column && threadIdx.x < kTile && row < w.n) w.diagonal[row] = norm;
  }
  __syncthreads();
  const float tol = tolerance(w.m);
  for (int e = 0; e < kSpots; ++e) {
    const Spot s = spot(e, false);
    const int row = pair.row * kTile + s.row, column = pair.column * kTile + s.column;
    const float value = gathered(w, chunks, at.item, s.row, s.column);
    tile[s.row * (kTile + 1) + s.column] = value;
    const int64_t index = static_cast<int64_t>(row) * w.padded + column;
    w.gram[index] = value;
    w.basis[index] = row == column ? 1.0f : 0.0f;
    if (row > column && !asleep[s.row] && !asleep[kTile + s.column] &&
        fabsf(value) > tol * sqrtf(norms[s.row]) * sqrtf(norms[kTile + s.column]))
      bad = true;
  }
  if (bad) state->bad[pass] = 1;
  if (pair.row == pair.column) return;
  __syncthreads();
  for (int e = 0; e < kSpots; ++e) {
    const Spot s = spot(e, true);
    const int64_t index =
        static_cast<int64_t>(pair.column * kTile + s.column) * w.padded + pair.row * kTile + s.row;
    w.gram[index] = tile[s.row * (kTile + 1) + s.column];
    w.basis[index] = 0.0f;
  }
}

}  // namespace fastrank::linalg
