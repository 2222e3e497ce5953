// Checks of a launcher's tensors, in one wording, and the stream to launch on. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "common/dtype.h"

namespace fastrank {

using torch::stable::Tensor;

inline void check(bool ok, const char* name, const char* expected) {
  if (!ok) throw std::runtime_error(std::string(name) + " must be " + expected);
}

// `t` is a CUDA tensor on the device of `like`, of its dtype and element count.
inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        "on the CUDA device of the first tensor");
  check(t.scalar_type() == like.scalar_type(), name, "of the dtype of the first tensor");
  check(t.numel() == like.numel(), name, "of the size of the first tensor");
}

// Each slice of `t` along dim 0 is one block of memory, and the blocks follow one another.
inline void check_rows(const Tensor& t, const char* name) {
  check(t.is_cuda(), name, "a CUDA tensor");
  check(t.dim() >= 1, name, "of one dimension or more");
  check(t.size(0) <= 1 || t.stride(0) == t.numel() / t.size(0), name, "stored slice after slice along dim 0");
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      throw std::runtime_error(std::string(name) + " must be float32, float16 or bfloat16");
  }
}

// The stream that torch has current on the device of `t`.
inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

}  // namespace fastrank
