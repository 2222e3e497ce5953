// The Tucker-2 convolution for sm_80 and up: mma.sync and cp.async. Design and bounds:
// docs/kernels/tucker2.md.
//
// A block computes one tile, 16 output pixels a warp. All threads copy x and the weights, which stream
// through a ring of slots in the order of their use.
#include "tucker2/tile.cuh"
#include "tucker2/visit.cuh"

namespace fastrank::tucker2 {
namespace {

constexpr int kAmpereThreads = 256;
constexpr int kAmpereWarps = kAmpereThreads / 32;
static_assert(kAmpereWarps * 16 == kTileRows, "a warp takes sixteen rows of the tile");

// The weights on their way: slots are filled ahead of the one that is read.
struct Ring {
  const Arguments& a;
  unsigned char* memory;
  int slots, next = 0, current = -1;

  __device__ Ring(const Arguments& a_, unsigned char* memory_)
      : a(a_), memory(memory_), slots(a_.stream.slots(a_.plan.passes, 0)) {}

  // Starts filling the next slot. A group of copies a call, empty behind the last slot.
  __device__ __forceinline__ void fetch() {
    if (next < slots) {
      const Piece piece = a.stream.piece(next, a.plan.passes, 0);
      unsigned char* to = memory + next % a.plan.ring * a.stream.slot_bytes();
      for (int byte = static_cast<int>(threadIdx.x) * 16; byte < piece.bytes; byte += kAmpereThreads * 16)
        copy_16(to + byte, a.packed + piece.offset + byte, true);
    }
    ++next;
    copies_commit();
  }
  // Waits for the next slot to read; the one read before is refilled.
  __device__ __forceinline__ const unsigned char* acquire() {
    if (a.plan.ring > 2) {
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    fetch();
    ++current;
    return memory + current % a.plan.ring * a.stream.slot_bytes();
  }
};

// acc (16 x kColumns) += the fragment A times 16 numbers of the rows of `weights`.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply(float (&acc)[kColumns / 2], const uint32_t (&fragment)[4],
                                         const unsigned char* weights, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 16 * 8 + lane % 8, byte = step * 32 + lane / 8 % 2 * 16;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    uint32_t b[4];
    load_matrices(b, weights + swizzled(16 * j + row, byte));
    multiply_16x8<T>(acc + 8 * j, fragment, b[0], b[1]);
    multiply_16x8<T>(acc + 8 * j + 4, fragment, b[2], b[3]);
  }
}

template <typename T>
__device__ __forceinline__ void load_x(const Arguments& a, const Tile& tile, unsigned char* x) {
  for (int chunk = 0; chunk < a.stream.chunks_in; ++chunk, x += a.plan.m_tiles() * 64 * kRowBytes) {
    for (int item = static_cast<int>(threadIdx.x); item < a.plan.rows_in * 8; item += kAmpereThreads) {
      const Pixel at = box_item(a, item);
      const int channel = chunk * kDepth + at.x * 8;
      unsigned char* to = x + swizzled(at.y, at.x * 16);
      if (!a.whole_x) {
        *reinterpret_cast<Pack<T, 8>*>(to) = load_pixel<T>(a, tile, at.y, channel);
        continue;
      }
      const Pixel pixel = pixel_at(at.y, a.plan.box_h, a.plan.box_w);
      const int64_t image = tile.image + pixel.image;
      const bool valid = image < a.sizes.batch && channel < a.sizes.in_channels;
      const T* from = static_cast<const T*>(a.x.data);
      if (valid)
        from += image * a.x.n + (tile.box_y + pixel.y) * a.x.h + (tile.box_x + pixel.x) * a.x.w + channel;
      copy_16(to, from, valid);
    }
  }
}

template <typename T, int kColumns>
__device__ __forceinline__ void stage1_tile(const Arguments& a, const Tile& tile, Ring& ring,
                                            const unsigned char* x, unsigned char* z, int pass, int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float acc[2][kColumns / 2] = {};
  for (int chunk = 0; chunk < a.stream.chunks_in;) {
    const unsigned char* weights = ring.acquire();
    const int end = at_most(chunk + 2, a.stream.chunks_in);
    for (; chunk < end; ++chunk, weights += kColumns * kRowBytes) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = pass * (kPassTiles * 64) + (i * kAmpereWarps + warp) * 16;
        if (row >= a.plan.m_tiles() * 64) continue;
        const unsigned char* rows = x + chunk * a.plan.m_tiles() * 64 * kRowBytes;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t fragment[4];
          load_matrices(fragment, rows + swizzled(row + lane % 16, step * 32 + lane / 16 * 16));
          multiply<T, kColumns>(acc[i], fragment, weights, step);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = pass * (kPassTiles * 64) + (i * kAmpereWarps + warp) * 16 + lane / 4;
    store_rows<T, kColumns, false>(z, a.plan.pitch, a.stream.p1, acc[i], first, z_place(a.plan, tile, row),
                                   z_place(a.plan, tile, row + 8), 1);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kAmpereThreads, 1)
    tucker2_ampere_kernel(const __grid_constant__ Arguments a) {
  constexpr int kCoreChunks = kSlotBytes / (kWidth * kRowBytes) > 1 ? kSlotBytes / (kWidth * kRowBytes) : 1;
  constexpr int kOutChunks = (kWidth + kDepth - 1) / kDepth;
  FASTRANK_SHARED_1024(unsigned char, shared);
  unsigned char* x = shared + a.plan.ring * a.stream.slot_bytes();
  unsigned char* z = x + a.plan.x_bytes(a.stream);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const Tile tile = tile_at(a.sizes, a.plan, static_cast<int64_t>(blockIdx.x));

  Ring ring(a, shared);
  load_x<T>(a, tile, x);  // its copies belong to the group of the first slot
  for (int i = 1; i < a.plan.ring; ++i) ring.fetch();
  clear_padding(a, tile, z, thread, kAmpereThreads);
  for (int pass = 0; pass < a.plan.passes; ++pass) {
    for (int j = 0; j < a.stream.in_tiles(); ++j) {
      if (a.stream.in_tile_width(j) == kColumns) {
        stage1_tile<T, kColumns>(a, tile, ring, x, z, pass, j * kColumns);
      } else {
        stage1_tile<T, kColumns / 2>(a, tile, ring, x, z, pass, j * kColumns);
      }
    }
  }

  // The barrier of the first slot of stage 2 makes z1 whole.
  uint32_t z2[kWidth / 16][4];
  {
    float acc[kWidth / 2] = {};
    const unsigned char* from = z_row(a, z, warp * 16);
    Steps steps(a.stream);
    for (int chunk = 0; chunk < a.stream.core_chunks();) {
      const unsigned char* weights = ring.acquire();
      const int end = at_most(chunk + kCoreChunks, a.stream.core_chunks());
      for (; chunk < end; ++chunk, weights += kWidth * kRowBytes) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t fragment[4];
          steps.load(fragment, from, a);
          multiply<T, kWidth>(acc, fragment, weights, step);
        }
      }
    }
    to_fragments<T, kWidth>(z2, acc);
  }

  for (int j = 0; j < a.stream.out_tiles; ++j) {
    float acc[kColumns / 2] = {};
#pragma unroll
    for (int slot = 0; slot < (kOutChunks + 1) / 2; ++slot) {
      const unsigned char* weights = ring.acquire();
#pragma unroll
      for (int step = slot * 8; step < slot * 8 + 8; ++step) {
        if (step < kWidth / 16)
          multiply<T, kColumns>(acc, z2[step], weights + step % 8 / 4 * (kColumns * kRowBytes), step % 4);
      }
    }
    finish<T>(a, tile, acc, warp * 16, j * kColumns);
  }
  copies_wait<0>();
}

}  // namespace

void convolve_ampere(const Arguments& a, DType dtype, void* stream) {
  visit_width<kWidths>(a.stream.p2, [&](auto width) {
    visit_half(dtype, [&](auto tag) {
      launch_clusters(tucker2_ampere_kernel<typename decltype(tag)::type, decltype(width)::value>,
                      dim3(grid_size(a.plan.tiles)), dim3(kAmpereThreads), a.plan.shared_bytes, 1, stream, a);
    });
  });
}

}  // namespace fastrank::tucker2
