// Spectral operators on a ragged batch of matrices: launchers over raw pointers, and what they need of
// memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastrank::linalg {

constexpr int kThreads = 256;
constexpr int kTableMatrices = 64;  // matrices a call: the table travels as a kernel argument
constexpr int kBlock = 32;          // rows that a block of the Jacobi ordering holds
constexpr int kTile = 64;           // two such blocks: rows that one thread block rotates against each other
constexpr int kStateInts = 256;     // int32 of state a matrix, zero before a call
constexpr int kMaxSweeps = 24;
constexpr int kMaxPasses = 8;

// Bits of a matrix's status.
constexpr int kNonFinite = 1;  // a NaN or an infinity among its entries: its outputs are NaN
constexpr int kNotConverged =
    2;  // the bounds on sweeps and passes were met first: its outputs are approximate

// A matrix of rows x columns elements at any strides (in elements).
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  DType dtype;
};

// What a call may spend. Sweeps beyond the first pass start from nearly orthogonal rows.
struct Limits {
  int first_sweeps, later_sweeps, passes;
};

// Floats of workspace that a matrix of this shape takes; a call needs the sum over its matrices.
int64_t workspace_floats(int64_t rows, int64_t columns);

// outs[i], contiguous, of the shape and dtype of matrices[i]: its sub-gradient U_k V_k^T, or its projection
// on the k leading singular pairs. `energy` <= 0 keeps the numerical rank (sub-gradients only).
// ranks[places[i]] is its k, and status[places[i]] its status. state: count * kStateInts zeros. No matrix is
// empty, count is at most kTableMatrices.
void spectral(const Matrix* matrices, void* const* outs, const int64_t* places, int count, bool subgradient,
              double energy, Limits limits, int64_t* ranks, int* status, int* state, float* workspace,
              void* stream);

// Thin singular value decompositions in float32. With n = min(rows, columns) and m = max: left[i] (n, n)
// holds singular vectors of the short side as rows, right[i] (n, m) those of the long side, values[i] (n,)
// descending.
void svd(const Matrix* matrices, float* const* left, float* const* values, float* const* right,
         const int64_t* places, int count, Limits limits, int* status, int* state, float* workspace,
         void* stream);

}  // namespace fastrank::linalg
