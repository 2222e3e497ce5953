"""Everything that only a GPU can show, in one run: build, tests, sanitizers, benchmarks.

    python bench/gpu.py --out DIR [--only build,tests,sanitizer,bench,tucker2,...] [--families tucker2,...]

Names of families (of benchmarks, bench/test_FAMILY.py) confine every step to what is theirs: their gpu tests, their
sanitizer workload, their benchmarks. `--only tucker2` is all steps for that family.

Needs an NVIDIA GPU, torch and nvcc, and no network. Leaves in DIR: summary.json (machine, clocks as found, versions,
what ran, how long, what failed), a log a step, tests.xml, and a bench_FAMILY.jsonl each, which gets a line as every
benchmark ends. A run ends within ten minutes; what was measured until then is kept.
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
BUDGET_S = 560.0
STEPS = ("build", "tests", "sanitizer", "bench")
# What is kept back for a step while earlier ones run; what they leave of theirs goes to the later ones.
RESERVED_S = {"build": 150.0, "tests": 60.0, "sanitizer": 130.0, "bench": 220.0}
GRACE_S = 25.0  # between the moment when no benchmark begins any more and the one when the last is stopped
CPU_ONLY = ("decompose",)  # benchmarks of the host
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FAMILIES = sorted({path.stem[5:] for path in (ROOT / "bench").glob("test_*.py")} - set(CPU_ONLY))
# What the names of a family's tests hold besides its own.
TESTS = {
    "cp": ("cp", "depthwise"),
    "gates": ("gate",),
    "linalg": ("linalg", "spectral", "nonfinite", "resume"),
    "networks": ("fuse", "prepared"),
    "norton": ("cp", "depthwise"),
    "svd": ("channel", "svd"),
}


@dataclass
class Result:
    """The outcome of one step: passed, failed or skipped, with the reason for the last two."""

    step: str
    outcome: str
    seconds: float
    reason: str = ""


class Runner:
    """Runs commands with a deadline and keeps their logs, one a step, in the output folder."""

    def __init__(self, out: Path, families: Sequence[str], steps: Sequence[str]) -> None:
        self.out, self.families, self.steps = out, families, steps
        self.deadline = time.monotonic() + BUDGET_S

    def asked(self, family: str) -> bool:
        """Whether a family is wanted: all are where none was named."""
        return not self.families or family in self.families

    def left(self, step: str) -> float:
        """Seconds that a step may still take, so that those after it have what is reserved for them."""
        later = self.steps[self.steps.index(step) + 1 :]
        return self.deadline - time.monotonic() - sum(RESERVED_S[name] for name in later)

    def run(self, step: str, command: list[str], limit_s: float, **environment: str) -> tuple[bool, str]:
        """(whether it passed, why not)"""
        if limit_s <= 0:
            return False, f"no time was left of {BUDGET_S:.0f} s"
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
        log = self.out / f"{step}.log"
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {' '.join(command)}", file=file, flush=True)
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
            self.left("build"),
            FASTRANK_CUDA="1",
            TORCH_CUDA_ARCH_LIST=arch,
        )
        if ok:
            check = "from fastrank import _native as n; import sys; sys.exit(n.why_missing('_C_cuda') or 0)"
            ok, reason = self.run("build", [sys.executable, "-c", check], 60.0)
        return Result("build", "passed" if ok else "failed", 0.0, reason)

    def tests(self) -> Result:
        """The suite's gpu tests, or those of the families that were named."""
        if find_spec("pytest") is None or find_spec("hypothesis") is None:
            return Result("tests", "failed", 0.0, "pytest and hypothesis are needed")
        files = gpu_tests(self.families)
        if not files:
            return Result("tests", "skipped", 0.0, f"{', '.join(self.families)} has no tests that need a GPU")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, files)]
        ok, reason = self.run("tests", [*command, f"--junitxml={self.out / 'tests.xml'}"], self.left("tests"))
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
        found_here = (path.stem.removesuffix("_workload") for path in (ROOT / "bench").glob("*_workload.py"))
        families = [family for family in sorted(found_here) if self.asked(family)]
        if not families:
            return Result("sanitizer", "skipped", 0.0, f"{', '.join(self.families)} has no workload")
        failures, runs = [], list(itertools.product(families, TOOLS))
        for index, (family, tool) in enumerate(runs):
            workload = str(ROOT / "bench" / f"{family}_workload.py")
            command = [found, "--tool", tool, "--error-exitcode", "1", sys.executable, workload]
            share = self.left("sanitizer") / (len(runs) - index)
            ok, reason = self.run("sanitizer", command, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            failures += [] if ok else [f"{family}, {tool}: {reason}"]
        return Result("sanitizer", "failed" if failures else "passed", 0.0, "; ".join(failures))

    def bench(self) -> Result:
        """The families' benchmarks, each with an equal share of the time that is left."""
        if find_spec("pytest_benchmark") is None:
            return Result("bench", "skipped", 0.0, "pytest-benchmark is not installed")
        families, failures = [family for family in FAMILIES if self.asked(family)], []
        for index, family in enumerate(families):
            share = self.left("bench") / (len(families) - index)
            path = str(ROOT / "bench" / f"test_{family}.py")
            ok, reason = self.run(
                "bench",
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
                share,
                FASTRANK_BENCH_OUT=str(self.out / f"bench_{family}.jsonl"),
                FASTRANK_BENCH_SECONDS=str(max(0.0, share - GRACE_S)),
            )
            failures += [] if ok else [f"{family}: {reason}"]
        return Result("bench", "failed" if failures else "passed", 0.0, "; ".join(failures))


def gpu_tests(families: Sequence[str]) -> list[Path]:
    """The test files with gpu tests; only they, since the others may import what such a machine lacks."""
    words = [word for family in families for word in TESTS.get(family, (family,))]
    return sorted(
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8") and (not words or any(word in path.stem for word in words))
    )


def chosen(only: str, families: str) -> tuple[list[str], list[str]]:
    """(steps, families) that were asked for; all steps where none was. Raises ValueError for an unknown name."""
    names = [name for name in (*only.split(","), *families.split(",")) if name]
    unknown = sorted(set(names) - set(STEPS) - set(FAMILIES))
    if unknown:
        known = ", ".join((*STEPS, *FAMILIES))
        raise ValueError(f"--only and --families must name some of {known}, got {', '.join(unknown)}")
    steps = [step for step in STEPS if step in names] or list(STEPS)
    return steps, [family for family in FAMILIES if family in names]


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
    parser.add_argument("--only", default="", help=f"steps and families: {','.join((*STEPS, *FAMILIES))}")
    parser.add_argument("--families", default="", help="more families")
    options = parser.parse_args()
    try:
        steps, families = chosen(options.only, options.families)
    except ValueError as error:
        parser.error(str(error))
    if reason := why_not_here(steps):
        print(f"the GPU run cannot start here: {reason}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    sys.path.insert(0, str(ROOT))
    from fastrank.benchmarks import timing

    for stale in (*(out / f"{step}.log" for step in STEPS), *(out / f"bench_{family}.jsonl" for family in FAMILIES)):
        stale.unlink(missing_ok=True)
    runner, results = Runner(out, families, steps), []

    def keep() -> None:
        write(out / "summary.json", {"environment": timing.environment(), "steps": [asdict(r) for r in results]})

    keep()
    for step in steps:
        begin = time.monotonic()
        result: Result = getattr(runner, step)()
        result.seconds = round(time.monotonic() - begin, 1)
        results.append(result)
        print(
            f"{step}: {result.outcome} in {result.seconds} s{': ' + result.reason if result.reason else ''}", flush=True
        )
        keep()
        if step == "build" and result.outcome == "failed":
            break
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
