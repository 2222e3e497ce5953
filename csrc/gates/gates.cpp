// The CUDA implementations of the launch_* operators: check, unpack pointers, launch on torch's current
// stream. Outputs are allocated by the caller (fastrank/ops/gates.py), which also owns shapes, layouts and
// gradients.
#include "gates/gates.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/checks.h"

namespace fastrank::gates {
namespace {

using torch::stable::accelerator::DeviceGuard;

void launch_gated_factor(const Tensor& direction, const Tensor& gate, Tensor& out) {
  check_rows(direction, "direction");
  check_rows(out, "out");
  check_like(out, direction, "out");
  check(gate.is_cuda() && gate.is_contiguous() && gate.numel() == direction.size(0), "gate",
        "one element a slice");
  check(gate.scalar_type() == direction.scalar_type(), "gate", "of the dtype of direction");
  if (direction.numel() == 0) return;
  const DeviceGuard guard(direction.get_device_index());
  const int64_t rows = direction.size(0);
  gated_factor(direction.data_ptr(), gate.data_ptr(), out.data_ptr(), rows, direction.numel() / rows,
               dtype_of(direction, "direction"), current_stream(direction));
}

void launch_gated_factor_backward(const Tensor& grad, const Tensor& direction, const Tensor& gate,
                                  Tensor& grad_direction, Tensor& grad_gate) {
  check_rows(direction, "direction");
  check_rows(grad, "grad");
  check_rows(grad_direction, "grad_direction");
  check_like(grad, direction, "grad");
  check_like(grad_direction, direction, "grad_direction");
  check(gate.is_cuda() && gate.is_contiguous() && gate.numel() == direction.size(0), "gate",
        "one element a slice");
  check(gate.scalar_type() == direction.scalar_type(), "gate", "of the dtype of direction");
  check(grad_gate.is_contiguous(), "grad_gate", "contiguous");
  check_like(grad_gate, gate, "grad_gate");
  if (direction.numel() == 0) return;
  const DeviceGuard guard(direction.get_device_index());
  const int64_t rows = direction.size(0);
  gated_factor_backward(grad.data_ptr(), direction.data_ptr(), gate.data_ptr(), grad_direction.data_ptr(),
                        grad_gate.data_ptr(), rows, direction.numel() / rows,
                        dtype_of(direction, "direction"), current_stream(direction));
}

// Pointers and sizes of contiguous tensors that share dtype and device.
struct TensorTable {
  std::vector<void*> pointers;
  std::vector<int64_t> sizes;
  int64_t chunks = 0;

  TensorTable(const std::vector<Tensor>& tensors, const Tensor& first, const char* name) {
    for (const Tensor& t : tensors) {
      check(t.is_cuda() && t.get_device_index() == first.get_device_index(), name, "on one CUDA device");
      check(t.scalar_type() == first.scalar_type(), name, "of one dtype");
      check(t.is_contiguous(), name, "contiguous");
      pointers.push_back(t.data_ptr());
      sizes.push_back(t.numel());
      chunks += funnel_chunks(t.numel());
    }
  }
};

void check_scalar(const Tensor& t, const Tensor& like, const char* name) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        "on the CUDA device of the gates");
  check(t.scalar_type() == torch::headeronly::ScalarType::Float && t.numel() == 1, name, "one float32");
}

void launch_funnel_penalty(const std::vector<Tensor>& gates, double c, bool normalized, Tensor& partials,
                           Tensor& out) {
  check(!gates.empty(), "gates", "a list of one tensor or more");
  const TensorTable table(gates, gates[0], "gates");
  check_scalar(out, gates[0], "out");
  check(partials.is_cuda() && partials.is_contiguous() && partials.numel() >= table.chunks &&
            partials.scalar_type() == torch::headeronly::ScalarType::Float,
        "partials", "one float32 a chunk");
  const DeviceGuard guard(out.get_device_index());
  funnel_penalty(table.pointers.data(), table.sizes.data(), static_cast<int>(gates.size()),
                 static_cast<float>(c), normalized ? static_cast<float>(c) : 1.0f,
                 static_cast<float*>(partials.data_ptr()), static_cast<float*>(out.data_ptr()),
                 dtype_of(gates[0], "gates"), current_stream(out));
}

void launch_funnel_penalty_backward(const Tensor& grad, const std::vector<Tensor>& gates, double c,
                                    bool normalized, const std::vector<Tensor>& grads) {
  check(!gates.empty() && gates.size() == grads.size(), "grads", "one tensor a gate tensor");
  const TensorTable table(gates, gates[0], "gates");
  const TensorTable targets(grads, gates[0], "grads");
  check(table.sizes == targets.sizes, "grads", "of the sizes of the gates");
  check_scalar(grad, gates[0], "grad");
  const DeviceGuard guard(grad.get_device_index());
  funnel_penalty_backward(static_cast<const float*>(grad.data_ptr()), table.pointers.data(),
                          targets.pointers.data(), table.sizes.data(), static_cast<int>(gates.size()),
                          static_cast<float>(c), normalized ? static_cast<float>(c) : 1.0f,
                          dtype_of(gates[0], "gates"), current_stream(grad));
}

}  // namespace
}  // namespace fastrank::gates

STABLE_TORCH_LIBRARY_IMPL(fastrank, CUDA, m) {
  m.impl("launch_gated_factor", TORCH_BOX(&fastrank::gates::launch_gated_factor));
  m.impl("launch_gated_factor_backward", TORCH_BOX(&fastrank::gates::launch_gated_factor_backward));
  m.impl("launch_funnel_penalty", TORCH_BOX(&fastrank::gates::launch_funnel_penalty));
  m.impl("launch_funnel_penalty_backward", TORCH_BOX(&fastrank::gates::launch_funnel_penalty_backward));
}
