"""Compiles the Triton kernels of the Tucker-2 benchmarks into Triton's cache, in several processes at a time.

    python bench/tucker2_warm.py SHARE OF     # the SHARE-th of OF parts of the layers

One process would compile for as long as the benchmarks measure. What fails here is compiled, or told, by them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from fastrank.benchmarks import tucker2_contenders as contenders
from fastrank.benchmarks.layers import FORWARD_BATCHES, RESNET18, TRAINED_BATCHES

SECONDS, MOST_PROCESSES = 45.0, 12


def share(index: int, of: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> int:
    """Run every `of`-th case once, from `index` on; how many there were."""
    cases = [(layer, batch) for layer in RESNET18 for batch in FORWARD_BATCHES][index::of]
    for layer, batch in cases:
        for epilogue in (True, False):
            p = contenders.problem(
                layer, batch, epilogue=epilogue, dtype=dtype, device=device, memory_format=torch.channels_last
            )
            if "triton" in contenders.refusals(p, "inference"):
                continue
            with torch.no_grad():
                contenders.triton(p)()
        if batch in TRAINED_BATCHES and "triton" not in contenders.refusals(p, "backward"):
            contenders.training("triton")(p)()
    return len(cases)


def warm() -> None:
    """All shares, at most so many seconds."""
    count = min(os.cpu_count() or 1, MOST_PROCESSES)
    command = [sys.executable, os.path.abspath(__file__)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [subprocess.Popen([*command, str(index), str(count)], env=variables) for index in range(count)]
    end = time.monotonic() + SECONDS
    for child in children:
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    share(int(sys.argv[1]), int(sys.argv[2]))
