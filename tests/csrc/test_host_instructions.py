"""What the host makes of Hopper's instructions, one by one: barriers that count bytes, copies, clusters, products.

The expected values come from the instructions' definitions (PTX ISA), computed here with NumPy and torch.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")


def run(tmp_path: Path, program: str, data: bytes = b"") -> bytes:
    source, binary = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text('#include <cstdio>\n#include "common/launch.cuh"\n#include "common/wgmma.cuh"\n' + program)
    command = ["c++", "-O1", "-std=c++17", "-Wno-unknown-pragmas", f"-I{CSRC}", str(source), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(binary)], input=data, capture_output=True, check=True).stdout


def test_halves_round_as_torch_rounds(tmp_path: Path) -> None:
    program = """
    int main() {
      float x;
      while (std::fread(&x, 4, 1, stdin) == 1) {
        const __half h = __float2half_rn(x);
        const __nv_bfloat16 b = __float2bfloat16_rn(x);
        const float back[2] = {__half2float(h), __bfloat162float(b)};
        std::fwrite(back, 4, 2, stdout);
      }
    }
    """
    numbers = np.random.default_rng(0).integers(0, 2**32, 40000, dtype=np.uint32).view(np.float32)
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float().numpy()
    between = (every_half[:-1] + every_half[1:]) / 2  # ties, to even
    special = np.array([0.0, -0.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, np.inf, -np.inf], np.float32)
    numbers = np.concatenate([numbers, every_half, between.astype(np.float32), special])
    found = np.frombuffer(run(tmp_path, program, numbers.tobytes()), np.float32).reshape(-1, 2)
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        wanted = torch.from_numpy(numbers.copy()).to(dtype).float().numpy()
        np.testing.assert_array_equal(found[:, column], wanted)
        assert (np.signbit(found[:, column]) == np.signbit(wanted))[~np.isnan(wanted)].all()


PROTOCOL = """
using namespace fastrank;
struct Memory { unsigned char data[64]; Barrier full, empty; };

