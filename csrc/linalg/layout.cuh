// The tables that travel as kernel arguments, the workspace and the state of a matrix.
//
// Inside, a matrix is A (n, m) with n <= m, scaled by a power of two so that its largest entry is in [1/2,
// 1). What the passes rotate is [B | Q^T], (n, m + n): it starts as [A | I], and B = Q^T A holds up to
// rounding ever after.
#pragma once

#include "common/device.cuh"
#include "linalg/linalg.h"

namespace fastrank::linalg {

constexpr float kEpsilon = 1.1920929e-07f;  // of float32
constexpr int kGramPartials = 64;  // tiles of partial sums up to which a Gram matrix is split along m

// The matrices of one launch: block b takes item b - first[t] of the last matrix t with first[t] <= b.
struct Batch {
  float* workspace[kTableMatrices];
  int n[kTableMatrices], m[kTableMatrices];
  int first[kTableMatrices];
  int count;
  int* state;
};

// Inputs as (n, m) views of their own dtype; strides in elements.
struct Inputs {
  const void* data[kTableMatrices];
  int64_t row_stride[kTableMatrices], column_stride[kTableMatrices];
  unsigned char dtype[kTableMatrices];
};

struct Outputs {
  void* data[kTableMatrices];
  unsigned char dtype[kTableMatrices];
  bool transposed[kTableMatrices];  // the caller's matrix is (m, n)
};

// Where the caller's vectors of ranks and of status bits take those of a matrix.
struct Places {
  int at[kTableMatrices];
};

struct Factors {
  float *left[kTableMatrices], *values[kTableMatrices], *right[kTableMatrices];
};

// State of a matrix, kStateInts ints, zero before a call. Flags are only ever set, and to the same value
// whoever sets them: plain stores, same result in any order.
struct State {
  unsigned largest;  // bits of max |a|; at or above those of infinity where an entry is not finite
  float top;         // sigma_1^2 as the last pass found it; 0 before the first
  int trusted;  // what the caller asked for is accurate enough before the rows pass the orthogonality test
  int rank;
  int bad[kMaxPasses + 2];                    // pass p found rows that are not orthogonal
  int active[(kMaxPasses + 1) * kMaxSweeps];  // a sweep of a pass rotated something
};
static_assert(sizeof(State) <= kStateInts * sizeof(int), "the state of a matrix has outgrown its place");

__host__ __device__ __forceinline__ int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Pieces that a Gram matrix's sum over m is split into, by shape alone: the order of additions never changes.
__host__ __device__ __forceinline__ int gram_chunks(int n, int m) {
  const int side = ceil_div(n, kTile), tiles = side * (side + 1) / 2;
  const int most = tiles < kGramPartials ? kGramPartials / tiles : 1;
  const int wanted = ceil_div(m, 256);
  return wanted < most ? wanted : most;
}

// Where the parts of a matrix's workspace lie.
struct Work {
  int n, m, width;            // width = m + n, of [B | Q^T]
  int padded, pairs, blocks;  // n rounded up to kTile, in tiles, in blocks of kBlock
  float* row_sets;            // two of (n, width): [B | Q^T] before and after a pass, in turn
  float* gram;                // (padded, padded)
  float* basis;               // (padded, padded): row i is column i of this pass's rotation
  float* turns;               // (pairs, kTile, kTile): the rotation of each pair of blocks in this round
  float* partials;            // (tiles, chunks, kTile, kTile)
  float* diagonal;            // (n,) squared norms of the rows of B
  float* weights;             // (n,)
  int* order;                 // (n,) rows by falling norm
  int* made_sets;             // two of (n,): rows that stand in for dead ones, before and after a pass
  int* turned;                // (pairs,) whether this round's rotation is not the identity
  int64_t floats;             // of all of it

