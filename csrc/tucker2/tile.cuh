// What the two kernels share: z1 in shared memory, and the epilogue. Accumulators lie as common/mma.cuh
// describes.
#pragma once

#include "common/mma.cuh"
#include "tucker2/tucker2.h"

namespace fastrank::tucker2 {

// Zeros where z1 lies outside the map; `thread` of `threads` takes its share.
__device__ __forceinline__ void clear_padding(const Arguments& a, const Tile& tile, unsigned char* z,
                                              int thread, int threads) {
  const Plan& p = a.plan;
  if (tile.z_y >= 0 && tile.z_x >= 0 && tile.z_y + p.z_h <= a.sizes.height &&
      tile.z_x + p.z_w <= a.sizes.width)
    return;
  for (int place = thread; place < p.images * p.z_h * p.z_w; place += threads) {
    const Pixel at = pixel_at(place, p.z_h, p.z_w);
    const int y = tile.z_y + at.y, x = tile.z_x + at.x;
    if (y >= 0 && y < a.sizes.height && x >= 0 && x < a.sizes.width) continue;
    Pack<uint32_t, 4>* out = reinterpret_cast<Pack<uint32_t, 4>*>(z + static_cast<int64_t>(place) * p.pitch);
    for (int i = 0; i < a.stream.p1 / 8; ++i) out[i] = {};
  }
}

// Rounds columns `first` to first + kColumns of 16 rows and writes those before `columns` to `rows`, `pitch`
// bytes apart; upper and lower are the places of this lane's two rows, -1 for none. With kBlocks, to every
// block of the cluster.
template <typename T, int kColumns, bool kBlocks>
__device__ __forceinline__ void store_rows(unsigned char* rows, int pitch, int columns,
                                           const float (&acc)[kColumns / 2], int first, int upper, int lower,
                                           int blocks) {
  const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    if (first + 8 * j >= columns) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = half ? lower : upper;
      if (place < 0) continue;
      unsigned char* to = rows + place * pitch + 2 * (column + 8 * j);
      const uint32_t word = pack_two<T>(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]);
      if constexpr (kBlocks) {
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900
        for (int rank = 0; rank < blocks; ++rank) store_at(to, rank, word);
#endif
      } else {
        *reinterpret_cast<uint32_t*>(to) = word;
      }
    }
  }
}

// Walks through the steps of stage 2, sixteen ranks of one tap each; `offset` is how far behind the first tap
// they lie.
struct Steps {
  int offset = 0, left, rank = 0, x = 0;

  __device__ explicit Steps(const Stream& w) : left(w.core_steps()) {}
  __device__ __forceinline__ void next(const Arguments& a) {
    --left;
    offset += 32, ++rank;
    if (rank * 16 < a.stream.p1) return;
    rank = 0;
    offset += a.sizes.dilation_w * a.plan.pitch - 2 * a.stream.p1, ++x;
    if (x < a.sizes.kernel_w) return;
    x = 0;
    offset += (a.sizes.dilation_h * a.plan.z_w - a.sizes.kernel_w * a.sizes.dilation_w) * a.plan.pitch;
  }
  // The fragment A of this step from the place `z_row` of this lane's row; zeros behind the last step.
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], const unsigned char* z_row,
                                       const Arguments& a) {
    if (left <= 0) {
      fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
      return;
    }
    load_matrices(fragment, z_row + offset);
    next(a);
  }
};

// Where this lane's row of a fragment A of 16 output pixels, from row `first` on, begins in z1.
__device__ __forceinline__ const unsigned char* z_row(const Arguments& a, const unsigned char* z, int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return z + first_tap(a.sizes, a.plan, first + lane % 16) * a.plan.pitch + lane / 16 * 16;
}

// z2, rounded, as the fragments A of stage 3.
template <typename T, int kColumns>
__device__ __forceinline__ void to_fragments(uint32_t (*fragments)[4], const float (&acc)[kColumns / 2]) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[k][i] = pack_two<T>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
  }
}

// words[i] of lane t of a quad becomes words[t] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = t & bit;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + bit], bit);
      words[i] = upper ? got : words[i];
      words[i + bit] = upper ? words[i + bit] : got;
    }
  }
}

__device__ __forceinline__ float activate(float value, Activation activation) {
  if (activation == Activation::kRelu) return value < 0.0f ? 0.0f : value;
  if (activation == Activation::kSilu) return value / (1.0f + expf(-value));
  return value;
}

