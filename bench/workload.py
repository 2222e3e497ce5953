"""The command line that the workloads for compute-sanitizer share."""

from __future__ import annotations

import argparse
import os
import sys

import torch


def device(doc: str | None, kernels: str) -> str:
    """`--device` as given; "cpu" turns Triton's interpreter on. Exits with a sentence where `kernels` cannot run.

    Called before anything imports triton, which reads its settings when a kernel is defined.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen: str = parser.parse_args().device
    if chosen == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit(f"the {kernels} cannot run: torch sees no NVIDIA GPU")
    from fastrank import _backends

    require(_backends.why_no_triton(), kernels)
    return chosen


def require(missing: str | None, kernels: str) -> None:
    """Exit with the reason where something that `kernels` need is missing."""
    if missing:
        sys.exit(f"the {kernels} cannot run: {missing}")
