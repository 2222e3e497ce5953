// Barriers that count bytes, bulk copies that signal them, clusters: Hopper's instructions, and what they do
// on the host.
#pragma once

#include "common/device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace fastrank {

#ifdef __CUDACC__

using Barrier = uint64_t;  // in shared memory
using TensorMap = CUtensorMap;

// The address of shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#else

// Signed bytes still to come, arrivals still to come, arrivals a phase, and the phase in the top bit.
struct Barrier {
  std::int32_t bytes;
  std::uint16_t pending, count_phase;

  int phase() const { return count_phase >> 15; }
  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = count_phase & 0x7fff;
      count_phase ^= 0x8000;
    }
  }
};
static_assert(sizeof(Barrier) == 8, "a barrier takes eight bytes, as on the device");

// What cuTensorMapEncodeTiled is told of a tensor of 16-bit elements, innermost dimension first.
struct TensorMap {
  const unsigned char* base;
  std::int64_t sizes[4], strides[4];  // strides in bytes
  int box[4];
};

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - host::block().shared());
}

#endif

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#else
  *barrier = {0, static_cast<std::uint16_t>(arrivals), static_cast<std::uint16_t>(arrivals)};
#endif
}

// Makes barriers that this thread has initialised visible to copies and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  if (barrier->pending == 0) throw std::runtime_error("more threads arrive at a barrier than it counts");
  --barrier->pending;
  barrier->settle();
#endif
}

// Arrives at the barrier that lies at the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, int rank) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  barrier_arrive(reinterpret_cast<Barrier*>(host::block().shared(rank) + shared_address(barrier)));
#endif
}

// Arrives, and makes the phase wait for `bytes` more to be copied.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  barrier->bytes += bytes;
  barrier_arrive(barrier);
#endif
}

// Waits until the phase of the given parity has ended.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra ready;\n\t"
      "bra again;\n\t"
      "ready:\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  host::block().wait_until([barrier, parity] { return barrier->phase() != parity; });
#endif
}

// The same, and what other blocks of the cluster wrote before they arrived can be read.
__device__ __forceinline__ void barrier_wait_cluster(Barrier* barrier, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra ready;\n\t"
      "bra again;\n\t"
      "ready:\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  barrier_wait(barrier, parity);
#endif
}

// Writes a word to the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_at(void* to, int rank, uint32_t word) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "st.shared::cluster.b32 [remote], %2;\n\t}" ::"r"(shared_address(to)),
      "r"(rank), "r"(word)
      : "memory");
#else
  std::memcpy(host::block().shared(rank) + shared_address(to), &word, sizeof(word));
#endif
}

// Copies `bytes`, a multiple of 16, to the same place of shared memory in the first `blocks` blocks of the
// cluster, and signals the barrier at the same place in each; in this block alone where `blocks` is 1.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier,
                                          int blocks) {
#ifdef __CUDACC__
  if (blocks > 1) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], "
        "%2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
  }
#else
  if (bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0 || shared_address(to) % 16 != 0)
    throw std::runtime_error("a bulk copy moves aligned groups of 16 bytes");
  const uint32_t place = shared_address(to), signal = shared_address(barrier);
  const int first = blocks > 1 ? 0 : host::block().rank();
  for (int rank = first; rank < first + blocks; ++rank) {
    std::memcpy(host::block().shared(rank) + place, from, static_cast<std::size_t>(bytes));
    Barrier* there = reinterpret_cast<Barrier*>(host::block().shared(rank) + signal);
    there->bytes -= bytes;
    there->settle();
  }
#endif
}

// Copies a box of the tensor that begins at (c, x, y, n), zeros where it leaves it, rows of 128 bytes,
// swizzled.
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap* map, int c, int x, int y, int n,
                                            Barrier* barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(n)
      : "memory");
#else
  if (shared_address(to) % 1024 != 0)
    throw std::runtime_error("a swizzled box begins at a multiple of 1024 bytes");
  if (map->box[0] != 64) throw std::runtime_error("a swizzled row has 64 elements");
  for (const int size : map->box)
    if (size > 256) throw std::runtime_error("a box has at most 256 elements along a dimension");
  const int start[4] = {c, x, y, n};
  unsigned char* out = static_cast<unsigned char*>(to);
  int row = 0;
  for (int in = 0; in < map->box[3]; ++in) {
    for (int iy = 0; iy < map->box[2]; ++iy) {
      for (int ix = 0; ix < map->box[1]; ++ix, ++row) {
        for (int ic = 0; ic < 64; ++ic) {
          const std::int64_t at[4] = {start[0] + ic, start[1] + ix, start[2] + iy, start[3] + in};
          std::uint16_t value = 0;
          bool inside = true;
          std::int64_t offset = 0;
          for (int d = 0; d < 4; ++d) {
            inside = inside && at[d] >= 0 && at[d] < map->sizes[d];
            offset += at[d] * map->strides[d];
          }
          if (inside) std::memcpy(&value, map->base + offset, sizeof(value));
          std::memcpy(out + row * 128 + ((ic * 2) ^ (row % 8 * 16)), &value, sizeof(value));
        }
      }
    }
  }
  barrier->bytes -= row * 128;
  barrier->settle();
#endif
}

__device__ __forceinline__ int cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return host::block().rank();
#endif
}

// Every thread of every block of the cluster.
__device__ __forceinline__ void cluster_barrier() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  host::Block& b = host::block();
  b.meet(b.everyone, b.threads * b.blocks);
#endif
}

// Ordinary writes of this thread to shared memory become visible to tensor cores and copies.
__device__ __forceinline__ void async_fence() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#endif  // Hopper

// `threads` threads of a block meet at barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::Block& b = host::block();
  b.meet(b.named[b.rank()][id], threads);
#endif
}

// Starts copying 16 bytes to shared memory; zeros where not `valid`.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  if (valid) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
#endif
}

__device__ __forceinline__ void copies_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastrank
