// The launch sequence. Compiled by nvcc, and once more as plain C++ by bindings.cpp for the host.
//
// The sequence depends on shapes alone: what a matrix no longer needs, its blocks see from the state on the
// device and return from. So nothing synchronises, and the calls can be captured in a CUDA graph.
#include <algorithm>

#include "common/launch.cuh"
#include "linalg/finish_kernels.cuh"
#include "linalg/jacobi_kernels.cuh"
#include "linalg/linalg.h"
#include "linalg/prepare_kernels.cuh"

namespace fastrank::linalg {
namespace {

constexpr std::size_t bytes(int floats) {
  return static_cast<std::size_t>(floats) * sizeof(float);
}

constexpr std::size_t kStageBytes = bytes(kTile * (kTile + 1));
constexpr std::size_t kAssembleBytes = bytes(kTile * (kTile + 1) + 4 * kTile);
constexpr std::size_t kProductBytes = bytes(kProductFloats);
constexpr std::size_t kSolveBytes = bytes(kSolveFloats);
constexpr std::size_t kUpdateBytes = bytes(kTurnFloats);
constexpr std::size_t kRankBytes = kRankDoubles * sizeof(double);

class Call {
 public:
  Call(const Matrix* matrices, const int64_t* places, int count, Limits limits, int* state, float* workspace,
       void* stream)
      : limits_(limits), stream_(stream) {
    if (count < 1 || count > kTableMatrices) {
      throw std::runtime_error("a call takes 1 to " + std::to_string(kTableMatrices) + " matrices, got " +
                               std::to_string(count));
    }
    check_limit("first_sweeps", limits.first_sweeps, kMaxSweeps);
    check_limit("later_sweeps", limits.later_sweeps, kMaxSweeps);
    check_limit("passes", limits.passes, kMaxPasses);
    batch_.count = count;
    batch_.state = state;
    for (int i = 0; i < count; ++i) {
      const Matrix& a = matrices[i];
      const bool transposed = a.rows > a.columns;
      const int64_t n = transposed ? a.columns : a.rows, m = transposed ? a.rows : a.columns;
      // Indices into [B | Q^T] are 32 bits wide.
      if (n < 1 || m > 0x3fffffff || n * (m + n) > 0x7fffffff) {
        throw std::runtime_error(
            "a matrix (n, m), n <= m, must have n * (m + n) between 1 and 2^31 - 1, got " +
            std::to_string(n) + " and " + std::to_string(m));
      }
      batch_.n[i] = static_cast<int>(n), batch_.m[i] = static_cast<int>(m);
      places_.at[i] = static_cast<int>(places[i]);
      batch_.workspace[i] = workspace;
      workspace += workspace_floats(n, m);
      inputs_.data[i] = a.data;
      inputs_.row_stride[i] = transposed ? a.column_stride : a.row_stride;
      inputs_.column_stride[i] = transposed ? a.row_stride : a.column_stride;
      inputs_.dtype[i] = static_cast<unsigned char>(a.dtype);
#ifndef __CUDACC__
      if (a.dtype != DType::kFloat32)
        throw std::runtime_error("this build of the kernels does not have the dtype");
#endif
    }
  }

  // Everything up to orthogonal rows. `energy` as order_kernel takes it.
  void orthogonalise(bool complete, double energy) {
    const auto tiles = [](int rows, int columns) { return ceil_div(rows, kTile) * ceil_div(columns, kTile); };
    run(measure_kernel, 0, [&](int n, int m) { return tiles(n, m); }, inputs_);
    run(stage_kernel, kStageBytes, [&](int n, int m) { return tiles(n, m + n); }, inputs_);
    test(1, complete);
    for (int pass = 1; pass <= limits_.passes; ++pass) {
      const int sweeps = pass == 1 ? limits_.first_sweeps : limits_.later_sweeps;
      diagonalise(pass, sweeps, complete);
      each(order_kernel, pass, sweeps, energy);
      run(rotate_kernel, kProductBytes, [&](int n, int m) { return tiles(n, m + n); }, pass);
      run(settle_kernel, 0, [](int n, int) { return ceil_div(n, kThreads / kWarpSize); }, pass, complete);
      test(pass + 1, complete);
    }
  }

  void finish(Kind kind, const Factors& factors, double energy, int64_t* ranks, int* status) {
    each(finish_kernel, places_, factors, kind, energy, limits_.passes, ranks, status);
  }

  void write(const Outputs& outputs, Kind kind) {
    run(
        result_kernel, kProductBytes, [](int n, int m) { return ceil_div(n, kTile) * ceil_div(m, kTile); },
        outputs, kind, limits_.passes);
  }

