// Launches of the gate kernels. Compiled by nvcc, and once more as plain C++ by bindings.cpp for the host.
#include "common/launch.cuh"
#include "gates/gates.h"
#include "gates/gates_kernels.cuh"

namespace fastrank::gates {
namespace {

bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kPackBytes == 0;
}

// Call `visitor(pack, lanes)`, both compile-time constants, with what the plan says.
template <typename T, typename Visitor>
void visit_plan(const GatedPlan& plan, Visitor&& visitor) {
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  using Packed = std::integral_constant<int, kPack>;
  using Single = std::integral_constant<int, 1>;
  using Warp = std::integral_constant<int, kWarpSize>;
  using Block = std::integral_constant<int, kThreads>;
  if (plan.lanes == kWarpSize) {
    plan.pack == 1 ? visitor(Single{}, Warp{}) : visitor(Packed{}, Warp{});
  } else {
    plan.pack == 1 ? visitor(Single{}, Block{}) : visitor(Packed{}, Block{});
  }
}

// Fill `table` with the non-empty tensors from `next` on; returns the chunks taken and moves `next` past
// them.
template <typename T>
int64_t fill_table(FunnelTable<T>& table, const void* const* gates, void* const* grads, const int64_t* sizes,
                   int count, int& next) {
  int64_t chunks = 0;
  table.count = 0;
  for (; next < count && table.count < kTableTensors; ++next) {
    if (sizes[next] == 0) continue;
    const int t = table.count++;
    table.gates[t] = static_cast<const T*>(gates[next]);
    table.grads[t] = grads ? static_cast<T*>(grads[next]) : nullptr;
    table.sizes[t] = sizes[next];
    table.first_chunk[t] = chunks;
    chunks += funnel_chunks(sizes[next]);
  }
  return chunks;
}

constexpr std::size_t kSumBytes = kThreads / kWarpSize * sizeof(float);

}  // namespace

void gated_factor(const void* direction, const void* gate, void* out, int64_t rows, int64_t row_size,
                  DType dtype, void* stream) {
  const GatedPlan plan =
      gated_plan(rows, row_size, element_bytes(dtype), aligned(direction) && aligned(out), /*sums=*/1);
  if (plan.blocks == 0) return;
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_plan<T>(plan, [&](auto pack, auto lanes) {
      launch(gated_factor_kernel<T, decltype(pack)::value, decltype(lanes)::value>,
             dim3(grid_size(plan.blocks)), dim3(kThreads), static_cast<std::size_t>(plan.shared_bytes),
             stream, static_cast<const T*>(direction), static_cast<const T*>(gate), static_cast<T*>(out),
             rows, row_size);
    });
  });
}

void gated_factor_backward(const void* grad, const void* direction, const void* gate, void* grad_direction,
                           void* grad_gate, int64_t rows, int64_t row_size, DType dtype, void* stream) {
  const bool all_aligned = aligned(grad) && aligned(direction) && aligned(grad_direction);
  const GatedPlan plan = gated_plan(rows, row_size, element_bytes(dtype), all_aligned, /*sums=*/2);
  if (plan.blocks == 0) return;
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_plan<T>(plan, [&](auto pack, auto lanes) {
      launch(gated_factor_backward_kernel<T, decltype(pack)::value, decltype(lanes)::value>,
             dim3(grid_size(plan.blocks)), dim3(kThreads), static_cast<std::size_t>(plan.shared_bytes),
             stream, static_cast<const T*>(grad), static_cast<const T*>(direction),
             static_cast<const T*>(gate), static_cast<T*>(grad_direction), static_cast<T*>(grad_gate), rows,
             row_size);
    });
  });
}

void funnel_penalty(const void* const* gates, const int64_t* sizes, int count, float c, float scale,
                    float* partials, float* out, DType dtype, void* stream) {
  int64_t done = 0;
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    FunnelTable<T> table{};
    for (int next = 0; next < count;) {
      const int64_t chunks = fill_table(table, gates, nullptr, sizes, count, next);
      if (chunks == 0) continue;
      launch(funnel_partials_kernel<T>, dim3(grid_size(chunks)), dim3(kThreads), kSumBytes, stream, table, c,
             partials + done);
      done += chunks;
    }
  });
  launch(funnel_finish_kernel, dim3(1), dim3(kThreads), kSumBytes, stream,
         static_cast<const float*>(partials), done, scale, out);
}

void funnel_penalty_backward(const float* grad, const void* const* gates, void* const* grads,
                             const int64_t* sizes, int count, float c, float scale, DType dtype,
                             void* stream) {
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    FunnelTable<T> table{};
    for (int next = 0; next < count;) {
      const int64_t chunks = fill_table(table, gates, grads, sizes, count, next);
      if (chunks == 0) continue;
      launch(funnel_backward_kernel<T>, dim3(grid_size(chunks)), dim3(kThreads), 0, stream, table, grad, c,
             scale);
    }
  });
}

}  // namespace fastrank::gates
