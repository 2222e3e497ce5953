"""Runs the CUDA C++ kernels on the host under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/reliability/sanitize.py [--tests FILE ...] [--keep]

The module that runs the kernels' source as fibers (fastrank._host) is compiled with both sanitizers into a copy of the
tree, and the tests that use it run there. Tensors come from the allocator that AddressSanitizer watches, and the unused
rest of shared memory is poisoned, so a kernel that reads or writes one element too far stops the run. First two kernels
with such a bug have to be found: sanitizers that see nothing would be no proof. (On a GPU, `make gpu` runs the four
tools of compute-sanitizer over the real kernels.)
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import outcome
from mutants import Copy
from outcome import ROOT

FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
TESTS = (
    "tests/csrc",
    "tests/ops/test_gates.py",
    "tests/ops/test_gate_lists.py",
    "tests/ops/test_linalg_kernels.py",
    "tests/ops/test_tucker2_kernels.py",
)
LIMIT_S = 5400.0
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--tb=short")
PROBE = r"""
#include <cstdlib>
#include "common/reduce.cuh"

__global__ void too_far(float* out, int n) { out[threadIdx.x + n] = 1.0f; }
__global__ void too_far_shared(float* out, int n) {
  FASTRANK_SHARED(float, scratch);
  __syncthreads();
  scratch[threadIdx.x + n] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = scratch[threadIdx.x];
}

int main(int argc, char** argv) {
  const int n = argc > 2 ? std::atoi(argv[2]) : 0;
  float* out = new float[32];
  fastrank::host::launch(argv[1][0] == 'g' ? too_far : too_far_shared, dim3(1), dim3(32), 128, out, n);
  delete[] out;
}
"""


def probe(folder: Path) -> str:
    """Empty where the sanitizers find what is wrong, and only that; else the sentence that says what they missed."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text(PROBE, encoding="utf-8")
    command = ["g++", *FLAGS, f"-I{ROOT / 'csrc'}", "-x", "c++", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        return f"g++ cannot compile with them: {built.stderr.strip().splitlines()[-1]}"
    for memory in ("global", "shared"):
        for beyond in (0, 1):
            found = subprocess.run([program, memory, str(beyond)], capture_output=True, text=True, check=False)
            if ("AddressSanitizer" in found.stderr) != bool(beyond) or (found.returncode != 0) != bool(beyond):
                what = "missed a write" if beyond else "found something in a right kernel"
                return f"they {what} beyond {memory} memory: {found.stderr[:300]}"
    return ""


def build(copy: Copy) -> str:
    """Compile fastrank._host of the copy with the sanitizers; empty, or why not."""
    import pybind11

    target = copy.folder / "fastrank" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = ["csrc", pybind11.get_include(), sysconfig.get_path("include")]
    defines = ['-DFASTRANK_NVCC=""', '-DFASTRANK_ARCHS=""']
    command = ["g++", *FLAGS, "-shared", "-fPIC", *defines, *(f"-I{each}" for each in includes)]
    code, text = copy.run([*command, "csrc/bindings.cpp", "-o", str(target)], LIMIT_S)
    return "" if code == 0 else text[-300:]


def library(name: str) -> str:
    """Where the compiler has a library."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = outcome.parser(__doc__)
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files or folders of tests")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if missed := probe(folder):
            return outcome.finish("sanitize", f"the sanitizers do not work here: {missed}", {}, ok=False)
        copy = Copy(folder / "tree")
        if why := build(copy):
            return outcome.finish("sanitize", f"fastrank._host was not compiled: {why}", {}, ok=False)
        # Python is not compiled with them, so they have to be there before everything else.
        preload = " ".join(library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
        code, text = copy.run(
            [*PYTEST, "-n", str(options.jobs), *options.tests],
            LIMIT_S,
            LD_PRELOAD=preload,
            # What Python and torch leave behind at their end is not looked for; torch's allocator aligns by itself.
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
            UBSAN_OPTIONS="print_stacktrace=1",
        )
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    errors = re.findall(r"(?:ERROR: (AddressSanitizer[^\n]*)|runtime error: ([^\n]*))", text)
    ok = code == 0 and not errors and counts.get("passed", 0) > 0
    line = f"{counts.get('passed', 0)} tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
    line += ", 0 errors" if ok else f": {errors[:1] or text[-1500:]}"
    return outcome.finish("sanitize", line, {"tests": counts, "flags": FLAGS}, ok=ok, keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
