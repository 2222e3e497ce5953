// Launches of the gate kernels. Compiled by nvcc, and once more as plain C++ by bindings.cpp for the host.
#include <functional>

#include "common/launch.cuh"
#include "gates/gates.h"
#include "gates/gates_kernels.cuh"

namespace fastrank::gates {
namespace {

constexpr std::size_t kSumBytes = kThreads / kWarpSize * sizeof(float);

// Launch on the stream `kernel`, an instance of a template for tables of the type of `table`.
template <typename Tensors, typename... Parameters, typename... Arguments>
void launch_table(void (*kernel)(Parameters...), const Tensors& table, int64_t blocks,
                  std::size_t shared_bytes, void* stream, Arguments... arguments) {
  launch(kernel, dim3(grid_size(blocks)), dim3(kThreads), shared_bytes, stream, std::cref(table),
         arguments...);
}

// The plans of a list of factors, of whose pointers the first `packed` are those of slices.
template <int kPointers>
auto by_slices(const List<kPointers>& list, int packed, DType dtype) {
  return [&list, packed, dtype](int i) {
    return slices_plan(list.rows[i], list.row_sizes[i], element_bytes(dtype), list.aligned(i, packed));
  };
}

// The plans of a list of gates.
template <int kPointers>
auto by_chunks(const List<kPointers>& list, DType dtype) {
  return [&list, dtype](int i) {
    return chunks_plan(list.row_sizes[i], element_bytes(dtype), list.aligned(i, kPointers));
  };
}

}  // namespace

void gated_factors(void* const* directions, void* const* gates, void* const* outs, const int64_t* rows,
                   const int64_t* row_sizes, int count, DType dtype, void* stream) {
  const List<kForwardPointers> list{{directions, outs, gates}, rows, row_sizes, count};
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, by_slices(list, kGate, dtype), [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(gated_factors_kernel<T, Tensors>, table, blocks, kSumBytes, stream);
    });
  });
}

void gated_factors_backward(void* const* grads, void* const* directions, void* const* gates,
                            void* const* grad_directions, void* const* grad_gates, const int64_t* rows,
                            const int64_t* row_sizes, int count, DType dtype, void* stream) {
  const List<kBackwardPointers> list{
      {grads, directions, grad_directions, gates, grad_gates}, rows, row_sizes, count};
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, by_slices(list, kOfGate, dtype), [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(gated_factors_backward_kernel<T, Tensors>, table, blocks, 2 * kSumBytes, stream);
    });
  });
}

void funnel_penalty(void* const* gates, const int64_t* sizes, int count, float c, float scale,
                    float* partials, float* out, DType dtype, void* stream) {
  const List<1> list{{gates}, nullptr, sizes, count};
  int64_t done = 0;
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, by_chunks(list, dtype), [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(funnel_partials_kernel<T, Tensors>, table, blocks, kSumBytes, stream, c, partials + done);
      done += blocks;
    });
  });
  launch(funnel_finish_kernel, dim3(1), dim3(kThreads), kSumBytes, stream,
         static_cast<const float*>(partials), done, scale, out);
}

void funnel_penalty_backward(const float* grad, void* const* gates, void* const* grads, const int64_t* sizes,
                             int count, float c, float scale, DType dtype, void* stream) {
  const List<2> list{{gates, grads}, nullptr, sizes, count};
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, by_chunks(list, dtype), [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(funnel_backward_kernel<T, Tensors>, table, blocks, 0, stream, grad, c, scale);
    });
  });
}

void funnel_proximal(void* const* gates, const int64_t* sizes, int count, double eta, double c,
                     double threshold, Penalty penalty, DType dtype, void* stream) {
  const List<1> list{{gates}, nullptr, sizes, count};
  const auto one_by_one = [&](int i) { return chunks_plan(sizes[i], element_bytes(dtype), false); };
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, one_by_one, [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(funnel_proximal_kernel<T, Tensors>, table, blocks, 0, stream, eta, c, threshold, penalty);
    });
  });
}

void count_below(void* const* gates, const int64_t* sizes, int count, double threshold, int64_t* counts,
                 DType dtype, void* stream) {
  const List<1> list{{gates}, nullptr, sizes, count};
  const auto whole = [&](int i) {
    return Plan{kThreads, list.aligned(i, 1) ? kPackBytes / element_bytes(dtype) : 1, 1};
  };
  visit_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_tables(list, whole, [&](const auto& table, int64_t blocks) {
      using Tensors = std::decay_t<decltype(table)>;
      launch_table(count_below_kernel<T, Tensors>, table, blocks, kThreads / kWarpSize * sizeof(long long),
                   stream, threshold, counts);
      counts += blocks;
    });
  });
}

}  // namespace fastrank::gates
