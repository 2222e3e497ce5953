// Parallel two-sided Jacobi on a Gram matrix: blocks of 32 rows, each two of them met in turn by one thread
// block.
//
// A sweep of a matrix of `blocks` blocks is blocks - 1 rounds of blocks / 2 disjoint pairs. solve_kernel
// rotates a pair in shared memory: in the first round of a sweep all its 64 rows against each other,
// afterwards only the rows of one block against those of the other, so that a sweep meets each two rows once.
// update_kernel then applies what the pairs did to the rest of the Gram matrix and to the basis. Rotations
// are skipped where the cosine between two rows is within rounding: relative to the two norms, so that rows
// of very different norms come out as accurate as the large ones (Demmel and Veselic, SIAM J. Matrix Anal.
// Appl. 13, 1992).
#pragma once

#include "linalg/tile.cuh"

namespace fastrank::linalg {

constexpr int kLine =
    kTile + 1;  // of a matrix in solve_kernel's shared memory: columns fall on different banks
constexpr int kSolveBlocks =
    2;  // that a multiprocessor has to have room for: without it, registers are spilled
constexpr int kSolveFloats = 2 * kTile * kLine + kTile + 6 * kBlock;

// By an angle of which it keeps the sine and the tangent of its half: x - sine * (y + half * x) has the error
// of a small correction, where cosine * x - sine * y would let many small rotations blow the vectors up
// (Rutishauser).
struct Rotation {
  float sine, half, shift;  // shift: what the diagonal entries exchange
};

// What is not worth a rotation: cosines between two rows up to `tolerance`, and rows of squared norms below
// `quiet`.
struct Skip {
  float tolerance, quiet;
};

// The rotation that zeroes `off` between diagonal entries a and b. `noise` is the product of the two rows'
// norms when the Gram matrix was formed: its rounding is relative to that, and no work on it makes an entry
// more certain.
__device__ __forceinline__ Rotation rotation(float a, float b, float off, float noise, const Skip& skip) {
  const float norms = fmaxf(sqrtf(fmaxf(a, 0.0f)) * sqrtf(fmaxf(b, 0.0f)), noise);
  if (!(fabsf(off) > skip.tolerance * norms) || fminf(a, b) < skip.quiet) return {0.0f, 0.0f, 0.0f};
  const float tau = (b - a) / (2.0f * off);
  const float tangent = copysignf(1.0f / (fabsf(tau) + sqrtf(1.0f + tau * tau)), tau);
  const float cosine = 1.0f / sqrtf(1.0f + tangent * tangent), sine = tangent * cosine;
  return {sine, sine / (1.0f + cosine), tangent * off};
}

__device__ __forceinline__ void rotate(float& x, float& y, float sine, float half) {
  const float before = x;
  x -= sine * (y + half * x);
  y += sine * (before - half * y);
}

struct Two {
  int low, high;
};

// x modulo size, of an x below 2 * size.
__host__ __device__ __forceinline__ int wrap(int x, int size) {
  return x < size ? x : x - size;
}

// Round robin: in each of size - 1 rounds all of `size` players (an even number) meet in size / 2 pairs.
__host__ __device__ __forceinline__ Two meeting(int size, int round, int pair) {
  const int a = pair == 0 ? size - 1 : wrap(round + pair, size - 1);
  const int b = pair == 0 ? round : wrap(round - pair + size - 1, size - 1);
  return a < b ? Two{a, b} : Two{b, a};
}

// What a matrix does in a round of a pass, counted from the pass's start; nothing once it has converged.
struct Turn {
  bool live;
  int sweep, step;
};

__device__ __forceinline__ Turn turn(const State& state, const Work& w, int pass, int round, int sweeps) {
  const int sweep = round / (w.blocks - 1);
  const bool open = finite(state) && state.bad[pass] && sweep < sweeps;
  const bool live = open && (sweep == 0 || state.active[pass * kMaxSweeps + sweep - 1]);
  return {live, sweep, round % (w.blocks - 1)};
}

// The row of the matrix that is row `local` of a pair of blocks.
__device__ __forceinline__ int global_row(const Two& blocks, int local) {
  return local < kBlock ? blocks.low * kBlock + local : blocks.high * kBlock + local - kBlock;
}

// What solve_kernel keeps in shared memory.
struct Pair {
  float* gram;                     // kTile x kLine
  float* turned;                   // kTile x kLine: the rotations so far
  float* norms;                    // kTile, of the rows when the Gram matrix was formed
  float *sines, *halves, *shifts;  // kBlock: the rotations of a round
  int *lows, *highs;               // kBlock: the rows that they rotate
  int* rotated;                    // kBlock: whether a thread found something to rotate

