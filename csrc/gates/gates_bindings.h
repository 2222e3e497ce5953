// What fastrank._host shows of the gates: launch plans, tables, and the kernels over float32 memory given by
// address.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "gates/gates.h"
#include "gates/table.cuh"

namespace fastrank::gates {

namespace py = pybind11;
using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<int64_t>;

inline std::vector<void*> pointers(const Addresses& addresses, std::size_t count) {
  if (addresses.size() != count) throw std::runtime_error("a call takes one size a tensor");
  std::vector<void*> out;
  for (const std::uintptr_t a : addresses) out.push_back(reinterpret_cast<void*>(a));
  return out;
}

inline py::dict plan_facts(const Plan& plan) {
  py::dict out;
  out["lanes"] = plan.lanes, out["pack"] = plan.pack, out["blocks"] = plan.blocks, out["threads"] = kThreads;
  return out;
}

// What block `block` of the launches over a list would serve, without launching: for every table the places
// of its tensors in the list, their first blocks, and the blocks of the launch.
template <int kPointers>
py::list tables_of(const Sizes& rows, const Sizes& row_sizes, int bytes) {
  std::vector<void*> places;  // told apart by address alone: nothing is read
  for (std::size_t i = 0; i < rows.size(); ++i)
    places.push_back(reinterpret_cast<void*>(kPackBytes * (i + 1)));
  List<kPointers> list{{}, rows.data(), row_sizes.data(), static_cast<int>(rows.size())};
  for (auto& column : list.columns) column = places.data();
  const auto plan = [&](int i) { return slices_plan(rows[i], row_sizes[i], bytes, list.aligned(i, 1)); };
  py::list found;
  for_tables(list, plan, [&](const auto& table, int64_t blocks) {
    py::list tensors, first;
    for (int t = 0; t < table.count; ++t) {
      tensors.append(reinterpret_cast<std::uintptr_t>(table.entries[t].at[0]) / kPackBytes - 1);
      first.append(table.first[t]);
    }
    py::dict one;
    one["tensors"] = tensors, one["first"] = first, one["blocks"] = blocks, one["bytes"] = sizeof(table);
    found.append(one);
  });
  return found;
}

inline void bind(py::module_& m) {
  m.def(
      "gated_plan",
      [](int64_t rows, int64_t row_size, int bytes, bool aligned) {
        return plan_facts(slices_plan(rows, row_size, bytes, aligned));
      },
      py::arg("rows"), py::arg("row_size"), py::arg("element_bytes"), py::arg("aligned"));
  m.def(
      "gates_plan",
      [](int64_t size, int bytes, bool aligned) { return plan_facts(chunks_plan(size, bytes, aligned)); },
      py::arg("size"), py::arg("element_bytes"), py::arg("aligned"));
  m.def(
      "gated_tables",
      [](const Sizes& rows, const Sizes& row_sizes, int bytes, bool backward) {
        if (rows.size() != row_sizes.size()) throw std::runtime_error("a call takes one size a tensor");
        return backward ? tables_of<5>(rows, row_sizes, bytes) : tables_of<3>(rows, row_sizes, bytes);
      },
      py::arg("rows"), py::arg("row_sizes"), py::arg("element_bytes"), py::arg("backward"));
  m.def("find_entry", [](const std::vector<uint32_t>& first, uint32_t block) {
    return find_entry(first.data(), static_cast<int>(first.size()), block);
  });
  m.def("gated_factors", [](const Addresses& directions, const Addresses& gates, const Addresses& outs,
                            const Sizes& rows, const Sizes& row_sizes) {
    const std::size_t n = rows.size();
    gated_factors(pointers(directions, n).data(), pointers(gates, n).data(), pointers(outs, n).data(),
                  rows.data(), row_sizes.data(), static_cast<int>(n), DType::kFloat32, nullptr);
  });
  m.def("gated_factors_backward", [](const Addresses& grads, const Addresses& directions,
                                     const Addresses& gates, const Addresses& grad_directions,
                                     const Addresses& grad_gates, const Sizes& rows, const Sizes& row_sizes) {
    const std::size_t n = rows.size();
    gated_factors_backward(pointers(grads, n).data(), pointers(directions, n).data(),
                           pointers(gates, n).data(), pointers(grad_directions, n).data(),
                           pointers(grad_gates, n).data(), rows.data(), row_sizes.data(), static_cast<int>(n),
                           DType::kFloat32, nullptr);
  });
  m.def("funnel_penalty", [](const Addresses& gates, const Sizes& sizes, float c, bool normalized,
                             std::uintptr_t partials, std::uintptr_t out) {
    funnel_penalty(pointers(gates, sizes.size()).data(), sizes.data(), static_cast<int>(sizes.size()), c,
                   normalized ? c : 1.0f, reinterpret_cast<float*>(partials), reinterpret_cast<float*>(out),
                   DType::kFloat32, nullptr);
  });
  m.def("funnel_penalty_backward", [](std::uintptr_t grad, const Addresses& gates, const Addresses& grads,
                                      const Sizes& sizes, float c, bool normalized) {
    funnel_penalty_backward(reinterpret_cast<const float*>(grad), pointers(gates, sizes.size()).data(),
                            pointers(grads, sizes.size()).data(), sizes.data(),
                            static_cast<int>(sizes.size()), c, normalized ? c : 1.0f, DType::kFloat32,
                            nullptr);
  });
  m.def("funnel_proximal",
        [](const Addresses& gates, const Sizes& sizes, double eta, double c, double threshold, int penalty) {
          funnel_proximal(pointers(gates, sizes.size()).data(), sizes.data(), static_cast<int>(sizes.size()),
                          eta, c, threshold, static_cast<Penalty>(penalty), DType::kFloat32, nullptr);
        });
  m.def("count_below",
        [](const Addresses& gates, const Sizes& sizes, double threshold, std::uintptr_t counts) {
          count_below(pointers(gates, sizes.size()).data(), sizes.data(), static_cast<int>(sizes.size()),
                      threshold, reinterpret_cast<int64_t*>(counts), DType::kFloat32, nullptr);
        });
}

}  // namespace fastrank::gates
