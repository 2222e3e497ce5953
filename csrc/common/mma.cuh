// Tensor-core fragments of a warp: loading them from shared memory and multiplying them (mma.sync, sm_80 and
// up).
//
// A fragment of a 16 x 16 matrix A: lane (g = lane / 4, t = lane % 4) holds, as pairs of neighbours in a row,
// a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8). Of the 16 x 8 result it
// holds d[0], d[1] = (g, 2t), (g, 2t + 1) and d[2], d[3] = the same in row g + 8. B is given by its columns.
#pragma once

#include "common/async.cuh"

namespace fastrank {

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 j to 8 j + 7 name the rows of matrix j, 16 aligned bytes
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#else
  if (shared_address(row) % 16 != 0)
    throw std::runtime_error("a row of ldmatrix begins at a multiple of 16 bytes");
  const host::Lanes<const void*> rows(row);
  const int lane = host::lane();
  for (int j = 0; j < 4; ++j)
    std::memcpy(&out[j], static_cast<const unsigned char*>(rows[8 * j + lane / 4]) + lane % 4 * 4,
                sizeof(uint32_t));
#endif
}

// d += A * B for B of 16 x 8: b[0] = (rows 2t and 2t + 1, column g), b[1] = the same 8 rows below.
template <typename T>
__device__ __forceinline__ void multiply_16x8(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#ifdef __CUDACC__

template <>
__device__ __forceinline__ void multiply_16x8<__half>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_16x8<__nv_bfloat16>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, "
      "%2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

namespace host {

// Rows `row` and `row + 8` of the fragment A, 16 numbers each, as this warp's lanes hold them.
template <typename T>
void rows_of(const uint32_t (&a)[4], float (&upper)[16], float (&lower)[16]) {
  struct Fragment {
    uint32_t a[4];
  };
  const Lanes<Fragment> all(Fragment{{a[0], a[1], a[2], a[3]}});
  const int group = lane() / 4;
  for (int t = 0; t < 4; ++t) {
    const Fragment f = all[4 * group + t];
    for (int half = 0; half < 2; ++half) {
      upper[8 * half + 2 * t] = unpack_low<T>(f.a[2 * half]),
                           upper[8 * half + 2 * t + 1] = unpack_high<T>(f.a[2 * half]);
      lower[8 * half + 2 * t] = unpack_low<T>(f.a[2 * half + 1]);
      lower[8 * half + 2 * t + 1] = unpack_high<T>(f.a[2 * half + 1]);
    }
  }
}

}  // namespace host

template <typename T>
void multiply_16x8(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float upper[16], lower[16];
  host::rows_of<T>(a, upper, lower);
  struct Columns {
    uint32_t b[2];
  };
  const host::Lanes<Columns> all(Columns{{b0, b1}});
  for (int j = 0; j < 2; ++j) {
    const int column = host::lane() % 4 * 2 + j;
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = all[4 * column + k % 8 / 2].b[k / 8];
      const float b = k % 2 ? unpack_high<T>(word) : unpack_low<T>(word);
      d[j] += upper[k] * b;
      d[2 + j] += lower[k] * b;
    }
  }
}

#endif

}  // namespace fastrank
