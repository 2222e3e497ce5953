"""Modules of bench/, which is no package, for the tests of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> Any:
    """bench/NAME.py under the name bench_NAME. Not while tests are collected: some have basenames of bench's files."""
    if f"bench_{name}" not in sys.modules:
        path, before = BENCH / f"{name}.py", list(sys.path)
        spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[f"bench_{name}"] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(BENCH))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = before
    return sys.modules[f"bench_{name}"]


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that rows use."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, call: Any, rounds: int) -> None:
        call()
        self.rounds = rounds
