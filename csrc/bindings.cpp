// The pybind11 module fastrank._host: what this build is, the launch plans, and the kernels compiled for the
// host. It needs no torch: tensors come as addresses of float32 memory that the caller keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>
#include <vector>

#include "gates/gates.cu"
#include "linalg/linalg.cu"
#include "linalg/linalg_bindings.h"
#include "tucker2/ampere.cu"
#include "tucker2/arguments.cu"
#include "tucker2/hopper.cu"
#include "tucker2/pack.cu"
#include "tucker2/tucker2_bindings.h"

namespace py = pybind11;

namespace fastrank {
namespace {

float* floats(std::uintptr_t address) {
  return reinterpret_cast<float*>(address);
}

std::vector<void*> pointers(const std::vector<std::uintptr_t>& addresses) {
  std::vector<void*> out;
  for (const std::uintptr_t a : addresses) out.push_back(floats(a));
  return out;
}

void check_lengths(std::size_t have, std::size_t want) {
  if (have != want) throw std::runtime_error("a funnel call takes one size a tensor");
}

py::dict build_facts() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
  facts["cplusplus"] = static_cast<long>(__cplusplus);
  facts["nvcc"] = FASTRANK_NVCC;
  facts["archs"] = FASTRANK_ARCHS;
  return facts;
}

py::dict gated_plan(int64_t rows, int64_t row_size, int bytes, bool aligned, int sums) {
  const gates::GatedPlan plan = gates::gated_plan(rows, row_size, bytes, aligned, sums);
  py::dict out;
  out["lanes"] = plan.lanes;
  out["pack"] = plan.pack;
  out["blocks"] = plan.blocks;
  out["threads"] = gates::kThreads;
  out["shared_bytes"] = plan.shared_bytes;
  return out;
}

void gated_factor(std::uintptr_t direction, std::uintptr_t gate, std::uintptr_t out, int64_t rows,
                  int64_t row_size) {
  gates::gated_factor(floats(direction), floats(gate), floats(out), rows, row_size, DType::kFloat32, nullptr);
}

void gated_factor_backward(std::uintptr_t grad, std::uintptr_t direction, std::uintptr_t gate,
                           std::uintptr_t grad_direction, std::uintptr_t grad_gate, int64_t rows,
                           int64_t row_size) {
  gates::gated_factor_backward(floats(grad), floats(direction), floats(gate), floats(grad_direction),
                               floats(grad_gate), rows, row_size, DType::kFloat32, nullptr);
}

void funnel_penalty(const std::vector<std::uintptr_t>& gates, const std::vector<int64_t>& sizes, float c,
                    bool normalized, std::uintptr_t partials, std::uintptr_t out) {
  check_lengths(sizes.size(), gates.size());
  const std::vector<void*> table = pointers(gates);
  gates::funnel_penalty(table.data(), sizes.data(), static_cast<int>(sizes.size()), c, normalized ? c : 1.0f,
                        floats(partials), floats(out), DType::kFloat32, nullptr);
}

void funnel_penalty_backward(std::uintptr_t grad, const std::vector<std::uintptr_t>& gates,
                             const std::vector<std::uintptr_t>& grads, const std::vector<int64_t>& sizes,
                             float c, bool normalized) {
  check_lengths(sizes.size(), gates.size());
  check_lengths(sizes.size(), grads.size());
  const std::vector<void*> table = pointers(gates), targets = pointers(grads);
  gates::funnel_penalty_backward(floats(grad), table.data(), targets.data(), sizes.data(),
                                 static_cast<int>(sizes.size()), c, normalized ? c : 1.0f, DType::kFloat32,
                                 nullptr);
}

}  // namespace
}  // namespace fastrank

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, launch plans, and the CUDA kernels compiled for the host (float32, addresses in).";
  m.def("build_facts", &fastrank::build_facts);
  m.def("gated_plan", &fastrank::gated_plan, py::arg("rows"), py::arg("row_size"), py::arg("element_bytes"),
        py::arg("aligned"), py::arg("sums"));
  m.def("gated_factor", &fastrank::gated_factor);
  m.def("gated_factor_backward", &fastrank::gated_factor_backward);
  m.def("funnel_chunks", &fastrank::gates::funnel_chunks);
  m.def("funnel_penalty", &fastrank::funnel_penalty);
  m.def("funnel_penalty_backward", &fastrank::funnel_penalty_backward);
  fastrank::linalg::bind(m);
  fastrank::tucker2::bind(m);
}