// Thread 0 of each block fills; the others read and say so to both blocks of the cluster.
__global__ void shared_copies(const unsigned char* from, float* out) {
  FASTRANK_SHARED_1024(Memory, m);
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  if (thread == 0) barrier_init(&m->full, 1), barrier_init(&m->empty, 2 * 63);
  __syncthreads();
  cluster_barrier();
  float total = 0;
  for (int turn = 0; turn < 3; ++turn) {
    if (thread == 0) {
      barrier_wait(&m->empty, turn % 2 ^ 1);
      barrier_expect(&m->full, 64);
      bulk_copy(m->data + 32 * rank, from + 64 * turn + 32 * rank, 32, &m->full, 2);
      continue;
    }
    barrier_wait(&m->full, turn % 2);
    for (int i = 0; i < 64; ++i) total += m->data[i] * (turn + 1);
    barrier_arrive_at(&m->empty, 0);
    barrier_arrive_at(&m->empty, 1);
  }
  if (thread != 0) named_barrier(3, 63);
  if (thread == 63) out[blockIdx.x] = total;
  cluster_barrier();
}
__global__ void too_many(float*) {
  FASTRANK_SHARED_1024(Barrier, b);
  if (threadIdx.x == 0) barrier_init(b, 2), barrier_expect(b, 16), barrier_arrive(b), barrier_arrive(b);
}
__global__ void never(float*) {
  FASTRANK_SHARED_1024(Barrier, b);
  if (threadIdx.x == 0) barrier_init(b, 1);
  __syncthreads();
  barrier_wait(b, 0);
}
__global__ void crooked(float* out) {
  FASTRANK_SHARED_1024(unsigned char, s);
  Barrier* b = reinterpret_cast<Barrier*>(s + 512);
  barrier_init(b, 1);
  bulk_copy(s + 8, out, 16, b, 1);
}
template <typename Kernel>
void attempt(Kernel kernel, unsigned threads) {
  alignas(16) float out[4] = {};
  try {
    host::launch(kernel, dim3(1), dim3(threads), 1024, static_cast<float*>(out));
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
int main() {
  alignas(16) unsigned char from[192];
  for (int i = 0; i < 192; ++i) from[i] = static_cast<unsigned char>(i);
  float out[4] = {};
  host::launch_clusters(shared_copies, dim3(4), dim3(64), sizeof(Memory), 2,
                        static_cast<const unsigned char*>(from), static_cast<float*>(out));
  std::printf("%g %g %g %g\\n", out[0], out[1], out[2], out[3]);
  attempt(too_many, 1), attempt(never, 2), attempt(crooked, 1);
}
"""


def test_barriers_copies_and_clusters(tmp_path: Path) -> None:
    total = sum(value * (value // 64 + 1) for value in range(192))
    assert run(tmp_path, PROTOCOL).decode().splitlines() == [
        f"{total} {total} {total} {total}",
        "more threads arrive at a barrier than it counts",
        "the threads of a block wait at different barriers",
        "a bulk copy moves aligned groups of 16 bytes",
    ]


PRODUCTS = """
using namespace fastrank;
constexpr int kN = 96;
// a (64, 64) and b (kN, 64) arrive swizzled; out: A B^T by operands from shared memory, then from registers.
__global__ void products(const __half* a, const __half* b, float* out) {
  FASTRANK_SHARED_1024(unsigned char, s);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int i = thread; i < (64 + kN) * 64; i += 128) {
    const int row = i / 64 % 64, column = i % 64;
    const __half value = i < 64 * 64 ? a[i] : b[i - 64 * 64];
    const int r = i < 64 * 64 ? row : (i - 64 * 64) / 64;
    unsigned char* to = s + (i < 64 * 64 ? 0 : 8192) + r * 128 + ((column * 2) ^ (r % 8 * 16));
    *reinterpret_cast<__half*>(to) = value;
  }
  __syncthreads();
  float shared[kN / 2] = {}, registers[kN / 2] = {};
  for (int step = 0; step < 4; ++step) {
    Products<__half, kN>::shared(shared, operand(s, step), operand(s + 8192, step));
    uint32_t fragment[4];
    const int row = 16 * warp + lane % 16, byte = 32 * step + lane / 16 * 16;
    load_matrices(fragment, s + row * 128 + (byte ^ (row % 8 * 16)));
    Products<__half, kN>::registers(registers, fragment, operand(s + 8192, step));
  }
  for (int j = 0; j < kN / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      out[row * kN + column] = shared[4 * j + i];
      out[64 * kN + row * kN + column] = registers[4 * j + i];
    }
  }
}
// The same by mma.sync, sixteen rows a warp.
__global__ void small_products(const __half* a, const __half* b, float* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const auto two = [](const __half* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
  };
  for (int j = 0; j < kN / 8; ++j) {
    float d[4] = {};
    for (int k = 0; k < 64; k += 16) {
      const __half* row = a + (16 * warp + g) * 64 + k + 2 * t;
      const uint32_t fragment[4] = {two(row), two(row + 8 * 64), two(row + 8), two(row + 8 * 64 + 8)};
      const __half* column = b + (8 * j + g) * 64 + k + 2 * t;
      multiply_16x8<__half>(d, fragment, two(column), two(column + 8));
    }
    for (int i = 0; i < 4; ++i) out[(16 * warp + g + i / 2 * 8) * kN + 8 * j + 2 * t + i % 2] = d[i];
  }
}
int main() {
  static __half a[64 * 64], b[kN * 64];
  static float out[3 * 64 * kN];
  if (std::fread(a, sizeof(a), 1, stdin) != 1 || std::fread(b, sizeof(b), 1, stdin) != 1) return 1;
  host::launch(products, dim3(1), dim3(128), 8192 + kN * 128, static_cast<const __half*>(a),
               static_cast<const __half*>(b), static_cast<float*>(out));
  host::launch(small_products, dim3(1), dim3(128), 0, static_cast<const __half*>(a), static_cast<const __half*>(b),
               out + 2 * 64 * kN);
  std::fwrite(out, sizeof(out), 1, stdout);
}
"""


def test_products_of_both_generations(tmp_path: Path) -> None:
    # Small whole numbers, whose products and sums are exact.
    generator = np.random.default_rng(1)
    a, b = (generator.integers(-8, 9, (rows, 64)).astype(np.float16) for rows in (64, 96))
    found = np.frombuffer(run(tmp_path, PRODUCTS, a.tobytes() + b.tobytes()), np.float32).reshape(3, 64, 96)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T
    for kind in found:
        np.testing.assert_array_equal(kind, wanted)


TENSOR = """
using namespace fastrank;
// Boxes of 64 channels, 3 x 2 pixels of one image, that begin outside the map.
__global__ void boxes(const TensorMap map, float* out) {
  FASTRANK_SHARED_1024(unsigned char, s);
  Barrier* barrier = reinterpret_cast<Barrier*>(s + 1024);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, 6 * 128);
    tensor_copy(s, &map, 0, -1, 3, 1, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 6 * 64; i += 32) {
    const int row = i / 64, byte = i % 64 * 2;
    out[i] = __half2float(*reinterpret_cast<const __half*>(s + row * 128 + (byte ^ (row % 8 * 16))));
  }
}
int main() {
  static __half x[2 * 4 * 5 * 40];  // (N, H, W, C)
  static float out[6 * 64];
  if (std::fread(x, sizeof(x), 1, stdin) != 1) return 1;
  const TensorMap map{reinterpret_cast<const unsigned char*>(x), {40, 5, 4, 2}, {2, 80, 400, 1600}, {64, 3, 2, 1}};
  host::launch(boxes, dim3(1), dim3(32), 1024 + 8, map, static_cast<float*>(out));
  std::fwrite(out, sizeof(out), 1, stdout);
}
"""


def test_boxes_of_a_tensor(tmp_path: Path) -> None:
    x = np.arange(2 * 4 * 5 * 40).reshape(2, 4, 5, 40).astype(np.float16)
    found = np.frombuffer(run(tmp_path, TENSOR, x.tobytes()), np.float32).reshape(2, 3, 64)
    wanted = np.zeros((2, 3, 64), np.float32)
    wanted[0, 1:, :40] = x[1, 3, :2]  # row 3 of image 1, columns 0 and 1; the rest is outside
    np.testing.assert_array_equal(found, wanted)
