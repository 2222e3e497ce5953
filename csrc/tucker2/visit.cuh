// From the width and the dtype of a call to the kernel that was compiled for them.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "tucker2/plan.h"

namespace fastrank::tucker2 {

// Call `visitor(std::integral_constant<int, width>{})` with one of the first kCount widths.
template <int kCount, int kIndex = 0, typename Visitor>
void visit_width(int width, Visitor&& visitor) {
  if constexpr (kIndex < kCount) {
    if (width == width_at(kIndex)) return visitor(std::integral_constant<int, width_at(kIndex)>{});
    return visit_width<kCount, kIndex + 1>(width, visitor);
  } else {
    throw std::runtime_error("no kernel was compiled for " + std::to_string(width) + " output ranks");
  }
}

// Call `visitor(TypeTag<T>{})` with the 16-bit type that `dtype` names.
template <typename Visitor>
void visit_half(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat16:
      return visitor(TypeTag<__half>{});
    case DType::kBFloat16:
      return visitor(TypeTag<__nv_bfloat16>{});
    default:
      throw std::runtime_error("the Tucker-2 kernels take float16 and bfloat16");
  }
}

}  // namespace fastrank::tucker2
