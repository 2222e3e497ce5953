// Runs CUDA kernel source on the host: one fiber a thread, one cluster of blocks after the other.
//
// A fiber runs until it meets a barrier, a shuffle or a wait, then the next one of its warp runs; a warp runs
// as far as it can before the next warp starts. So results are deterministic, a missing block barrier shows
// as a wrong result, and a barrier that part of a block skips is an error instead of a hang. Shared memory is
// filled with NaN bytes before each block, so that a read before the first write shows. Slow on purpose: it
// exists so that tests run the GPU source on machines without a GPU.
#pragma once

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/host_types.h"

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
// AddressSanitizer has to be told of every change of stacks, and of memory that the kernels must not touch.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

struct Stack {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
};

// Before a change to the stack `next`; `frames` keeps what belongs to this one, null where it ends.
inline void leave([[maybe_unused]] const Stack& next, [[maybe_unused]] void** frames) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(frames, next.bottom, next.bytes);
#endif
}

// After it, on the new stack, which left `frames`; `before` is told where it came from.
inline void arrive([[maybe_unused]] void* frames, [[maybe_unused]] Stack* before) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, before ? &before->bottom : nullptr,
                                  before ? &before->bytes : nullptr);
#endif
}

// Of `bytes` bytes at `start` the first `used` may be touched, the others not.
inline void forbid([[maybe_unused]] const unsigned char* start, [[maybe_unused]] std::size_t used,
                   [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(start, used);
  ASAN_POISON_MEMORY_REGION(start + used, bytes - used);
#endif
}

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* frames = nullptr;  // of AddressSanitizer, while the fiber waits
  State state = State::kReady;
  int exchanges = 0;
  std::function<bool()> signal;  // what a waiting thread waits for
};

// A barrier that a number of threads meet at, again and again.
struct Meeting {
  int arrived = 0;
  unsigned round = 0;
};

// The cluster of blocks (mostly one) that runs on this OS thread.
struct Block {
  static constexpr std::size_t kSlotBytes = 16, kAlignment = 1024;

  ucontext_t scheduler;
  Stack own;  // of the scheduler
  std::vector<Fiber> fibers;
  // Two a thread: consecutive exchanges alternate, so that one barrier each is enough.
  std::vector<std::array<unsigned char, kSlotBytes>> slots;
  std::vector<unsigned char> memory;
  std::vector<std::array<Meeting, 16>> named;
  Meeting everyone;
  std::function<void()> body;
  std::exception_ptr error;
  int threads = 0;  // of a block
  int blocks = 1;
  int current = 0;
  std::size_t stride = 0;  // between the shared memories of two blocks

  void run(dim3 block, std::size_t shared_bytes, dim3 first, int count);
  void wait(State barrier) {
    Fiber& fiber = fibers[current];
    fiber.state = barrier;
    leave(own, &fiber.frames);
    swapcontext(&fiber.context, &scheduler);
    arrive(fiber.frames, &own);
  }
  void wait_until(std::function<bool()> signal) {
    if (signal()) return;
    fibers[current].signal = std::move(signal);
    wait(State::kWaiting);
  }
  void meet(Meeting& meeting, int count) {
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      ++meeting.round;
      return;
    }
    const unsigned round = meeting.round;
    wait_until([&meeting, round] { return meeting.round != round; });
  }
  int rank() const { return current / threads; }
  unsigned char* shared(int rank) {
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (kAlignment - start % kAlignment) % kAlignment +
           stride * static_cast<std::size_t>(rank);
  }
  unsigned char* shared() { return shared(rank()); }

 private:
  void start(int thread);
  bool advance(int first, int last, dim3 shape, dim3 place);
  bool release(int first, int last, State barrier, const char* name);
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline void fiber_main() {
  Block& b = block();
  arrive(nullptr, &b.own);
  try {
    b.body();
  } catch (...) {
    b.error = std::current_exception();
  }
  b.fibers[b.current].state = State::kDone;
  leave(b.own, nullptr);
}

