// The Tucker-2 convolution for Hopper (sm_90a): wgmma, bulk copies, weights shared in a cluster. Design and
// bounds: docs/kernels/tucker2.md.
//
// A block is a warpgroup that loads and two that compute, 64 output pixels each. Blocks take one tile after
// another: while two stages of a tile are computed, the next tile's x is on its way. The weights stream
// through a ring of slots in the order of their use; every block of a cluster copies its share of a slot to
// all of them.
//
// In a split a cluster takes a tile: each block computes its columns of z1, z2 and y from a stream of weights
// of its own, and writes z1 and z2 to the shared memory of every block.
#include "common/wgmma.cuh"
#include "tucker2/tile.cuh"
#include "tucker2/visit.cuh"

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

namespace fastrank::tucker2 {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kHopperThreads = kGroup + kConsumers;

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kGatherThreads = kGroup - 32;  // the loading warps but the one that copies weights
// What a launch of 384 threads gets, and how the warpgroups share it: asking for more would wait for ever.
constexpr int kLaunchRegisters = 168, kLoaderRegisters = 72, kConsumerRegisters = 216;
static_assert(kGroup * kLoaderRegisters + kConsumers * kConsumerRegisters <=
                  kHopperThreads * kLaunchRegisters,
              "registers are moved between warpgroups, not made");

// The barriers at the end of shared memory.
struct Barriers {
  Barrier full[kMaxSlots], empty[kMaxSlots];  // a slot of the ring: filled, and read by everyone
  Barrier x_full[kMaxChunks], x_empty;
  // Of a split: written by every block, and read by every block.
  Barrier z1_full, z1_empty, z2_full, z2_empty;
};
static_assert(sizeof(Barriers) <= kBarrierBytes, "the plan keeps room for the barriers");

struct Memory {
  unsigned char *ring, *x, *z, *z2;
  Barriers* barriers;

  __device__ Memory(const Arguments& a, unsigned char* shared)
      : ring(shared),
        x(ring + a.plan.ring * a.stream.slot_bytes()),
        z(x + a.plan.x_bytes(a.stream)),
        z2(z + a.plan.z_bytes()),
        barriers(reinterpret_cast<Barriers*>(z2 + a.plan.z2_bytes(a.stream))) {}
  // Chunk `chunk` of 64 channels of x, all rows of the box.
  __device__ __forceinline__ unsigned char* chunk(const Arguments& a, int chunk) const {
    return x + chunk * a.plan.m_tiles() * 64 * kRowBytes;
  }
};

// This block's tiles: clusters take neighbours, or in a split one tile, and all blocks of one take as many
// turns.
struct Turns {
  int cluster, rank, width;  // width: tiles that a cluster takes at a time
  int64_t next, step, tiles;