  __device__ __forceinline__ explicit Pair(float* shared) {
    gram = shared, turned = gram + kTile * kLine, norms = turned + kTile * kLine;
    sines = norms + kTile, halves = sines + kBlock, shifts = halves + kBlock;
    lows = reinterpret_cast<int*>(shifts + kBlock), highs = lows + kBlock, rotated = highs + kBlock;
  }
};

// One sweep over a pair: all its `size` rows against each other, or block against block. Whether this thread
// computed a rotation. A lane takes a pair of columns, a warp takes pairs of rows in turn: block against
// block, no two lanes meet in a bank.
__device__ __forceinline__ bool sweep_pair(const Pair& pair, int size, bool all, const Skip& skip) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kBlock == kWarpSize, "a lane takes a pair of columns");
  const int thread = threadIdx.x, warp = thread / kWarpSize, q = thread % kWarpSize;
  const int half = size / 2, rounds = all ? size - 1 : half;
  bool any = false;
  for (int round = 0; round < rounds; ++round) {
    if (thread < half) {
      const Two t = all ? meeting(size, round, thread) : Two{thread, half + wrap(thread + round, half)};
      const float* row = pair.gram + t.low * kLine;
      const Rotation r = rotation(row[t.low], pair.gram[t.high * kLine + t.high], row[t.high],
                                  pair.norms[t.low] * pair.norms[t.high], skip);
      pair.sines[thread] = r.sine, pair.halves[thread] = r.half, pair.shifts[thread] = r.shift;
      pair.lows[thread] = t.low, pair.highs[thread] = t.high;
      any = any || r.sine != 0.0f;
    }
    __syncthreads();
    if (q < half) {
      const float sq = pair.sines[q], hq = pair.halves[q];
      const int low = pair.lows[q], high = pair.highs[q];
      for (int p = warp; p < half; p += kWarps) {
        const float sp = pair.sines[p], hp = pair.halves[p];
        if (sp == 0.0f && sq == 0.0f) continue;
        float* upper = pair.gram + pair.lows[p] * kLine;
        float* lower = pair.gram + pair.highs[p] * kLine;
        float x = upper[low], y = upper[high], z = lower[low], u = lower[high];
        if (p == q) {
          x -= pair.shifts[p], u += pair.shifts[p];
          y = z = 0.0f;
        } else {
          rotate(x, z, sp, hp), rotate(y, u, sp, hp);
          rotate(x, y, sq, hq), rotate(z, u, sq, hq);
        }
        upper[low] = x, upper[high] = y, lower[low] = z, lower[high] = u;
      }
      for (int row = warp; row < size && sq != 0.0f; row += kWarps) {
        float* turned = pair.turned + row * kLine;
        rotate(turned[low], turned[high], sq, hq);
      }
    }
    __syncthreads();
  }
  return any;
}

