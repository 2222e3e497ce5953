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

// A list of tensors as the kernels take it: addresses and sizes, all of one dtype and on one device.
struct Columns {
  std::vector<void*> pointers;
  std::vector<int64_t> sizes;

  Columns(const std::vector<Tensor>& tensors, const Tensor& first, const char* name) {
    for (const Tensor& t : tensors) {
      check(t.is_cuda() && t.get_device_index() == first.get_device_index(), name, "on one CUDA device");
      check(t.scalar_type() == first.scalar_type(), name, "of one dtype");
      pointers.push_back(t.data_ptr());
      sizes.push_back(t.numel());
    }
  }
  int count() const { return static_cast<int>(sizes.size()); }
};

// Gates: contiguous.
Columns gates_of(const std::vector<Tensor>& tensors, const Tensor& first, const char* name) {
  for (const Tensor& t : tensors) check(t.is_contiguous(), name, "contiguous");
  return {tensors, first, name};
}

// Factors: slice after slice, of the sizes of `like` where it is given.
Columns factors_of(const std::vector<Tensor>& tensors, const Tensor& first, const char* name,
                   const Columns* like = nullptr) {
  for (const Tensor& t : tensors) check_rows(t, name);
  Columns found(tensors, first, name);
  check(!like || found.sizes == like->sizes, name, "of the sizes of the directions");
  return found;
}

struct Shapes {
  std::vector<int64_t> rows, row_sizes;

  Shapes(const std::vector<Tensor>& directions, const Columns& gates, const char* name) {
    check(directions.size() == gates.sizes.size(), name, "one tensor a direction");
    for (std::size_t i = 0; i < directions.size(); ++i) {
      rows.push_back(directions[i].size(0));
      row_sizes.push_back(rows[i] > 0 ? directions[i].numel() / rows[i] : 0);
      check(gates.sizes[i] == rows[i], name, "of one element a slice");
    }
  }
};

void launch_gated_factors(const std::vector<Tensor>& directions, const std::vector<Tensor>& gates,
                          const std::vector<Tensor>& outs) {
  if (directions.empty()) return;
  const Tensor& first = directions[0];
  const Columns sources = factors_of(directions, first, "directions");
  const Columns targets = factors_of(outs, first, "outs", &sources);
  const Columns scales = gates_of(gates, first, "gates");
  const Shapes shapes(directions, scales, "gates");
  const DeviceGuard guard(first.get_device_index());
  gated_factors(sources.pointers.data(), scales.pointers.data(), targets.pointers.data(), shapes.rows.data(),
                shapes.row_sizes.data(), sources.count(), dtype_of(first, "directions"),
                current_stream(first));
}

void launch_gated_factors_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& directions,
                                   const std::vector<Tensor>& gates,
                                   const std::vector<Tensor>& grad_directions,
                                   const std::vector<Tensor>& grad_gates) {
  if (directions.empty()) return;
  const Tensor& first = directions[0];
  const Columns sources = factors_of(directions, first, "directions");
  const Columns upstream = factors_of(grads, first, "grads", &sources);
  const Columns targets = factors_of(grad_directions, first, "grad_directions", &sources);
  const Columns scales = gates_of(gates, first, "gates");
  const Columns slopes = gates_of(grad_gates, first, "grad_gates");
  const Shapes shapes(directions, scales, "gates");
  check(slopes.sizes == scales.sizes, "grad_gates", "of the sizes of the gates");
  const DeviceGuard guard(first.get_device_index());
  gated_factors_backward(upstream.pointers.data(), sources.pointers.data(), scales.pointers.data(),
                         targets.pointers.data(), slopes.pointers.data(), shapes.rows.data(),
                         shapes.row_sizes.data(), sources.count(), dtype_of(first, "directions"),
                         current_stream(first));
}

void check_scalar(const Tensor& t, const Tensor& like, const char* name) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        "on the CUDA device of the gates");
  check(t.scalar_type() == torch::headeronly::ScalarType::Float && t.numel() == 1, name, "one float32");
}

