// Gated factors and gates, over lists of tensors: launchers on raw pointers, and the plans they launch by.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastrank::gates {

constexpr int kThreads = 256;
constexpr int kPackBytes = 16;
constexpr int kHeld = 8;       // packs of a slice that a thread keeps in registers between its two uses
constexpr int kHeldPairs = 4;  // the same of the backward pass, which keeps two packs for one
constexpr int kFewLanes = 8;   // threads that take a short slice: 128 bytes an access
constexpr int64_t kChunk = 16 * kThreads;  // gates that a block takes

// How a tensor of a list is laid over threads.
struct Plan {
  int lanes;       // threads a slice: 8, 16 or 32 in a warp, or kThreads
  int pack;        // elements a memory instruction moves
  int64_t blocks;  // 0 where there is nothing to do
};

// The slices of a factor: as few lanes as hold one, so that one reading is enough, and beyond a warp a block.
// `aligned`: every pointer involved is a multiple of kPackBytes.
constexpr Plan slices_plan(int64_t rows, int64_t row_size, int bytes, bool aligned) {
  const int pack = aligned && row_size * bytes % kPackBytes == 0 ? kPackBytes / bytes : 1;
  const int64_t packs = row_size / pack;
  int lanes = kFewLanes;
  while (lanes < 32 && packs > lanes * kHeld) lanes *= 2;
  if (packs > lanes * kHeld) lanes = kThreads;
  const int64_t rows_per_block = kThreads / lanes;
  return {lanes, pack, row_size > 0 ? (rows + rows_per_block - 1) / rows_per_block : 0};
}

// A tensor of gates: kChunk of them a block.
constexpr Plan chunks_plan(int64_t size, int bytes, bool aligned) {
  return {kThreads, aligned ? kPackBytes / bytes : 1, (size + kChunk - 1) / kChunk};
}

// The penalties that have a proximal step. The numbers are those of fastrank/ops/_gates.py.
enum class Penalty : int { kFunnel = 0, kL1 = 1, kL2 = 2 };

// directions[i] and outs[i] (rows[i], row_sizes[i]), gates[i] (rows[i],):
// outs[i][j] = gates[i][j] * directions[i][j] / |directions[i][j]|.
void gated_factors(void* const* directions, void* const* gates, void* const* outs, const int64_t* rows,
                   const int64_t* row_sizes, int count, DType dtype, void* stream);

// Gradients of the above from grads[i] (rows[i], row_sizes[i]).
void gated_factors_backward(void* const* grads, void* const* directions, void* const* gates,
                            void* const* grad_directions, void* const* grad_gates, const int64_t* rows,
                            const int64_t* row_sizes, int count, DType dtype, void* stream);

// out (1,) float32 = scale * sum |g| / (|g| + c) over `count` tensors; partials holds one float32 a chunk.
void funnel_penalty(void* const* gates, const int64_t* sizes, int count, float c, float scale,
                    float* partials, float* out, DType dtype, void* stream);

// grads[i] = grad * scale * F'(gates[i]) with grad a float32 on the device.
void funnel_penalty_backward(const float* grad, void* const* gates, void* const* grads, const int64_t* sizes,
                             int count, float c, float scale, DType dtype, void* stream);

// gates[i] = argmin 1/2 (x - g)^2 + eta * penalty(x), in float64 inside; 0 where |g| <= threshold.
void funnel_proximal(void* const* gates, const int64_t* sizes, int count, double eta, double c,
                     double threshold, Penalty penalty, DType dtype, void* stream);

// counts[i] = how many |g| of gates[i] are below the threshold.
void count_below(void* const* gates, const int64_t* sizes, int count, double threshold, int64_t* counts,
                 DType dtype, void* stream);

}  // namespace fastrank::gates
