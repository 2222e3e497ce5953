// The pybind11 module fastrank._host: what this build is, the launch plans, and the kernels compiled for the
// host. It needs no torch: tensors come as addresses of float32 memory that the caller keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gates/gates.cu"
#include "gates/gates_bindings.h"
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

}  // namespace
}  // namespace fastrank

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, launch plans, and the CUDA kernels compiled for the host (float32, addresses in).";
  m.def("build_facts", &fastrank::build_facts);
  fastrank::gates::bind(m);
  fastrank::linalg::bind(m);
  fastrank::tucker2::bind(m);
}
