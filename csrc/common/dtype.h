// Element types of the kernels, named without any CUDA or torch header.
#pragma once

namespace fastrank {

enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace fastrank
