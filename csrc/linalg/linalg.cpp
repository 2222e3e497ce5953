// The CUDA implementations of launch_spectral and launch_svd: check, unpack pointers, launch on torch's
// current stream. Outputs, state and workspace are allocated by the caller (fastrank/ops/_linalg_kernels.py).
#include "linalg/linalg.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"

namespace fastrank::linalg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

void check_buffer(const Tensor& t, const Tensor& like, ScalarType dtype, int64_t least, const char* name,
                  const char* expected) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        "on the CUDA device of the matrices");
  check(t.is_contiguous() && t.scalar_type() == dtype && t.numel() >= least, name, expected);
}

std::vector<Matrix> unpack(const std::vector<Tensor>& tensors) {
  check(!tensors.empty(), "matrices", "a list of one matrix or more");
  std::vector<Matrix> out;
  for (const Tensor& t : tensors) {
    check(t.is_cuda() && t.get_device_index() == tensors[0].get_device_index(), "matrices",
          "on one CUDA device");
    check(t.dim() == 2 && t.numel() > 0, "matrices", "2-D and not empty");
    out.push_back({t.data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1), dtype_of(t, "matrices")});
  }
  return out;
}

// What both operators check of what they share.
struct Call {
  std::vector<Matrix> matrices;
  Limits limits;
  int count;

  Call(const std::vector<Tensor>& tensors, const std::vector<int64_t>& places,
       const std::vector<int64_t>& limit, const Tensor& status, const Tensor& state, const Tensor& workspace)
      : matrices(unpack(tensors)), count(static_cast<int>(tensors.size())) {
    check(limit.size() == 3, "limits", "three integers");
    limits = {static_cast<int>(limit[0]), static_cast<int>(limit[1]), static_cast<int>(limit[2])};
    check(places.size() == tensors.size(), "places", "one integer a matrix");
    for (const int64_t place : places) check(place >= 0 && place < status.numel(), "places", "within status");
    int64_t floats = 0;
    for (const Matrix& m : matrices) floats += workspace_floats(m.rows, m.columns);
    check_buffer(status, tensors[0], ScalarType::Int, 1, "status", "a contiguous int32 tensor");
    check_buffer(state, tensors[0], ScalarType::Int, count * static_cast<int64_t>(kStateInts), "state",
                 "contiguous int32 zeros, kStateInts a matrix");
    check_buffer(workspace, tensors[0], ScalarType::Float, floats, "workspace",
                 "contiguous float32, workspace_floats each");
  }
};

std::vector<float*> factor_pointers(const std::vector<Tensor>& tensors, const Call& call, const Tensor& like,
                                    const char* name, bool by_short, bool by_long) {
  check(tensors.size() == call.matrices.size(), name, "one tensor a matrix");
  std::vector<float*> out;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Matrix& m = call.matrices[i];
    const int64_t n = std::min(m.rows, m.columns);
    const int64_t size = n * (by_long ? std::max(m.rows, m.columns) : by_short ? n : 1);
    check_buffer(tensors[i], like, ScalarType::Float, size, name,
                 "contiguous float32 of the size of its factor");
    out.push_back(static_cast<float*>(tensors[i].data_ptr()));
  }
  return out;
}

void launch_spectral(const std::vector<Tensor>& matrices, const std::vector<Tensor>& outs,
                     const std::vector<int64_t>& places, bool subgradient, double energy,
                     const std::vector<int64_t>& limits, Tensor& ranks, Tensor& status, Tensor& state,
                     Tensor& workspace) {
  const Call call(matrices, places, limits, status, state, workspace);
  check(subgradient || energy > 0.0, "energy", "above 0 for a projection");
  check(outs.size() == matrices.size(), "outs", "one tensor a matrix");
  std::vector<void*> targets;
  for (std::size_t i = 0; i < outs.size(); ++i) {
    check_like(outs[i], matrices[i], "outs");
    check(outs[i].is_contiguous(), "outs", "contiguous");
    targets.push_back(outs[i].data_ptr());
  }
  check_buffer(ranks, matrices[0], ScalarType::Long, status.numel(), "ranks",
               "contiguous int64, as long as status");
  const DeviceGuard guard(matrices[0].get_device_index());
  spectral(call.matrices.data(), targets.data(), places.data(), call.count, subgradient, energy, call.limits,
           static_cast<int64_t*>(ranks.data_ptr()), static_cast<int*>(status.data_ptr()),
           static_cast<int*>(state.data_ptr()), static_cast<float*>(workspace.data_ptr()),
           current_stream(matrices[0]));
}

void launch_svd(const std::vector<Tensor>& matrices, const std::vector<Tensor>& left,
                const std::vector<Tensor>& values, const std::vector<Tensor>& right,
                const std::vector<int64_t>& places, const std::vector<int64_t>& limits, Tensor& status,
                Tensor& state, Tensor& workspace) {
  const Call call(matrices, places, limits, status, state, workspace);
  const std::vector<float*> q = factor_pointers(left, call, matrices[0], "left", true, false);
  const std::vector<float*> s = factor_pointers(values, call, matrices[0], "values", false, false);
  const std::vector<float*> v = factor_pointers(right, call, matrices[0], "right", true, true);
  const DeviceGuard guard(matrices[0].get_device_index());
  svd(call.matrices.data(), q.data(), s.data(), v.data(), places.data(), call.count, call.limits,
      static_cast<int*>(status.data_ptr()), static_cast<int*>(state.data_ptr()),
      static_cast<float*>(workspace.data_ptr()), current_stream(matrices[0]));
}

}  // namespace
}  // namespace fastrank::linalg

STABLE_TORCH_LIBRARY_IMPL(fastrank, CUDA, m) {
  m.impl("launch_spectral", TORCH_BOX(&fastrank::linalg::launch_spectral));
  m.impl("launch_svd", TORCH_BOX(&fastrank::linalg::launch_svd));
}