void launch_funnel_penalty(const std::vector<Tensor>& gates, double c, bool normalized, Tensor& partials,
                           Tensor& out) {
  check(!gates.empty(), "gates", "a list of one tensor or more");
  const Columns table = gates_of(gates, gates[0], "gates");
  int64_t chunks = 0;
  for (const int64_t size : table.sizes) chunks += chunks_plan(size, 1, false).blocks;
  check_scalar(out, gates[0], "out");
  check(partials.is_cuda() && partials.is_contiguous() && partials.numel() >= chunks &&
            partials.scalar_type() == torch::headeronly::ScalarType::Float,
        "partials", "one float32 a chunk");
  const DeviceGuard guard(out.get_device_index());
  funnel_penalty(table.pointers.data(), table.sizes.data(), table.count(), static_cast<float>(c),
                 normalized ? static_cast<float>(c) : 1.0f, static_cast<float*>(partials.data_ptr()),
                 static_cast<float*>(out.data_ptr()), dtype_of(gates[0], "gates"), current_stream(out));
}

void launch_funnel_penalty_backward(const Tensor& grad, const std::vector<Tensor>& gates, double c,
                                    bool normalized, const std::vector<Tensor>& grads) {
  check(!gates.empty() && gates.size() == grads.size(), "grads", "one tensor a gate tensor");
  const Columns table = gates_of(gates, gates[0], "gates");
  const Columns targets = gates_of(grads, gates[0], "grads");
  check(table.sizes == targets.sizes, "grads", "of the sizes of the gates");
  check_scalar(grad, gates[0], "grad");
  const DeviceGuard guard(grad.get_device_index());
  funnel_penalty_backward(static_cast<const float*>(grad.data_ptr()), table.pointers.data(),
                          targets.pointers.data(), table.sizes.data(), table.count(), static_cast<float>(c),
                          normalized ? static_cast<float>(c) : 1.0f, dtype_of(gates[0], "gates"),
                          current_stream(grad));
}

void launch_funnel_proximal(const std::vector<Tensor>& gates, double eta, double c, double threshold,
                            int64_t penalty) {
  if (gates.empty()) return;
  const Columns table = gates_of(gates, gates[0], "gates");
  check(penalty >= 0 && penalty <= 2, "penalty", "0 (funnel), 1 (l1) or 2 (l2)");
  const DeviceGuard guard(gates[0].get_device_index());
  funnel_proximal(table.pointers.data(), table.sizes.data(), table.count(), eta, c, threshold,
                  static_cast<Penalty>(penalty), dtype_of(gates[0], "gates"), current_stream(gates[0]));
}

void launch_count_below(const std::vector<Tensor>& gates, double threshold, Tensor& counts) {
  if (gates.empty()) return;
  const Columns table = gates_of(gates, gates[0], "gates");
  check(counts.is_cuda() && counts.get_device_index() == gates[0].get_device_index() &&
            counts.is_contiguous() && counts.numel() == table.count() &&
            counts.scalar_type() == torch::headeronly::ScalarType::Long,
        "counts", "one int64 a gate tensor, on the CUDA device of the gates");
  const DeviceGuard guard(gates[0].get_device_index());
  count_below(table.pointers.data(), table.sizes.data(), table.count(), threshold,
              static_cast<int64_t*>(counts.data_ptr()), dtype_of(gates[0], "gates"),
              current_stream(gates[0]));
}

}  // namespace
}  // namespace fastrank::gates

STABLE_TORCH_LIBRARY_IMPL(fastrank, CUDA, m) {
  m.impl("launch_gated_factors", TORCH_BOX(&fastrank::gates::launch_gated_factors));
  m.impl("launch_gated_factors_backward", TORCH_BOX(&fastrank::gates::launch_gated_factors_backward));
  m.impl("launch_funnel_penalty", TORCH_BOX(&fastrank::gates::launch_funnel_penalty));
  m.impl("launch_funnel_penalty_backward", TORCH_BOX(&fastrank::gates::launch_funnel_penalty_backward));
  m.impl("launch_funnel_proximal", TORCH_BOX(&fastrank::gates::launch_funnel_proximal));
  m.impl("launch_count_below", TORCH_BOX(&fastrank::gates::launch_count_below));
}
