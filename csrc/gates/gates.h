// Gated factors and the funnel penalty: launchers over raw pointers, and the plans they launch by.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastrank::gates {

constexpr int kThreads = 256;
constexpr int64_t kWarpRowLimit = 1024;  // up to here a warp takes a row, beyond it a block does
constexpr int kPackBytes = 16;
constexpr int kTableTensors = 64;  // tensors a launch: the table of pointers travels as a kernel argument
constexpr int64_t kChunk = 16 * kThreads;  // gates a block sums

// How the rows of a factor are laid over threads.
struct GatedPlan {
  int lanes;       // threads a row: 32 or kThreads
  int pack;        // elements a memory instruction moves
  int64_t blocks;  // 0 where there is nothing to do
  int shared_bytes;
};

// `aligned`: every pointer involved is a multiple of kPackBytes. `sums`: reductions the kernel makes a row.
constexpr GatedPlan gated_plan(int64_t rows, int64_t row_size, int bytes, bool aligned, int sums) {
  const int lanes = row_size <= kWarpRowLimit ? 32 : kThreads;
  const bool packed = aligned && row_size * bytes % kPackBytes == 0;
  const int64_t rows_per_block = kThreads / lanes;
  const int64_t blocks = row_size > 0 ? (rows + rows_per_block - 1) / rows_per_block : 0;
  const int shared = lanes == kThreads ? sums * (kThreads / 32) * static_cast<int>(sizeof(float)) : 0;
  return {lanes, packed ? kPackBytes / bytes : 1, blocks, shared};
}

// Blocks, and so partial sums, that the funnel penalty takes for a tensor of `size` gates.
constexpr int64_t funnel_chunks(int64_t size) {
  return (size + kChunk - 1) / kChunk;
}

// direction and out (rows, row_size), gate (rows,): out[j] = gate[j] * direction[j] / |direction[j]|.
void gated_factor(const void* direction, const void* gate, void* out, int64_t rows, int64_t row_size,
                  DType dtype, void* stream);

// Gradients of the above from grad (rows, row_size); one reading of grad and direction gives both.
void gated_factor_backward(const void* grad, const void* direction, const void* gate, void* grad_direction,
                           void* grad_gate, int64_t rows, int64_t row_size, DType dtype, void* stream);

// out (1,) float32 = scale * sum |g| / (|g| + c) over `count` tensors; partials holds one float32 a chunk.
void funnel_penalty(const void* const* gates, const int64_t* sizes, int count, float c, float scale,
                    float* partials, float* out, DType dtype, void* stream);

// grads[i] = grad * scale * F'(gates[i]) with grad a float32 on the device.
void funnel_penalty_backward(const float* grad, const void* const* gates, void* const* grads,
                             const int64_t* sizes, int count, float c, float scale, DType dtype,
                             void* stream);

}  // namespace fastrank::gates
