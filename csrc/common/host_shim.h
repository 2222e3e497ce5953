// Runs CUDA kernel source on the host: one fiber a thread, one block after the other.
//
// A fiber runs until it meets a barrier or a shuffle, then the next one of its warp runs; a warp runs as far
// as a block barrier before the next warp starts. So results are deterministic, a missing block barrier shows
// as a wrong result, and a barrier that part of a block skips is an error instead of a hang. Shared memory is
// filled with NaN bytes before each block, so that a read before the first write shows. Slow on purpose: it
// exists so that tests run the GPU source on machines without a GPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace fastrank::host {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  State state = State::kReady;
  int shuffles = 0;
};

// The block that runs on this OS thread.
struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<std::uint64_t>
      slots;  // two a thread: consecutive shuffles alternate, so that one barrier each is enough
  std::vector<unsigned char> shared;
  std::function<void()> body;
  std::exception_ptr error;
  int threads = 0;
  int current = 0;

  void run(dim3 block, std::size_t shared_bytes);
  void wait(State barrier) {
    Fiber& fiber = fibers[current];
    fiber.state = barrier;
    swapcontext(&fiber.context, &scheduler);
  }

 private:
  void start(int thread);
  bool advance(int first, int last, dim3 shape);
  bool release(int first, int last, State barrier, const char* name);
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline void fiber_main() {
  Block& b = block();
  try {
    b.body();
  } catch (...) {
    b.error = std::current_exception();
  }
  b.fibers[b.current].state = State::kDone;
}

inline void Block::start(int thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  fiber.state = State::kReady;
  fiber.shuffles = 0;
  makecontext(&fiber.context, fiber_main, 0);
}

// Lets threads [first, last) pass a barrier once all of them wait at it; whether any was let through.
inline bool Block::release(int first, int last, State barrier, const char* name) {
  int waiting = 0, done = 0;
  for (int t = first; t < last; ++t) {
    waiting += fibers[t].state == barrier;
    done += fibers[t].state == State::kDone;
  }
  if (waiting == 0) return false;
  if (waiting + done == last - first && done > 0) {
    throw std::runtime_error(std::string("part of the threads left the kernel before a ") + name +
                             " barrier");
  }
  if (waiting != last - first) return false;
  for (int t = first; t < last; ++t) fibers[t].state = State::kReady;
  return true;
}

// Runs each ready thread in [first, last) up to its next barrier; whether there was any.
inline bool Block::advance(int first, int last, dim3 shape) {
  bool any = false;
  for (int t = first; t < last; ++t) {
    if (fibers[t].state != State::kReady) continue;
    any = true;
    current = t;
    const unsigned u = static_cast<unsigned>(t);
    threadIdx = dim3(u % shape.x, u / shape.x % shape.y, u / (shape.x * shape.y));
    swapcontext(&scheduler, &fibers[t].context);
    if (error) std::rethrow_exception(error);
  }
  return any;
}

inline void Block::run(dim3 shape, std::size_t shared_bytes) {
  threads = static_cast<int>(shape.x * shape.y * shape.z);
  if (threads < 1 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (fibers.size() < static_cast<std::size_t>(threads)) fibers.resize(threads);
  slots.assign(2 * static_cast<std::size_t>(threads), 0);
  shared.assign(shared_bytes, 0xFF);
  error = nullptr;
  for (int t = 0; t < threads; ++t) start(t);
  for (bool progress = true; progress;) {
    progress = false;
    bool all_done = true;
    for (int first = 0; first < threads; first += kWarp) {
      const int last = first + kWarp < threads ? first + kWarp : threads;
      while (advance(first, last, shape) || release(first, last, State::kAtWarpBarrier, "warp"))
        progress = true;
      for (int t = first; t < last; ++t) all_done = all_done && fibers[t].state == State::kDone;
    }
    if (all_done) return;
    progress = release(0, threads, State::kAtBlockBarrier, "block") || progress;
  }
  throw std::runtime_error("the threads of a block wait at different barriers");
}

// The value that thread `source` of this warp passed to the same shuffle; one's own where there is no such
// thread.
template <typename T>
T shuffle(T value, unsigned mask, int source_lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle moves at most eight bytes");
  if (mask != 0xffffffffu) throw std::runtime_error("the host build knows full-warp shuffles only");
  Block& b = block();
  const int self = b.current, first = self / kWarp * kWarp;
  const int parity = b.fibers[self].shuffles++ & 1;
  std::memcpy(&b.slots[2 * self + parity], &value, sizeof(T));
  b.wait(State::kAtWarpBarrier);
  const int source = first + source_lane;
  if (source_lane < 0 || source_lane >= kWarp || source >= b.threads) return value;
  T out;
  std::memcpy(&out, &b.slots[2 * source + parity], sizeof(T));
  return out;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes,
            Arguments... arguments) {
  gridDim = grid;
  blockDim = threads;
  Block& b = block();
  b.body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        b.run(threads, shared_bytes);
      }
    }
  }
}

}  // namespace fastrank::host

inline void __syncthreads() {
  fastrank::host::block().wait(fastrank::host::State::kAtBlockBarrier);
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  fastrank::host::block().wait(fastrank::host::State::kAtWarpBarrier);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return fastrank::host::shuffle(value, mask, lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return fastrank::host::shuffle(value, mask,
                                 (fastrank::host::block().current % fastrank::host::kWarp) ^ lane_mask);
}

// One block runs after the other and one thread at a time: an update of memory needs no lock here.
inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned before = *address;
  if (value > before) *address = value;
  return before;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = fastrank::host::block().current % fastrank::host::kWarp;
  return fastrank::host::shuffle(value, mask, lane + static_cast<int>(delta));
}
