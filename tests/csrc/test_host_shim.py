"""The host shim runs kernels as a GPU would, and turns what a GPU would hang on or hide into an error."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include "common/reduce.cuh"

__global__ void sums(float* out) {
  FASTRANK_SHARED(float, scratch);
  const float total = fastrank::block_sum<96>(static_cast<float>(threadIdx.x), scratch);
  if (threadIdx.x == 95) out[blockIdx.x] = total + 1000.0f * blockIdx.x;
}
__global__ void reverse(float* out) {
  const int lane = threadIdx.x % 32;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<float>(threadIdx.x), 31 - lane);
}
__global__ void unwritten(float* out) {
  FASTRANK_SHARED(float, scratch);
  out[0] = scratch[threadIdx.x];
}
__global__ void part_leaves(float*) {
  if (threadIdx.x < 5) return;
  __syncthreads();
}
__global__ void different_barriers(float*) {
  if (threadIdx.x < 5) __syncwarp(); else __syncthreads();
}

template <typename Kernel>
void attempt(const char* name, Kernel kernel, unsigned blocks, unsigned threads) {
  float out[96] = {};
  try {
    fastrank::host::launch(kernel, dim3(blocks), dim3(threads), 512, static_cast<float*>(out));
    std::printf("%s %g %g %g\n", name, out[0], out[1], out[40]);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

int main() {
  attempt("sums", sums, 2, 96);
  attempt("reverse", reverse, 1, 64);
  attempt("unwritten", unwritten, 1, 1);
  attempt("part_leaves", part_leaves, 1, 64);
  attempt("different_barriers", different_barriers, 1, 32);
  attempt("sums", sums, 1, 96);
}
"""
EXPECTED = """sums 4560 5560 0
reverse 31 30 55
unwritten nan 0 0
part_leaves: part of the threads left the kernel before a block barrier
different_barriers: the threads of a block wait at different barriers
sums 4560 0 0
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_shim(tmp_path: Path) -> None:
    source, program = tmp_path / "shim.cpp", tmp_path / "shim"
    source.write_text(PROGRAM, encoding="utf-8")
    flags = ["-O1", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    built = subprocess.run(
        ["c++", *flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    shown = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert shown.replace("-nan", "nan") == EXPECTED