// A pair of blocks a thread block. A matrix of one pair is diagonalised here and now, in up to `sweeps`
// sweeps.
static __global__ void __launch_bounds__(kThreads, kSolveBlocks)
    solve_kernel(const __grid_constant__ Batch batch, int pass, int round, int sweeps, bool complete) {
  FASTRANK_SHARED(float, shared);  // kSolveFloats
  const Pair pair(shared);
  const Place at = place(batch);
  State* state = state_of(batch, at.matrix);
  const Work w = work_of(batch, at.matrix);
  const Turn now = turn(*state, w, pass, round, sweeps);
  const bool single = w.pairs == 1;
  if (!now.live || (single && round > 0)) return;
  const Two blocks = meeting(w.blocks, now.step, at.item);
  const int thread = threadIdx.x;
  for (int index = thread; index < kTile * kTile; index += kThreads) {
    const int row = index / kTile, column = index % kTile;
    pair.gram[row * kLine + column] =
        w.gram[static_cast<int64_t>(global_row(blocks, row)) * w.padded + global_row(blocks, column)];
    pair.turned[row * kLine + column] = row == column ? 1.0f : 0.0f;
  }
  if (thread < kTile) {
    const int row = global_row(blocks, thread);
    pair.norms[thread] = row < w.n ? sqrtf(w.diagonal[row]) : 0.0f;
  }
  __syncthreads();
  // In the first pass nothing is known of sigma_1 yet; where no stand-ins are wanted, later passes leave
  // noise alone.
  const float quiet = pass == 1 || complete ? -3.0e38f : asleep_norm(*state, w, complete);
  const Skip skip = {0.5f * tolerance(w.m), quiet};
  const int size = single ? ceil_div(w.n, 2) * 2 : kTile;
  bool any = false;
  for (int sweep = now.sweep; sweep < (single ? sweeps : now.sweep + 1); ++sweep) {
    const bool own = sweep_pair(pair, size, single || now.step == 0, skip);
    if (thread < kBlock) pair.rotated[thread] = own;
    __syncthreads();
    bool found = false;
    for (int t = 0; t < kBlock; ++t) found = found || pair.rotated[t];
    if (found && thread == 0) state->active[pass * kMaxSweeps + sweep] = 1;
    any = any || found;
    if (!found) break;
  }
  if (!single && thread == 0) w.turned[at.item] = any;
  if (!any) return;
  float* turns = w.turns + at.item * kTile * kTile;
  for (int index = thread; index < kTile * kTile; index += kThreads) {
    const int row = index / kTile, column = index % kTile;
    w.gram[static_cast<int64_t>(global_row(blocks, row)) * w.padded + global_row(blocks, column)] =
        pair.gram[row * kLine + column];
    if (single) {
      w.basis[index] = pair.turned[column * kLine + row];
    } else {
      turns[index] = pair.turned[row * kLine + column];
    }
  }
}

// target[own part] of turn^T source, both 64 x 64; `turn` is a solve_kernel's rotation.
__device__ __forceinline__ void load_tile(const float* source, float* target) {
  for (int index = threadIdx.x; index < kTile * kTile; index += kThreads)
    target[index / kTile * kStride + index % kTile] = source[index];
}

// One tile a block: of the Gram matrix below the diagonal (mirrored above it), then of the basis.
static __global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Batch batch, int pass, int round, int sweeps) {
  FASTRANK_SHARED(float, left);  // kTurnFloats
  float* right = left + kTile * kStride;
  const Place at = place(batch);
  const State* state = state_of(batch, at.matrix);
  const Work w = work_of(batch, at.matrix);
  const Turn now = turn(*state, w, pass, round, sweeps);
  if (!now.live) return;
  const int tiles = w.pairs * (w.pairs - 1) / 2;
  const bool of_gram = at.item < tiles;
  const TilePair below = lower_tile(at.item);  // strictly below the diagonal: one row further down
  const int p = of_gram ? below.row + 1 : (at.item - tiles) / w.pairs;
  const int q = of_gram ? below.column : (at.item - tiles) % w.pairs;
  if (!w.turned[p] && !(of_gram && w.turned[q])) return;
  const Two rows = meeting(w.blocks, now.step, p);
  const Two columns = of_gram ? meeting(w.blocks, now.step, q) : Two{2 * q, 2 * q + 1};
  float* matrix = of_gram ? w.gram : w.basis;
  for (int index = threadIdx.x; index < kTile * kTile; index += kThreads) {
    const int row = index / kTile, column = index % kTile;
    right[row * kStride + column] =
        matrix[static_cast<int64_t>(global_row(rows, row)) * w.padded + global_row(columns, column)];
    if (!w.turned[p]) left[row * kStride + column] = row == column ? 1.0f : 0.0f;
  }
  if (w.turned[p]) load_tile(w.turns + p * kTile * kTile, left);
  __syncthreads();
  Fragment sum = {};
  multiply<kTile>(left, right, sum);
  if (of_gram && w.turned[q]) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        left[(own_column() + c) * kStride + own_row() + r] = sum[r][c];
        sum[r][c] = 0.0f;
      }
    }
    load_tile(w.turns + q * kTile * kTile, right);
    __syncthreads();
    multiply<kTile>(left, right, sum);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = global_row(rows, own_row() + r);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = global_row(columns, own_column() + c);
      matrix[static_cast<int64_t>(row) * w.padded + column] = sum[r][c];
      if (of_gram) matrix[static_cast<int64_t>(column) * w.padded + row] = sum[r][c];
    }
  }
}

}  // namespace fastrank::linalg
