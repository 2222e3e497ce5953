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
  m.def(
      "channel_svd_conv2d(Tensor x, Tensor first, Tensor second, Tensor? bias, Tensor? residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor");
  m.def(
      "spatial_svd_conv2d(Tensor x, Tensor first, Tensor second, Tensor? bias, Tensor? residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor");
  m.def(
      "decoupled_svd_conv2d(Tensor x, Tensor pointwise, Tensor depthwise, Tensor? bias, Tensor? residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor");
  m.def(
      "channel_svd_conv2d_backward(Tensor grad, Tensor x, Tensor first, Tensor second, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[3] needs, str backend) -> Tensor[]");
  m.def(
      "spatial_svd_conv2d_backward(Tensor grad, Tensor x, Tensor first, Tensor second, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[3] needs, str backend) -> Tensor[]");
  m.def(
      "decoupled_svd_conv2d_backward(Tensor grad, Tensor x, Tensor pointwise, Tensor depthwise, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[3] needs, str backend) -> Tensor[]");
  m.def("nuclear_norm(Tensor[] matrices, str backend, str on_nonfinite) -> Tensor");
  m.def("nuclear_subgradient(Tensor[] matrices, float? energy, str backend, str on_nonfinite) -> Tensor[]");
  m.def(
      "project_energy(Tensor[] matrices, float energy, str backend, str on_nonfinite) -> "
      "(Tensor[] projected, Tensor ranks)");
  m.def("polar_factors(Tensor[] matrices, float tolerance, str backend) -> Tensor[]");
  m.def("gated_factors(Tensor[] directions, Tensor[] gates, str backend) -> Tensor[]");
  m.def(
      "gated_factors_backward(Tensor[] grads, Tensor[] directions, Tensor[] gates, str backend) -> "
      "(Tensor[] grad_directions, Tensor[] grad_gates)");
  m.def("funnel_penalty(Tensor[] gates, float c, bool normalized, str backend) -> Tensor");
  m.def(
      "funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, str backend) -> "
      "Tensor[]");
  m.def("funnel_proximal_(Tensor(a!)[] gates, float eta, float c, str penalty, str backend) -> ()");
  m.def("count_below(Tensor[] gates, float threshold, str backend) -> Tensor");

  // The CUDA kernels behind them, over outputs that the caller allocates. Implemented in fastrank._C_cuda.
  m.def("launch_gated_factors(Tensor[] directions, Tensor[] gates, Tensor(a!)[] outs) -> ()");
  m.def(
      "launch_gated_factors_backward(Tensor[] grads, Tensor[] directions, Tensor[] gates, "
      "Tensor(a!)[] grad_directions, Tensor(b!)[] grad_gates) -> ()");
  m.def(
      "launch_funnel_penalty(Tensor[] gates, float c, bool normalized, Tensor(a!) partials, Tensor(b!) out) "
      "-> ()");
  m.def(
      "launch_funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, "
      "Tensor(a!)[] grads) -> ()");
  m.def("launch_funnel_proximal(Tensor(a!)[] gates, float eta, float c, float threshold, int penalty) -> ()");
  m.def("launch_count_below(Tensor[] gates, float threshold, Tensor(a!) counts) -> ()");
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
