// The CUDA implementations of launch_tucker2*: check, unpack, launch on torch's current stream. The caller
// (fastrank/ops/_tucker2_kernels.py) allocates outputs and owns gradients.
#include "tucker2/tucker2.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/checks.h"

namespace fastrank::tucker2 {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_half(const Tensor& t, const Tensor& first, const char* name) {
  check(t.is_cuda() && t.get_device_index() == first.get_device_index(), name,
        "on the CUDA device of the first tensor");
  check(t.scalar_type() == first.scalar_type(), name, "of the dtype of the first tensor");
}

DType half_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  check(dtype != DType::kFloat32, name, "float16 or bfloat16");
  return dtype;
}

View view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

int narrow(int64_t value, const char* name) {
  check(value >= 0 && value <= 0x7fffffff, name, "between 0 and 2^31 - 1");
  return static_cast<int>(value);
}

void launch_tucker2_pack(const Tensor& w_in, const Tensor& core, const Tensor& w_out,
                         std::optional<Tensor> bias, bool flip, int64_t split, Tensor& packed) {
  check(w_in.is_cuda() && w_in.dim() == 2, "w_in", "a CUDA tensor (R_in, I)");
  check(core.dim() == 4 && core.size(1) == w_in.size(0), "core", "a tensor (R_out, R_in, kh, kw)");
  check(w_out.dim() == 2 && w_out.size(1) == core.size(0), "w_out", "a tensor (O, R_out)");
  check_half(core, w_in, "core");
  check_half(w_out, w_in, "w_out");
  if (bias) {
    check_half(*bias, w_in, "bias");
    check(bias->is_contiguous() && bias->numel() == w_out.size(0), "bias", "a contiguous tensor (O,)");
  }
  Sizes s{};
  s.in_channels = narrow(w_in.size(1), "I"), s.rank_in = narrow(w_in.size(0), "R_in");
  s.rank_out = narrow(core.size(0), "R_out"), s.out_channels = narrow(w_out.size(0), "O");
  s.kernel_h = narrow(core.size(2), "kh"), s.kernel_w = narrow(core.size(3), "kw");
  check(split >= 1 && split <= kMaxSplit, "split", "between 1 and 8");
  const int blocks = static_cast<int>(split);
  check(Stream::of(s, blocks).p2 > 0, "R_out", "at most 224 a block");
  check(packed.is_cuda() && packed.is_contiguous() && packed.get_device_index() == w_in.get_device_index() &&
            packed.scalar_type() == torch::headeronly::ScalarType::Byte &&
            packed.numel() >= Stream::of(s, blocks).packed_bytes() &&
            reinterpret_cast<std::uintptr_t>(packed.data_ptr()) % 16 == 0,
        "packed", "as many aligned bytes as the packed weights take, on the device of w_in");
  const DeviceGuard guard(w_in.get_device_index());
  const Factors f{w_in.data_ptr(),
                  core.data_ptr(),
                  w_out.data_ptr(),
                  bias ? bias->data_ptr() : nullptr,
                  w_in.stride(0),
                  w_in.stride(1),
                  core.stride(0),
                  core.stride(1),
                  core.stride(2),
                  core.stride(3),
                  w_out.stride(0),
                  w_out.stride(1),
                  flip};
  pack(s, blocks, f, packed.data_ptr(), half_of(w_in, "w_in"), current_stream(w_in));
}

// shape: R_in, R_out, kh, kw, and the split that the weights were packed for.
void launch_tucker2(const Tensor& x, const Tensor& packed, std::optional<Tensor> residual, Tensor& out,
                    std::vector<int64_t> shape, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t activation) {
  check(x.is_cuda() && x.dim() == 4, "x", "a CUDA tensor (N, I, H, W)");
  check_half(out, x, "out");
  check(shape.size() == 5 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "shape",
        "R_in, R_out, kh, kw, split, with pairs behind it");
  Sizes s{};
  s.batch = x.size(0), s.in_channels = narrow(x.size(1), "I");
  s.height = narrow(x.size(2), "H"), s.width = narrow(x.size(3), "W");
  s.rank_in = narrow(shape[0], "R_in"), s.rank_out = narrow(shape[1], "R_out");
  s.kernel_h = narrow(shape[2], "kh"), s.kernel_w = narrow(shape[3], "kw");
  s.stride_h = narrow(stride[0], "stride"), s.stride_w = narrow(stride[1], "stride");
  s.pad_h = narrow(padding[0], "padding"), s.pad_w = narrow(padding[1], "padding");
  s.dilation_h = narrow(dilation[0], "dilation"), s.dilation_w = narrow(dilation[1], "dilation");
  check(out.dim() == 4 && out.size(0) == s.batch && out.size(2) == s.out_height() &&
            out.size(3) == s.out_width(),
        "out", "of the shape of the output");
  s.out_channels = narrow(out.size(1), "O");
  const int split = narrow(shape[4], "split");
  check(split >= 1 && split <= kMaxSplit, "split", "between 1 and 8");
  if (out.numel() == 0) return;
  check(packed.is_cuda() && packed.get_device_index() == x.get_device_index() &&
            packed.numel() >= Stream::of(s, split).packed_bytes(),
        "packed", "the packed weights of this convolution, on the device of x");
  View added{};
  if (residual) {
    check_half(*residual, x, "residual");
    check(residual->dim() == 4 && residual->numel() == out.numel(), "residual", "of the shape of the output");
    added = view_of(*residual);
  }
  const DeviceGuard guard(x.get_device_index());
  const Device& d = device(x.get_device_index());
  const Arguments a = arguments_for(s, split, d.card, view_of(x), packed.data_ptr(), added, view_of(out),
                                    static_cast<Activation>(activation));
  if (d.hopper) {
    convolve_hopper(a, half_of(x, "x"), d.card.multiprocessors, current_stream(x));
  } else {
    convolve_ampere(a, half_of(x, "x"), current_stream(x));
  }
}

}  // namespace
}  // namespace fastrank::tucker2

STABLE_TORCH_LIBRARY_IMPL(fastrank, CUDA, m) {
  m.impl("launch_tucker2_pack", TORCH_BOX(&fastrank::tucker2::launch_tucker2_pack));
  m.impl("launch_tucker2", TORCH_BOX(&fastrank::tucker2::launch_tucker2));
}