  // What pass `pass` leaves behind; 0 is what the first one starts from.
  __device__ __forceinline__ float* rows_after(int pass) const {
    return row_sets + (pass % 2) * static_cast<int64_t>(n) * width;
  }
  __device__ __forceinline__ int* made_after(int pass) const { return made_sets + (pass % 2) * n; }
};

// `base` may be null where only the size is asked for.
__host__ __device__ __forceinline__ Work work_at(float* base, int n, int m) {
  Work w;
  w.n = n, w.m = m, w.width = m + n;
  w.pairs = ceil_div(n, kTile), w.padded = w.pairs * kTile, w.blocks = 2 * w.pairs;
  const int64_t rows = static_cast<int64_t>(n) * w.width, square = static_cast<int64_t>(w.padded) * w.padded;
  const int64_t tile = kTile * kTile;
  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    float* start = base ? base + at : nullptr;
    at += (floats + 3) / 4 * 4;  // 16 bytes
    return start;
  };
  w.row_sets = take(2 * rows);
  w.gram = take(square), w.basis = take(square);
  w.turns = take(w.pairs * tile);
  w.partials = take(static_cast<int64_t>(w.pairs) * (w.pairs + 1) / 2 * gram_chunks(n, m) * tile);
  w.diagonal = take(n), w.weights = take(n);
  w.order = reinterpret_cast<int*>(take(n));
  w.made_sets = reinterpret_cast<int*>(take(2 * n));
  w.turned = reinterpret_cast<int*>(take(w.pairs));
  w.floats = at;
  return w;
}

// What this block works on.
struct Place {
  int matrix, item;
};

__device__ __forceinline__ Place place(const Batch& batch) {
  int matrix = 0;
  while (matrix + 1 < batch.count && batch.first[matrix + 1] <= static_cast<int>(blockIdx.x)) ++matrix;
  return {matrix, static_cast<int>(blockIdx.x) - batch.first[matrix]};
}

__device__ __forceinline__ Work work_of(const Batch& batch, int matrix) {
  return work_at(batch.workspace[matrix], batch.n[matrix], batch.m[matrix]);
}

__device__ __forceinline__ State* state_of(const Batch& batch, int matrix) {
  return reinterpret_cast<State*>(batch.state + matrix * kStateInts);
}

__device__ __forceinline__ bool finite(const State& state) {
  return state.largest < 0x7f800000u;
}

// Whether the rows as pass `pass` finds them (from 1 on) have to be looked at.
__device__ __forceinline__ bool to_test(const State& state, int pass) {
  return finite(state) && (pass == 1 || (state.bad[pass - 1] && !state.trusted));
}

// Passes that rotated the rows, of at most `passes`; rows_after(passes_done) is where they lie.
__device__ __forceinline__ int passes_done(const State& state, int passes) {
  int done = 0;
  while (done < passes && state.bad[done + 1]) ++done;
  return done;
}

// The power of two that was divided out: the largest entry is in [1/2, 1) * 2^exponent.
__device__ __forceinline__ int exponent(const State& state) {
  return state.largest == 0 ? 0 : ilogbf(__uint_as_float(state.largest)) + 1;
}

// sigma_1^2 of the scaled matrix: at least (1/2)^2, the square of its largest entry (a zero matrix counts as
// such one).
__device__ __forceinline__ float top(const State& state) {
  return fmaxf(state.top, 0.25f);
}

// The squared norm up to which a row of B is rounding noise and nothing else.
__device__ __forceinline__ float dead_norm(const State& state) {
  return kEpsilon * kEpsilon * top(state);
}

// The squared norm up to which rows are left as they are. Where only a sub-gradient or a projection is
// wanted, that is all that stays below the cut of the numerical rank even when n such rows add up.
__device__ __forceinline__ float asleep_norm(const State& state, const Work& w, bool complete) {
  const float n = static_cast<float>(w.n), m = static_cast<float>(w.m);
  return dead_norm(state) * (complete ? 1.0f : fmaxf(1.0f, m * m / (4.0f * n)));
}

// Rows count as orthogonal when the cosine between them is at most this: what the rounding of a Gram matrix
// leaves.
__device__ __forceinline__ float tolerance(int m) {
  return fmaxf(16.0f, sqrtf(static_cast<float>(m))) * kEpsilon;
}

// Tile `index` of the lower triangle, row after row.
struct TilePair {
  int row, column;
};

__device__ __forceinline__ TilePair lower_tile(int index) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

}  // namespace fastrank::linalg