inline void Block::start(int thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  fiber.state = State::kReady;
  fiber.exchanges = 0;
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

// Runs each thread in [first, last) that can run up to its next barrier or wait; whether there was any.
inline bool Block::advance(int first, int last, dim3 shape, dim3 place) {
  bool any = false;
  for (int t = first; t < last; ++t) {
    Fiber& fiber = fibers[t];
    if (fiber.state == State::kWaiting && fiber.signal()) fiber.state = State::kReady;
    if (fiber.state != State::kReady) continue;
    any = true;
    current = t;
    const unsigned u = static_cast<unsigned>(t % threads);
    threadIdx = dim3(u % shape.x, u / shape.x % shape.y, u / (shape.x * shape.y));
    blockIdx = place;
    void* frames = nullptr;
    leave({fiber.stack.get(), kStackBytes}, &frames);
    swapcontext(&scheduler, &fiber.context);
    arrive(frames, nullptr);
    if (error) std::rethrow_exception(error);
  }
  return any;
}

inline void Block::run(dim3 shape, std::size_t shared_bytes, dim3 place, int count) {
  threads = static_cast<int>(shape.x * shape.y * shape.z);
  blocks = count;
  if (threads < 1 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  const int all = threads * blocks;
  if (fibers.size() < static_cast<std::size_t>(all)) fibers.resize(all);
  slots.assign(2 * static_cast<std::size_t>(all), {});
  stride = (shared_bytes + kAlignment - 1) / kAlignment * kAlignment;
  forbid(memory.data(), memory.size(), memory.size());
  memory.assign(stride * static_cast<std::size_t>(blocks) + kAlignment, 0xFF);
  for (int b = 0; b < blocks; ++b) forbid(shared(b), shared_bytes, stride);
  named.assign(blocks, {});
  everyone = {};
  error = nullptr;
  for (int t = 0; t < all; ++t) start(t);
  for (bool progress = true; progress;) {
    progress = false;
    bool all_done = true;
    for (int b = 0; b < blocks; ++b) {
      const dim3 here(place.x + b, place.y, place.z);
      const int end = (b + 1) * threads;
      for (int first = b * threads; first < end; first += kWarp) {
        const int last = first + kWarp < end ? first + kWarp : end;
        while (advance(first, last, shape, here) || release(first, last, State::kAtWarpBarrier, "warp"))
          progress = true;
        for (int t = first; t < last; ++t) all_done = all_done && fibers[t].state == State::kDone;
      }
      progress = release(b * threads, end, State::kAtBlockBarrier, "block") || progress;
    }
    if (all_done) return;
  }
  throw std::runtime_error("the threads of a block wait at different barriers");
}

// What every lane of this warp passed to the same exchange.
template <typename T>
class Lanes {
 public:
  explicit Lanes(const T& value) {
    static_assert(sizeof(T) <= Block::kSlotBytes, "an exchange moves at most sixteen bytes");
    Block& b = block();
    const int self = b.current, local = self % b.threads;
    first_ = self - local % kWarp;
    lanes_ = b.threads - (local - local % kWarp) < kWarp ? b.threads - (local - local % kWarp) : kWarp;
    parity_ = b.fibers[self].exchanges++ & 1;
    std::memcpy(b.slots[2 * self + parity_].data(), &value, sizeof(T));
    b.wait(State::kAtWarpBarrier);
  }
  bool has(int lane) const { return lane >= 0 && lane < lanes_; }
  T operator[](int lane) const {
    T out;
    std::memcpy(&out, block().slots[2 * (first_ + lane) + parity_].data(), sizeof(T));
    return out;
  }

 private:
  int first_, lanes_, parity_;
};

// The value that lane `source` of this warp passed to the same shuffle; one's own where there is no such
// lane.
template <typename T>
T shuffle(T value, unsigned mask, int source) {
  if (mask != 0xffffffffu) throw std::runtime_error("the host build knows full-warp shuffles only");
  const Lanes<T> lanes(value);
  return lanes.has(source) ? lanes[source] : value;
}

inline int lane() {
  return block().current % block().threads % kWarp;
}

// Runs the grid, `cluster` blocks along x at a time.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes,
                     int cluster, const Arguments&... arguments) {
  if (grid.x % cluster != 0) throw std::runtime_error("a grid is a multiple of its clusters");
  gridDim = grid;
  blockDim = threads;
  Block& b = block();
  b.body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) b.run(threads, shared_bytes, dim3(x, y, z), cluster);
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared_bytes,
            const Arguments&... arguments) {
  launch_clusters(kernel, grid, threads, shared_bytes, 1, arguments...);
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
  return fastrank::host::shuffle(value, mask, fastrank::host::lane() ^ lane_mask);
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
  return fastrank::host::shuffle(value, mask, fastrank::host::lane() + static_cast<int>(delta));
}