  __device__ explicit Turns(const Arguments& a)
      : cluster(a.plan.cluster),
        rank(cluster > 1 ? cluster_rank() : 0),
        width(a.stream.split > 1 ? 1 : cluster),
        next(static_cast<int64_t>(blockIdx.x) / cluster * width),
        step(static_cast<int64_t>(gridDim.x) / cluster * width),
        tiles(a.plan.tiles) {}
  __device__ __forceinline__ bool more() const { return next < tiles; }
  __device__ __forceinline__ int64_t tile() const { return width > 1 ? next + rank : next; }
  __device__ __forceinline__ bool has_tile() const { return tile() < tiles; }
  __device__ __forceinline__ int split_rank() const { return width > 1 ? 0 : cluster > 1 ? rank : 0; }
};

// A place in the ring, and how often it has been round.
struct Place {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance(int ring) {
    if (++slot == ring) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void load_weights(const Arguments& a, const Memory& m) {
  Turns turns(a);
  Place at;
  const int own = turns.split_rank(), slots = a.stream.slots(a.plan.passes, own);
  const int writers = turns.width;  // blocks that fill a slot together
  for (bool first = true; turns.more() && (first || !a.plan.resident);
       turns.next += turns.step, first = false) {
#pragma unroll 1
    for (int s = 0; s < slots; ++s, at.advance(a.plan.ring)) {
      const Piece piece = a.stream.piece(s, a.plan.passes, own);
      const int share = piece.bytes / writers, part = writers > 1 ? turns.rank : 0;
      Barrier* full = &m.barriers->full[at.slot];
      barrier_wait(&m.barriers->empty[at.slot], at.parity ^ 1);
      barrier_expect(full, piece.bytes);
      bulk_copy(m.ring + at.slot * a.stream.slot_bytes() + part * share,
                a.packed + piece.offset + part * share, share, full, writers);
    }
  }
}

template <typename T>
__device__ __forceinline__ void load_x(const Arguments& a, const TensorMap& map, const Memory& m,
                                       int thread) {
  int parity = 0;
  for (Turns turns(a); turns.more(); turns.next += turns.step, parity ^= 1) {
    if (!turns.has_tile()) return;
    if (a.whole_x && thread != 0) continue;
    const Tile tile = tile_at(a.sizes, a.plan, turns.tile());
    barrier_wait(&m.barriers->x_empty, parity ^ 1);
#pragma unroll 1
    for (int chunk = 0; chunk < a.stream.chunks_in; ++chunk) {
      Barrier* full = &m.barriers->x_full[chunk];
      unsigned char* to = m.chunk(a, chunk);
      if (a.whole_x) {
        barrier_expect(full, a.plan.rows_in * kRowBytes);
        tensor_copy(to, &map, chunk * kDepth, tile.box_x, tile.box_y, static_cast<int>(tile.image), full);
        continue;
      }
#pragma unroll 1
      for (int item = thread; item < a.plan.rows_in * 8; item += kGatherThreads) {
        const Pixel at = box_item(a, item);
        *reinterpret_cast<Pack<T, 8>*>(to + swizzled(at.y, at.x * 16)) =
            load_pixel<T>(a, tile, at.y, chunk * kDepth + at.x * 8);
      }
      async_fence();
      barrier_arrive(full);
    }
  }
}

// The two warpgroups that compute.
template <typename T, int kWidth, bool kSplit>
struct Consumer {
  static constexpr int kCoreChunks =
      kSlotBytes / (kWidth * kRowBytes) > 1 ? kSlotBytes / (kWidth * kRowBytes) : 1;

  const Arguments& a;
  const Memory& m;
  const int group, warp, lane;  // warpgroup 0 or 1, warp in it
  const int rank;               // of the block, in a split
  Place at{};
  const unsigned char* slot = nullptr;

