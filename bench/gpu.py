"""Everything that only a GPU can show, in one run: build, tests, sanitizers, benchmarks.

    python bench/gpu.py --out DIR [--only build,tests,sanitizer,bench] [--families gates,linalg,polar,tucker2]

Needs an NVIDIA GPU, torch and nvcc, and no network. Leaves in DIR: summary.json (what ran, how long, what failed),
environment.json (machine, clocks as found, versions), a log a step, tests.xml and a bench_FAMILY.json each.
Exit code 0 when every step passed, 1 when one failed, 2 when this machine cannot run it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 530.0
STEPS = ("build", "tests", "sanitizer", "bench")
# Most seconds a step may take; what an earlier step leaves is not passed on, so that the total stays in the budget.
LIMITS_S = {"build": 170.0, "tests": 150.0, "sanitizer": 110.0, "bench": 220.0}
CPU_ONLY = ("decompose",)  # benchmarks of the host
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Result:
    """The outcome of one step: passed, failed or skipped, with the reason for the last two."""

    step: str
    outcome: str
    seconds: float
    reason: str = ""


class Runner:
    """Runs commands with a deadline and keeps their logs in the output folder."""

    def __init__(self, out: Path, families: Sequence[str] = ()) -> None:
        self.out, self.families = out, families
        self.deadline = time.monotonic() + BUDGET_S

    def asked(self, family: str) -> bool:
        """Whether benchmarks and sanitizer runs of a family are wanted: all where none was named."""
        return not self.families or family in self.families

    def run(self, name: str, command: list[str], limit_s: float, **environment: str) -> tuple[bool, str]:
        """(whether it passed, why not)"""
        limit_s = min(limit_s, self.deadline - time.monotonic())
        if limit_s <= 0:
            return False, f"no time was left of {BUDGET_S:.0f} s"
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
        log = self.out / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            try:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=variables,
                    timeout=limit_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return False, f"it took more than {limit_s:.0f} s; see {log.name}"
        return done.returncode == 0, f"exit code {done.returncode}; see {log.name}" if done.returncode else ""

    def build(self) -> Result:
        """In place, for this GPU's architecture alone."""
        import torch

        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}.{minor}" + ("a" if major >= 9 else "")
        ok, reason = self.run(
            "build",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            LIMITS_S["build"],
            FASTRANK_CUDA="1",
            TORCH_CUDA_ARCH_LIST=arch,
        )
        if ok:
            check = "from fastrank import _native as n; import sys; sys.exit(n.why_missing('_C_cuda') or 0)"
            ok, reason = self.run("load", [sys.executable, "-c", check], 60.0)
        return Result("build", "passed" if ok else "failed", 0.0, reason)

    def tests(self) -> Result:
        """The suite's gpu tests."""
        if find_spec("pytest") is None or find_spec("hypothesis") is None:
            return Result("tests", "failed", 0.0, "pytest and hypothesis are needed")
        # Only the files that have some: the others may import what such a machine lacks.
        files = sorted(
            str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8")
        )
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
        ok, reason = self.run("tests", [*command, f"--junitxml={self.out / 'tests.xml'}"], LIMITS_S["tests"])
        return Result("tests", "passed" if ok else "failed", 0.0, reason)

    def sanitizer(self) -> Result:
        """compute-sanitizer's four tools over a small workload; without torch's allocator, so that overruns show."""
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        found = shutil.which("compute-sanitizer") or next(
            (
                str(p)
                for p in (home / "bin/compute-sanitizer", home / "compute-sanitizer/compute-sanitizer")
                if p.exists()
            ),
            "",
        )
        if not found:
            return Result("sanitizer", "skipped", 0.0, "compute-sanitizer was not found on PATH or in CUDA_HOME")
        end = time.monotonic() + LIMITS_S["sanitizer"]
        failures = []
        for workload, tool in itertools.product(sorted((ROOT / "bench").glob("*_workload.py")), TOOLS):
            family = workload.stem.removesuffix("_workload")
            if not self.asked(family):
                continue
            command = [found, "--tool", tool, "--error-exitcode", "1", sys.executable, str(workload)]
            ok, reason = self.run(
                f"sanitizer_{family}_{tool}", command, end - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
            failures += [] if ok else [f"{family}, {tool}: {reason}"]
        return Result("sanitizer", "failed" if failures else "passed", 0.0, "; ".join(failures))

    def bench(self) -> Result:
        """Every family's benchmarks, as pytest-benchmark's JSON with graph timings in extra_info."""
        if find_spec("pytest_benchmark") is None:
            return Result("bench", "skipped", 0.0, "pytest-benchmark is not installed")
        end = time.monotonic() + LIMITS_S["bench"]
        failures = []
        for path in sorted((ROOT / "bench").glob("test_*.py")):
            family = path.stem.removeprefix("test_")
            if family in CPU_ONLY or not self.asked(family):
                continue
            options = [
                "-q",
                "-p",
                "no:cacheprovider",
                str(path),
                f"--benchmark-json={self.out / f'bench_{family}.json'}",
            ]
            ok, reason = self.run(f"bench_{family}", [sys.executable, "-m", "pytest", *options], end - time.monotonic())
            failures += [] if ok else [f"{family}: {reason}"]
        return Result("bench", "failed" if failures else "passed", 0.0, "; ".join(failures))


def why_not_here(steps: list[str]) -> str:
    """Empty where this machine can run the steps, else one sentence."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    if "build" in steps and not Path(nvcc).exists():
        return "no nvcc was found on PATH or in CUDA_HOME"
    return ""


def write(path: Path, data: object) -> None:
    """Whole or not at all: a run may be stopped at any moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--families", default="", help="only their benchmarks and sanitizer runs: gates,linalg,...")
    options = parser.parse_args()
    steps = [step for step in STEPS if step in (options.only or ",".join(STEPS)).split(",")]
    unknown = set((options.only or STEPS[0]).split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--only must name steps of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if reason := why_not_here(steps):
        print(f"the GPU run cannot start here: {reason}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    sys.path.insert(0, str(Path(__file__).parent))
    import timing

    write(out / "environment.json", timing.environment())
    runner, results = Runner(out, [name for name in options.families.split(",") if name]), []
    for step in steps:
        begin = time.monotonic()
        result: Result = getattr(runner, step)()
        result.seconds = round(time.monotonic() - begin, 1)
        results.append(result)
        print(
            f"{step}: {result.outcome} in {result.seconds} s{': ' + result.reason if result.reason else ''}", flush=True
        )
        write(out / "summary.json", {"environment": timing.environment(), "steps": [asdict(r) for r in results]})
        if step == "build" and result.outcome == "failed":
            break
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
