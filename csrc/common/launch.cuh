// Launching: the same call starts a kernel on a stream or runs it on the host, and a dtype becomes a type.
#pragma once

#include "common/device.cuh"
#include "common/dtype.h"

namespace fastrank {

// Launch `kernel` with `shared_bytes` of dynamic shared memory; the stream is a cudaStream_t (unused on the
// host).
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes, void* stream,
            Arguments... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("a fastrank kernel could not be launched: ") +
                             cudaGetErrorString(status));
  }
#else
  (void)stream;
  host::launch(kernel, grid, threads, shared_bytes, arguments...);
#endif
}

// The same for blocks in clusters of `cluster` along x, with more shared memory than a launch has unasked.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes,
                     int cluster, void* stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("a fastrank kernel could not be launched: ") +
                             cudaGetErrorString(status));
  }
#else
  (void)stream;
  host::launch_clusters(kernel, grid, threads, shared_bytes, cluster, arguments...);
#endif
}

// A grid dimension from a 64-bit count.
inline unsigned grid_size(int64_t blocks) {
  if (blocks < 1 || blocks > 0x7fffffff) {
    throw std::runtime_error("a grid has 1 to 2^31 - 1 blocks, got " + std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Call `visitor(TypeTag<T>{})` with the element type that `dtype` names. The host build has float32 only.
template <typename Visitor>
void visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(TypeTag<float>{});
#ifdef __CUDACC__
    case DType::kFloat16:
      return visitor(TypeTag<__half>{});
    case DType::kBFloat16:
      return visitor(TypeTag<__nv_bfloat16>{});
#endif
    default:
      throw std::runtime_error("this build of the kernels does not have the dtype");
  }
}

}  // namespace fastrank
