// Packs the factors into the stream of weights that the kernels read: padded, in the order of use, swizzled.
#include "common/launch.cuh"
#include "tucker2/tucker2.h"
#include "tucker2/visit.cuh"

namespace fastrank::tucker2 {
namespace {

constexpr int kPackThreads = 256;

template <typename T>
__device__ __forceinline__ T core_at(const Sizes& s, const Stream& w, const Factors& f, int row, int k) {
  int tap = k / w.p1;
  const int rank = k % w.p1;
  if (row >= s.rank_out || rank >= s.rank_in || tap >= w.taps) return from_float<T>(0.0f);
  if (f.flip) tap = w.taps - 1 - tap;
  return static_cast<const T*>(f.core)[row * f.core_out + rank * f.core_in + tap / s.kernel_w * f.core_y +
                                       tap % s.kernel_w * f.core_x];
}

template <typename T>
__device__ __forceinline__ T matrix_at(const void* data, int64_t row_stride, int64_t column_stride, int rows,
                                       int columns, int row, int column) {
  if (row >= rows || column >= columns) return from_float<T>(0.0f);
  return static_cast<const T*>(data)[row * row_stride + column * column_stride];
}

// One thread writes 16 bytes.
template <typename T>
__global__ void tucker2_pack_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Stream w,
                                    const __grid_constant__ Factors f, unsigned char* packed) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x, byte = item * 16;
  if (byte >= w.packed_bytes()) return;
  if (byte >= w.weight_bytes()) {
    const int channel = static_cast<int>((byte - w.weight_bytes()) / 4);
    Pack<float, 4> bias{};
    for (int i = 0; i < 4; ++i)
      if (f.bias && channel + i < s.out_channels)
        bias.at[i] = to_float(static_cast<const T*>(f.bias)[channel + i]);
    *reinterpret_cast<Pack<float, 4>*>(packed + byte) = bias;
    return;
  }
  const Source at = w.source(byte);
  Pack<T, 8> values;
  for (int i = 0; i < 8; ++i) {
    const int k = at.k + i;
    values.at[i] =
        at.stage == 1 ? matrix_at<T>(f.w_in, f.in_rank, f.in_channel, s.rank_in, s.in_channels, at.row, k)
        : at.stage == 2
            ? core_at<T>(s, w, f, at.row, k)
            : matrix_at<T>(f.w_out, f.out_channel, f.out_rank, s.out_channels, s.rank_out, at.row, k);
  }
  *reinterpret_cast<Pack<T, 8>*>(packed + byte) = values;
}

}  // namespace

void pack(const Sizes& sizes, int split, const Factors& factors, void* packed, DType dtype, void* stream) {
  const Stream w = Stream::of(sizes, split);
  const int64_t blocks = ceil_div(ceil_div(w.packed_bytes(), 16), kPackThreads);
  visit_half(dtype, [&](auto tag) {
    launch(tucker2_pack_kernel<typename decltype(tag)::type>, dim3(grid_size(blocks)), dim3(kPackThreads), 0,
           stream, sizes, w, factors, static_cast<unsigned char*>(packed));
  });
}

}  // namespace fastrank::tucker2
