// fastrank._host: the spectral kernels compiled for the host. Include after linalg/linalg.cu.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "linalg/linalg.h"

namespace fastrank::linalg {

using Address = std::uintptr_t;
using Layout = std::array<int64_t, 4>;  // rows, columns, and the strides of both in elements

inline std::vector<Matrix> matrices_at(const std::vector<Address>& data, const std::vector<Layout>& layouts) {
  if (data.size() != layouts.size()) throw std::runtime_error("a spectral call takes one layout a matrix");
  std::vector<Matrix> out;
  for (std::size_t i = 0; i < data.size(); ++i) {
    const Layout& at = layouts[i];
    out.push_back({reinterpret_cast<const void*>(data[i]), at[0], at[1], at[2], at[3], DType::kFloat32});
  }
  return out;
}

template <typename T>
std::vector<T*> pointers_to(const std::vector<Address>& addresses, std::size_t count) {
  if (addresses.size() != count) throw std::runtime_error("a spectral call takes one output a matrix");
  std::vector<T*> out;
  for (const Address a : addresses) out.push_back(reinterpret_cast<T*>(a));
  return out;
}

inline const int64_t* checked(const std::vector<int64_t>& places, std::size_t count) {
  if (places.size() != count) throw std::runtime_error("a spectral call takes one place a matrix");
  return places.data();
}

inline Limits limits_of(const std::array<int, 3>& limits) {
  return {limits[0], limits[1], limits[2]};
}

inline void bind(pybind11::module_& m) {
  m.def("linalg_workspace", &workspace_floats, pybind11::arg("rows"), pybind11::arg("columns"));
  m.def("linalg_constants", [] {
    return std::map<std::string, int>{
        {"state_ints", kStateInts},       {"table_matrices", kTableMatrices}, {"tile", kTile},
        {"gram_partials", kGramPartials}, {"max_sweeps", kMaxSweeps},         {"max_passes", kMaxPasses}};
  });
  m.def("linalg_shared_bytes", [] {
    return std::map<std::string, std::size_t>{{"measure_kernel", 0},
                                              {"stage_kernel", kStageBytes},
                                              {"gram_kernel", kProductBytes},
                                              {"assemble_kernel", kAssembleBytes},
                                              {"solve_kernel", kSolveBytes},
                                              {"update_kernel", kUpdateBytes},
                                              {"order_kernel", kRankBytes},
                                              {"rotate_kernel", kProductBytes},
                                              {"settle_kernel", 0},
                                              {"finish_kernel", kRankBytes},
                                              {"result_kernel", kProductBytes},
                                              {"factors_kernel", 0}};
  });
  m.def("linalg_meeting", [](int size, int round, int pair) {
    const Two met = meeting(size, round, pair);
    return std::array<int, 2>{met.low, met.high};
  });
  m.def("linalg_spectral", [](const std::vector<Address>& data, const std::vector<Layout>& layouts,
                              const std::vector<Address>& outs, const std::vector<int64_t>& places,
                              bool subgradient, double energy, const std::array<int, 3>& limits,
                              Address ranks, Address status, Address state, Address workspace) {
    const std::vector<Matrix> matrices = matrices_at(data, layouts);
    const std::vector<void*> targets = pointers_to<void>(outs, matrices.size());
    spectral(matrices.data(), targets.data(), checked(places, matrices.size()),
             static_cast<int>(matrices.size()), subgradient, energy, limits_of(limits),
             reinterpret_cast<int64_t*>(ranks), reinterpret_cast<int*>(status), reinterpret_cast<int*>(state),
             reinterpret_cast<float*>(workspace), nullptr);
  });
  m.def("linalg_svd", [](const std::vector<Address>& data, const std::vector<Layout>& layouts,
                         const std::vector<Address>& left, const std::vector<Address>& values,
                         const std::vector<Address>& right, const std::vector<int64_t>& places,
                         const std::array<int, 3>& limits, Address status, Address state, Address workspace) {
    const std::vector<Matrix> matrices = matrices_at(data, layouts);
    const std::size_t count = matrices.size();
    svd(matrices.data(), pointers_to<float>(left, count).data(), pointers_to<float>(values, count).data(),
        pointers_to<float>(right, count).data(), checked(places, count), static_cast<int>(count),
        limits_of(limits), reinterpret_cast<int*>(status), reinterpret_cast<int*>(state),
        reinterpret_cast<float*>(workspace), nullptr);
  });
}

}  // namespace fastrank::linalg