  void write(const Factors& factors) {
    run(
        factors_kernel, 0, [](int n, int m) { return n * ceil_div(n + m, kThreads); }, factors,
        limits_.passes);
  }

 private:
  static void check_limit(const char* name, int value, int most) {
    if (value < 1 || value > most) {
      throw std::runtime_error(std::string(name) + " must be between 1 and " + std::to_string(most) +
                               ", got " + std::to_string(value));
    }
  }

  // Launch `kernel` over items(n, m) blocks a matrix.
  template <typename Kernel, typename Items, typename... Arguments>
  void run(Kernel kernel, std::size_t shared, Items items, const Arguments&... arguments) {
    int64_t blocks = 0;
    for (int i = 0; i < batch_.count; ++i) {
      batch_.first[i] = static_cast<int>(blocks);
      blocks += items(batch_.n[i], batch_.m[i]);
    }
    if (blocks > 0)
      launch(kernel, dim3(grid_size(blocks)), dim3(kThreads), shared, stream_, batch_, arguments...);
  }

  // Launch `kernel` over one block a matrix.
  template <typename Kernel, typename... Arguments>
  void each(Kernel kernel, const Arguments&... arguments) {
    launch(kernel, dim3(batch_.count), dim3(kThreads), kRankBytes, stream_, batch_, arguments...);
  }

  void test(int pass, bool complete) {
    const auto tiles = [](int n) { return ceil_div(n, kTile) * (ceil_div(n, kTile) + 1) / 2; };
    run(gram_kernel, kProductBytes, [&](int n, int m) { return tiles(n) * gram_chunks(n, m); }, pass);
    run(assemble_kernel, kAssembleBytes, [&](int n, int) { return tiles(n); }, pass, complete);
  }

  // `sweeps` sweeps of the largest matrix; smaller ones are through theirs earlier, those of one pair in
  // round 0.
  void diagonalise(int pass, int sweeps, bool complete) {
    int most = 1;
    for (int i = 0; i < batch_.count; ++i) most = std::max(most, 2 * ceil_div(batch_.n[i], kTile) - 1);
    const int rounds = most == 1 ? 1 : sweeps * most;
    for (int round = 0; round < rounds; ++round) {
      const auto pairs = [&](int n) {
        const int count = ceil_div(n, kTile);
        const bool open = count == 1 ? round == 0 : round < sweeps * (2 * count - 1);
        return open ? count : 0;
      };
      run(solve_kernel, kSolveBytes, [&](int n, int) { return pairs(n); }, pass, round, sweeps, complete);
      const auto tiles = [&](int n, int) { return pairs(n) > 1 ? pairs(n) * (3 * pairs(n) - 1) / 2 : 0; };
      run(update_kernel, kUpdateBytes, tiles, pass, round, sweeps);
    }
  }

  Batch batch_{};
  Inputs inputs_{};
  Places places_{};
  Limits limits_;
  void* stream_;
};

}  // namespace

int64_t workspace_floats(int64_t rows, int64_t columns) {
  const int64_t n = std::min(rows, columns), m = std::max(rows, columns);
  return work_at(nullptr, static_cast<int>(n), static_cast<int>(m)).floats;
}

void spectral(const Matrix* matrices, void* const* outs, const int64_t* places, int count, bool subgradient,
              double energy, Limits limits, int64_t* ranks, int* status, int* state, float* workspace,
              void* stream) {
  Call call(matrices, places, count, limits, state, workspace, stream);
  Outputs outputs{};
  for (int i = 0; i < count; ++i) {
    outputs.data[i] = outs[i];
    outputs.dtype[i] = static_cast<unsigned char>(matrices[i].dtype);
    outputs.transposed[i] = matrices[i].rows > matrices[i].columns;
  }
  const Kind kind = subgradient ? Kind::kSubgradient : Kind::kProjection;
  call.orthogonalise(/*complete=*/false, energy > 0.0 ? energy : 0.0);
  call.finish(kind, Factors{}, energy, ranks, status);
  call.write(outputs, kind);
}

void svd(const Matrix* matrices, float* const* left, float* const* values, float* const* right,
         const int64_t* places, int count, Limits limits, int* status, int* state, float* workspace,
         void* stream) {
  Call call(matrices, places, count, limits, state, workspace, stream);
  Factors factors{};
  for (int i = 0; i < count; ++i)
    factors.left[i] = left[i], factors.values[i] = values[i], factors.right[i] = right[i];
  call.orthogonalise(/*complete=*/true, /*energy=*/-1.0);
  call.finish(Kind::kFactors, factors, 0.0, nullptr, status);
  call.write(factors);
}

}  // namespace fastrank::linalg
