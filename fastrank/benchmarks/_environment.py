"""What a figure depends on: the machine, its clocks as found, versions of everything that is compared, the commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastrank import _tables
from fastrank._version import __version__
from fastrank.env import version

PEERS = {"tltorch": "tensorly-torch", "tensorly": "tensorly", "torchao": "torchao", "torchvision": "torchvision"}
_CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


@cache
def environment() -> dict[str, Any]:
    """The machine, the clocks as first found, and the versions that a figure depends on; JSON-able."""
    cudnn: Any = torch.backends.cudnn
    found: dict[str, Any] = {
        "fastrank": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if torch.cuda.is_available() else None,
        "triton": version("triton"),
        "peers": {name: version(package) for name, package in PEERS.items()},
        "cpu": _tables.cpu_name(),
        "cpu_mhz": _cpu_mhz(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": cudnn.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["l2_bytes"] = properties.L2_cache_size
        found["multiprocessors"] = properties.multi_processor_count
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found["nvidia_smi"] = dict(zip(_CLOCKS.split(","), shown.split(", "), strict=False))
    return found


def _cpu_mhz() -> dict[str, float | None]:
    """The clock of the first core as found and at most, in MHz, as far as Linux tells them."""
    now = None
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        now = next((float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")), None)
    most = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return {"now": now, "max": float(most.read_text(encoding="utf-8")) / 1e3 if most.is_file() else None}


def _commit() -> str | None:
    """The commit that is checked out, where the package lies in a checkout and git is there."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() or None
