// Every `fastrank::*` operator schema. LibTorch stable ABI: one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastrank, m) {
  // The operators that appear in graphs. Implemented in Python, which chooses the backend; word for word the
  // schemas of fastrank/ops (a test compares them).
  m.def(
      "tucker2_conv2d(Tensor x, Tensor w_in, Tensor core, Tensor w_out, Tensor? bias, Tensor? residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor");
  m.def(
      "cp_conv2d(Tensor x, Tensor pointwise, Tensor vertical, Tensor horizontal, Tensor? bias, Tensor? "
      "residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor");
  m.def(
      "tucker2_conv2d_backward(Tensor grad, Tensor x, Tensor w_in, Tensor core, Tensor w_out, SymInt[2] "
      "stride, "
      "SymInt[2] padding, SymInt[2] dilation, bool[4] needs, str backend) -> Tensor[]");
  m.def(
      "cp_conv2d_backward(Tensor grad, Tensor x, Tensor pointwise, Tensor vertical, Tensor horizontal, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[4] needs, str backend) -> Tensor[]");
  m.def("nuclear_norm(Tensor[] matrices, str backend, str on_nonfinite) -> Tensor");
  m.def("nuclear_subgradient(Tensor[] matrices, float? energy, str backend, str on_nonfinite) -> Tensor[]");
  m.def(
      "project_energy(Tensor[] matrices, float energy, str backend, str on_nonfinite) -> "
      "(Tensor[] projected, Tensor ranks)");
  m.def("polar_factors(Tensor[] matrices, float tolerance, str backend) -> Tensor[]");
  m.def("gated_factor(Tensor direction, Tensor gate, str backend) -> Tensor");
  m.def(
      "gated_factor_backward(Tensor grad, Tensor direction, Tensor gate, str backend) -> "
      "(Tensor grad_direction, Tensor grad_gate)");
  m.def("funnel_penalty(Tensor[] gates, float c, bool normalized, str backend) -> Tensor");
  m.def(
      "funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, str backend) -> "
      "Tensor[]");

  // The CUDA kernels behind them, over outputs that the caller allocates. Implemented in fastrank._C_cuda.
  m.def("launch_gated_factor(Tensor direction, Tensor gate, Tensor(a!) out) -> ()");
  m.def(
      "launch_gated_factor_backward(Tensor grad, Tensor direction, Tensor gate, Tensor(a!) grad_direction, "
      "Tensor(b!) grad_gate) -> ()");
  m.def(
      "launch_funnel_penalty(Tensor[] gates, float c, bool normalized, Tensor(a!) partials, Tensor(b!) out) "
      "-> ()");
  m.def(
      "launch_funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, "
      "Tensor(a!)[] grads) -> ()");
  m.def(
      "launch_tucker2_pack(Tensor w_in, Tensor core, Tensor w_out, Tensor? bias, bool flip, int split, "
      "Tensor(a!) packed) -> ()");
  m.def(
      "launch_tucker2(Tensor x, Tensor packed, Tensor? residual, Tensor(a!) out, int[] shape, int[] stride, "
      "int[] padding, int[] dilation, int activation) -> ()");
  m.def(
      "launch_spectral(Tensor[] matrices, Tensor(a!)[] outs, int[] places, bool subgradient, float energy, "
      "int[] limits, Tensor(b!) ranks, Tensor(c!) status, Tensor(d!) state, Tensor(e!) workspace) -> ()");
  m.def(
      "launch_svd(Tensor[] matrices, Tensor(a!)[] left, Tensor(b!)[] values, Tensor(c!)[] right, int[] "
      "places, "
      "int[] limits, Tensor(d!) status, Tensor(e!) state, Tensor(f!) workspace) -> ()");
}