// Where an output pixel lies in a tensor, in elements; -1 behind the last row, the map or the batch.
__device__ __forceinline__ int64_t pixel_offset(const Arguments& a, const Tile& tile, const View& view,
                                                int row) {
  if (row >= a.plan.rows_out()) return -1;
  const Pixel at = pixel_at(row, a.plan.tile_h, a.plan.tile_w);
  const int64_t image = tile.image + at.image;
  const int y = tile.out_y + at.y, x = tile.out_x + at.x;
  if (image >= a.sizes.batch || y >= a.sizes.out_height() || x >= a.sizes.out_width()) return -1;
  return image * view.n + y * view.h + x * view.w;
}

// 16 aligned bytes.
__device__ __forceinline__ void copy_words(void* to, const void* from) {
  *static_cast<Pack<uint32_t, 4>*>(to) = *static_cast<const Pack<uint32_t, 4>*>(from);
}

// Bias, residual and activation of 64 columns, from `first` on, of 16 rows from `row` on; then they are
// written.
template <typename T>
__device__ __forceinline__ void finish(const Arguments& a, const Tile& tile, const float (&acc)[kColumns / 2],
                                       int row, int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, t = lane % 4;
  const float* bias = reinterpret_cast<const float*>(a.packed + a.stream.weight_bytes()) + first + 2 * t;
  T* out = static_cast<T*>(a.out.data);
  const T* residual = static_cast<const T*>(a.residual.data);
  const int channels = a.sizes.out_channels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t to = pixel_offset(a, tile, a.out, row + group + 8 * half);
    const int64_t from = residual ? pixel_offset(a, tile, a.residual, row + group + 8 * half) : -1;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      // Four groups of eight columns. Where they move whole, lane t of a quad moves the t-th.
      const int own = first + 32 * q + 8 * t;
      alignas(16) uint32_t words[4] = {0, 0, 0, 0};
      if (residual && a.whole_rows) {
        if (from >= 0 && own < channels) copy_words(words, residual + from + own);
        transpose_quad(words);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * q + i, column = first + 8 * j + 2 * t;
        float low = acc[4 * j + 2 * half] + bias[8 * j], high = acc[4 * j + 2 * half + 1] + bias[8 * j + 1];
        if (residual && a.whole_rows) low += unpack_low<T>(words[i]), high += unpack_high<T>(words[i]);
        if (residual && !a.whole_rows && from >= 0) {
          if (column < channels) low += to_float(residual[from + column * a.residual.c]);
          if (column + 1 < channels) high += to_float(residual[from + (column + 1) * a.residual.c]);
        }
        low = activate(low, a.activation), high = activate(high, a.activation);
        words[i] = pack_two<T>(low, high);
        if (!a.whole_rows && to >= 0) {
          if (column < channels) out[to + column * a.out.c] = from_float<T>(low);
          if (column + 1 < channels) out[to + (column + 1) * a.out.c] = from_float<T>(high);
        }
      }
      if (a.whole_rows) {
        transpose_quad(words);
        if (to >= 0 && own < channels) copy_words(out + to + own, words);
      }
    }
  }
}

// Eight channels of row `row` of the box, from `channel` on; zeros behind the last one and the batch.
template <typename T>
__device__ __forceinline__ Pack<T, 8> load_pixel(const Arguments& a, const Tile& tile, int row, int channel) {
  const Pixel at = pixel_at(row, a.plan.box_h, a.plan.box_w);
  const int64_t image = tile.image + at.image;
  Pack<T, 8> out{};
  if (image >= a.sizes.batch) return out;
  const T* from = static_cast<const T*>(a.x.data) + image * a.x.n + (tile.box_y + at.y) * a.x.h +
                  (tile.box_x + at.x) * a.x.w + channel * a.x.c;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (channel + i < a.sizes.in_channels) out.at[i] = from[i * a.x.c];
  return out;
}

// Groups of eight channels of a chunk of x in an order that reads neighbours in memory: item -> (row, group).
__device__ __forceinline__ Pixel box_item(const Arguments& a, int item) {
  if (a.x.c == 1) return {0, item / 8, item % 8};
  return {0, item % a.plan.rows_in, item / a.plan.rows_in};
}

}  // namespace fastrank::tucker2