  __device__ Consumer(const Arguments& a_, const Memory& m_)
      : a(a_),
        m(m_),
        group(static_cast<int>(threadIdx.x) / kGroup - 1),
        warp(static_cast<int>(threadIdx.x) % kGroup / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        rank(kSplit ? cluster_rank() : 0) {}

  __device__ __forceinline__ const unsigned char* acquire() {
    barrier_wait(&m.barriers->full[at.slot], a.plan.resident ? 0 : at.parity);
    return m.ring + at.slot * a.stream.slot_bytes();
  }
  // This warp has read the slot: tells every block that writes to it.
  __device__ __forceinline__ void release() {
    if (!a.plan.resident && lane < (kSplit ? 1 : a.plan.cluster)) {
      if (kSplit || a.plan.cluster == 1) {
        barrier_arrive(&m.barriers->empty[at.slot]);
      } else {
        barrier_arrive_at(&m.barriers->empty[at.slot], lane);
      }
    }
    at.advance(a.plan.ring);
  }
  // This warp has read, or written to, what all blocks of a split share.
  __device__ __forceinline__ void tell(Barrier* barrier) {
    __syncwarp();
    if (lane < a.stream.split) barrier_arrive_at(barrier, lane);
  }
  __device__ __forceinline__ void skip(int slots) {
    for (int s = 0; s < slots; ++s) {
      acquire();
      release();
    }
  }

  // Columns `first` to first + kColumns of z1, of kTiles 64-row tiles, the second two behind the first.
  template <int kColumns, int kTiles>
  __device__ __forceinline__ void stage1_tile(int first, int row_tile, const int (&places)[2][2],
                                              int x_parity) {
    float acc[kTiles][kColumns / 2] = {};
    for (int chunk = 0; chunk < a.stream.chunks_in;) {
      const unsigned char* weights = acquire();
      const int end = at_most(chunk + 2, a.stream.chunks_in);
      for (; chunk < end; ++chunk, weights += kColumns * kRowBytes) {
        barrier_wait(&m.barriers->x_full[chunk], x_parity);
        const unsigned char* x = m.chunk(a, chunk) + row_tile * 64 * kRowBytes;
        products_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            Products<T, kColumns>::shared(acc[i], operand(x + i * 2 * 64 * kRowBytes, step),
                                          operand(weights, step));
        }
        products_commit();
      }
      products_wait<0>();
      release();
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      store_rows<T, kColumns, kSplit>(m.z, a.plan.pitch, a.stream.p1, acc[i], first, places[i][0],
                                      places[i][1], a.stream.split);
  }

  __device__ __forceinline__ void stage1(const Tile& tile, int x_parity) {
    for (int pass = 0; pass < a.plan.passes; ++pass) {
      const int row_tile = pass * kPassTiles + group;
      const int tiles = (row_tile < a.plan.m_tiles()) + (row_tile + 2 < a.plan.m_tiles());
      const int row = row_tile * 64 + warp * 16 + lane / 4;
      const int places[2][2] = {{z_place(a.plan, tile, row), z_place(a.plan, tile, row + 8)},
                                {z_place(a.plan, tile, row + 128), z_place(a.plan, tile, row + 136)}};
      for (int j = rank; j < a.stream.in_tiles(); j += a.stream.split) {
        if (tiles == 0) {
          skip(a.stream.in_slots_a_tile());
        } else if (!kSplit && a.stream.in_tile_width(j) == kColumns) {
          tiles == 1 ? stage1_tile<kColumns, 1>(j * kColumns, row_tile, places, x_parity)
                     : stage1_tile<kColumns, 2>(j * kColumns, row_tile, places, x_parity);
        } else {
          const int first = j * a.stream.in_columns();
          tiles == 1 ? stage1_tile<kColumns / 2, 1>(first, row_tile, places, x_parity)
                     : stage1_tile<kColumns / 2, 2>(first, row_tile, places, x_parity);
        }
      }
    }
  }

  // Multiplies one chunk of the core; the fragments `next` of the one behind it come while the tensor cores
  // work.
  __device__ __forceinline__ void stage2_chunk(float (&acc)[kWidth / 2], const uint32_t (&now)[4][4],
                                               uint32_t (&next)[4][4], Steps& steps,
                                               const unsigned char* from, int chunk) {
    if (chunk % kCoreChunks == 0) slot = acquire();
    const unsigned char* weights = slot + chunk % kCoreChunks * (kWidth * kRowBytes);
    products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      Products<T, kWidth>::registers(acc, now[step], operand(weights, step));
    products_commit();
#pragma unroll
    for (int step = 0; step < 4; ++step) steps.load(next[step], from, a);
    products_wait<0>();
    if (chunk % kCoreChunks == kCoreChunks - 1 || chunk == a.stream.core_chunks() - 1) release();
  }

  __device__ __forceinline__ void stage2(float (&acc)[kWidth / 2]) {
    uint32_t even[4][4], odd[4][4];
    const unsigned char* from = z_row(a, m.z, group * 64 + warp * 16);
    Steps steps(a.stream);
#pragma unroll
    for (int step = 0; step < 4; ++step) steps.load(even[step], from, a);
    for (int chunk = 0; chunk < a.stream.core_chunks(); chunk += 2) {
      stage2_chunk(acc, even, odd, steps, from, chunk);
      if (chunk + 1 < a.stream.core_chunks()) stage2_chunk(acc, odd, even, steps, from, chunk + 1);
    }
  }

  __device__ __forceinline__ void stage3(const Tile& tile, const float (&z2_sums)[kWidth / 2]) {
    constexpr int kSteps = kWidth / 16, kOutChunks = (kWidth + kDepth - 1) / kDepth;
    uint32_t z2[kSteps][4];
    to_fragments<T, kWidth>(z2, z2_sums);
    for (int j = 0; j < a.stream.out_tiles; ++j) {
      float acc[kColumns / 2] = {};
#pragma unroll
      for (int s = 0; s < (kOutChunks + 1) / 2; ++s) {
        const unsigned char* weights = acquire();
        products_fence();
#pragma unroll
        for (int step = s * 8; step < s * 8 + 8; ++step) {
          if (step < kSteps)
            Products<T, kColumns>::registers(
                acc, z2[step], operand(weights + step % 8 / 4 * (kColumns * kRowBytes), step % 4));
        }
        products_commit();
        products_wait<0>();
        release();
      }
      finish<T>(a, tile, acc, group * 64 + warp * 16, j * kColumns);
    }
  }

  // The same in a split, whose z2 lies in shared memory.
  __device__ __forceinline__ void stage3_split(const Tile& tile) {
    const int pitch = Plan::z2_pitch(a.stream), steps = a.stream.depth_out / 16;
    const int row = at_most(group * 64 + warp * 16 + lane % 16, a.plan.rows_out() - 1);
    const unsigned char* from = m.z2 + row * pitch + lane / 16 * 16;
    for (int j = rank; j < a.stream.out_tiles; j += a.stream.split) {
      float acc[kColumns / 2] = {};
      for (int chunk = 0; chunk < a.stream.out_chunks(); ++chunk) {
        if (chunk % 2 == 0) slot = acquire();
        uint32_t fragments[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Weights behind the last step are zero, what lies behind z2 is not.
          const bool inside = chunk * 4 + i < steps;
          load_matrices(fragments[i], from + (inside ? chunk * 4 + i : 0) * 32);
#pragma unroll
          for (int k = 0; k < 4; ++k) fragments[i][k] = inside ? fragments[i][k] : 0;
        }
        products_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          Products<T, kColumns>::registers(acc, fragments[i],
                                           operand(slot + chunk % 2 * (kColumns * kRowBytes), i));
        products_commit();
        products_wait<0>();
        if (chunk % 2 == 1 || chunk == a.stream.out_chunks() - 1) release();
      }
      finish<T>(a, tile, acc, group * 64 + warp * 16, j * kColumns);
    }
  }

  __device__ __forceinline__ void take(const Tile& tile, int parity) {
    const int thread = group * kGroup + static_cast<int>(threadIdx.x) % kGroup;
    const bool has_rows = group * 64 < a.plan.rows_out();
    // The last tile's z1 is no longer read.
    if constexpr (kSplit) {
      barrier_wait_cluster(&m.barriers->z1_empty, parity ^ 1);
    } else {
      named_barrier(1, kConsumers);
    }
    clear_padding(a, tile, m.z, thread, kConsumers);
    stage1(tile, parity);
    if (lane == 0) barrier_arrive(&m.barriers->x_empty);
    // z1 is whole.
    if constexpr (kSplit) {
      tell(&m.barriers->z1_full);
      barrier_wait_cluster(&m.barriers->z1_full, parity);
    } else {
      named_barrier(1, kConsumers);
    }
    float acc[kWidth / 2] = {};
    if (has_rows) {
      stage2(acc);
    } else {
      skip(a.stream.core_slots());
    }
    if constexpr (kSplit) {
      tell(&m.barriers->z1_empty);
      barrier_wait_cluster(&m.barriers->z2_empty, parity ^ 1);
      if (has_rows) {
        const int row = group * 64 + warp * 16 + lane / 4, rows = a.plan.rows_out();
        store_rows<T, kWidth, true>(m.z2, Plan::z2_pitch(a.stream), a.stream.depth_out, acc, rank * kWidth,
                                    row < rows ? row : -1, row + 8 < rows ? row + 8 : -1, a.stream.split);
      }
      tell(&m.barriers->z2_full);
      barrier_wait_cluster(&m.barriers->z2_full, parity);
      has_rows ? stage3_split(tile) : skip(a.stream.out_slots(rank));
      tell(&m.barriers->z2_empty);
    } else {
      has_rows ? stage3(tile, acc) : skip(a.stream.out_slots(0));
    }
  }

  __device__ __forceinline__ void run() {
    int parity = 0;
    for (Turns turns(a); turns.more(); turns.next += turns.step, parity ^= 1) {
      if (turns.has_tile()) {
        take(tile_at(a.sizes, a.plan, turns.tile()), parity);
      } else {
        skip(a.stream.slots(a.plan.passes, 0));
      }
    }
  }
};

#endif

template <typename T, int kWidth, bool kSplit>
__global__ void __launch_bounds__(kHopperThreads, 1)
    tucker2_hopper_kernel(const __grid_constant__ Arguments a, const __grid_constant__ TensorMap map) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTRANK_SHARED_1024(unsigned char, shared);
  const Memory m(a, shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < a.plan.ring; ++i) {
      barrier_init(&m.barriers->full[i], 1);
      barrier_init(&m.barriers->empty[i], kConsumerWarps * (kSplit ? 1 : a.plan.cluster));
    }
    for (int i = 0; i < a.stream.chunks_in; ++i)
      barrier_init(&m.barriers->x_full[i], a.whole_x ? 1 : kGatherThreads);
    barrier_init(&m.barriers->x_empty, kConsumerWarps);
    for (Barrier* b :
         {&m.barriers->z1_full, &m.barriers->z1_empty, &m.barriers->z2_full, &m.barriers->z2_empty})
      barrier_init(b, kConsumerWarps * a.stream.split);
    barrier_init_fence();
  }
  __syncthreads();
  if (a.plan.cluster > 1) cluster_barrier();
  if (thread < kGroup) {
    give_registers<kLoaderRegisters>();
    if (thread == 0) load_weights(a, m);
    if (thread >= 32) load_x<T>(a, map, m, thread - 32);
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kWidth, kSplit>(a, m).run();
  }
  __syncwarp();
  // A block may leave when no other one can still signal it or write to it.
  if (a.plan.cluster > 1) cluster_barrier();
#else
  __trap();  // compiled for another architecture: the launcher never comes here
#endif
}

// The map of x that copies boxes of 64 channels go by.
TensorMap map_of(const Arguments& a, DType dtype) {
  TensorMap map{};
  if (!a.whole_x) return map;
  const Sizes& s = a.sizes;
#ifdef __CUDACC__
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(s.in_channels), static_cast<cuuint64_t>(s.width),
                               static_cast<cuuint64_t>(s.height), static_cast<cuuint64_t>(s.batch)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(a.x.w * 2), static_cast<cuuint64_t>(a.x.h * 2),
                                 static_cast<cuuint64_t>(a.x.n * 2)};
  const cuuint32_t box[4] = {kDepth, static_cast<cuuint32_t>(a.plan.box_w),
                             static_cast<cuuint32_t>(a.plan.box_h), static_cast<cuuint32_t>(a.plan.images)};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(
      &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      a.x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("the tensor map of x could not be encoded");
#else
  (void)dtype;
  map = {static_cast<const unsigned char*>(a.x.data),
         {s.in_channels, s.width, s.height, s.batch},
         {2, a.x.w * 2, a.x.h * 2, a.x.n * 2},
         {kDepth, a.plan.box_w, a.plan.box_h, a.plan.images}};
#endif
  return map;
}

}  // namespace

void convolve_hopper(const Arguments& a, DType dtype, int multiprocessors, void* stream) {
  const TensorMap map = map_of(a, dtype);
  const int cluster = a.plan.cluster;
  const int64_t turns = a.stream.split > 1 ? a.plan.tiles : ceil_div(a.plan.tiles, cluster);
  const int64_t clusters = at_least(1, multiprocessors / cluster);
  const dim3 grid(grid_size((turns < clusters ? turns : clusters) * cluster));
  const auto start = [&](auto kernel) {
    launch_clusters(kernel, grid, dim3(kHopperThreads), a.plan.shared_bytes, cluster, stream, a, map);
  };
  visit_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.stream.split > 1) {
      visit_width<kSplitWidths>(
          a.stream.p2, [&](auto width) { start(tucker2_hopper_kernel<T, decltype(width)::value, true>); });
    } else {
      visit_width<kWidths>(
          a.stream.p2, [&](auto width) { start(tucker2_hopper_kernel<T, decltype(width)::value, false>); });
    }
  });
}

}  // namespace fastrank::tucker2
