// The fused Tucker-2 convolution: launchers over raw pointers. 16-bit dtypes; sums in float32.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "tucker2/plan.h"

namespace fastrank::tucker2 {

enum class Activation { kNone, kRelu, kSilu };

// A 4-D tensor (N, C, H, W) by its strides, in elements.
struct View {
  void* data;
  int64_t n, c, h, w;
};

// The factors w_in (R_in, I), core (R_out, R_in, kh, kw) and w_out (O, R_out) by their strides in elements;
// bias (O,) or nullptr. `flip` turns the core upside down and left to right, which makes the convolution with
// transposed factors the gradient of its input.
struct Factors {
  const void *w_in, *core, *w_out, *bias;
  int64_t in_rank, in_channel;
  int64_t core_out, core_in, core_y, core_x;
  int64_t out_channel, out_rank;
  bool flip;
};

// What a kernel is launched with.
struct Arguments {
  Sizes sizes;
  Stream stream;
  Plan plan;
  View x, residual, out;  // residual.data may be nullptr
  const unsigned char* packed;
  Activation activation;
  bool whole_rows;  // 16 bytes of neighbouring channels move at a time, in the output and the residual
  bool whole_x;     // and in x, along whose box a tensor map can go
};

// Stream::packed_bytes() bytes, 16-byte aligned, from the factors, for tiles that `split` blocks share.
void pack(const Sizes& sizes, int split, const Factors& factors, void* packed, DType dtype, void* stream);

// The arguments of a call, planned for the card and the split that the weights were packed for. Raises
// std::runtime_error where no plan fits.
Arguments arguments_for(const Sizes& sizes, int split, const Card& card, const View& x, const void* packed,
                        const View& residual, const View& out, Activation activation);

// A CUDA device: its card, and whether the Hopper kernels run on it. Asked for once a thread.
struct Device {
  bool known, hopper;
  Card card;
};
const Device& device(int index);

// Why a convolution cannot be planned, as the end of a sentence.
const char* reason(Refusal refusal);

// out = activation(convolution + bias + residual) by a plan for this kind of card. Raises std::runtime_error
// where a launch fails.
void convolve_hopper(const Arguments& arguments, DType dtype, int multiprocessors, void* stream);
void convolve_ampere(const Arguments& arguments, DType dtype, void* stream);

}  // namespace fastrank::tucker2
