"""Random lives of random networks, and random files for everything that reads one: `make fuzz`.

    python tests/reliability/fuzz.py [--examples 5000] [--minutes 10] [--seed 0] [--keep]

Two processes run the state machine of `lifecycle.py`, each with a seed of its own, then atheris works on all readers of
`parser_targets.py` for so many minutes, two at a time. A failure is printed with what reproduces it; inputs that made a
reader fail lie in runs/reliability/crashes and, once fixed, belong into corpus/TARGET.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import outcome
from parser_targets import TARGETS
from parsers import COUNTED

HERE = Path(__file__).parent
CRASHES = outcome.SCRATCH / "crashes"
PROCESSES = 2
STEPS = 6
"""Rules of one example at most."""


def lives(examples: int, seed: int) -> int:
    """Run the state machine in this process; what was counted is the last line, as JSON."""
    import torch
    from hypothesis import HealthCheck, settings
    from hypothesis import seed as seeded
    from hypothesis.database import DirectoryBasedExampleDatabase
    from hypothesis.stateful import run_state_machine_as_test
    from lifecycle import Lifecycle

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Lifecycle.counts.clear()
    seeded(seed)(Lifecycle)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        database=DirectoryBasedExampleDatabase(outcome.SCRATCH / "examples"),
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(Lifecycle, settings=chosen)
    finally:
        print(json.dumps({"seed": seed, **dict(sorted(Lifecycle.counts.items()))}), flush=True)
    return 0


def run(limit: float | None, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a Python process with one thread, which is ended after `limit` seconds."""
    command = [sys.executable, *arguments]
    # Files in memory, and gone at the end: libFuzzer leaves no process the time to clear up.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": folder}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            return 1, f"{os.fsdecode(error.stdout or b'')[-4000:]}\nnot at its end after {limit:.0f} s"
    return done.returncode, done.stdout + done.stderr


def one_machine(examples: int, seed: int) -> dict[str, Any]:
    """A process of the state machine: what it counted, and what it said where it failed."""
    code, said = run(None, str(HERE / "fuzz.py"), "--lives", str(examples), "--seed", str(seed))
    counts = re.findall(r'^\{"seed": .*\}$', said, re.M)
    found = json.loads(counts[-1]) if counts else {"seed": seed}
    return found if code == 0 else {**found, "failure": said[-6000:]}


def one_parser(target: str, seconds: int, seed: int) -> dict[str, Any]:
    """A process of one reader: how many files it read, and what it said where it failed."""
    began = time.monotonic()
    arguments = [target, "--seconds", str(seconds), "--seed", str(seed), "--crashes", str(CRASHES)]
    code, said = run(4 * seconds + 600, str(HERE / "fuzz_parser.py"), *arguments)
    counted = re.search(rf"number_of_executed_units:\s+(\d+)|{COUNTED}(\d+)", said)
    found: dict[str, Any] = {"seed": seed, "seconds": round(time.monotonic() - began)}
    found["files"] = int(next(filter(None, counted.groups()))) if counted else 0
    return found if code == 0 and counted else {**found, "failure": said[-6000:]}


def main() -> int:
    """Both parts; the exit code says whether anything failed."""
    asked = outcome.parser(__doc__)
    asked.add_argument("--examples", type=int, default=5000, help="lives of networks, over both processes")
    asked.add_argument("--minutes", type=float, default=10.0, help="of all readers together")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--lives", type=int, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.lives is not None:
        return lives(given.lives, given.seed)
    seeds = [given.seed + number for number in range(PROCESSES)]
    seconds = max(1, round(given.minutes * 60 * PROCESSES / len(TARGETS)))
    with ThreadPoolExecutor(PROCESSES) as pool:
        machines = list(pool.map(lambda seed: one_machine(-(-given.examples // PROCESSES), seed), seeds))
        began = time.monotonic()
        found = list(pool.map(lambda name: one_parser(name, seconds, given.seed + 1), TARGETS))
        wall = time.monotonic() - began
    readers = dict(zip(TARGETS, found, strict=True))
    for name, result in [*((f"lives, seed {m['seed']}", m) for m in machines), *readers.items()]:
        if "failure" in result:
            print(f"--- {name}\n{result['failure']}\n")
    examples = sum(machine.get("examples", 0) for machine in machines)
    files = sum(reader["files"] for reader in found)
    failures = sum("failure" in result for result in (*machines, *found))
    how = "" if importlib.util.find_spec("atheris") else ", blindly: atheris is not installed"
    line = f"{examples:,} lives of networks, {files:,} files for {len(TARGETS)} readers in {wall / 60:.0f} minutes{how}"
    figures = {"examples": examples, "files": files, "failures": failures, "lives": machines, "readers": readers}
    enough = failures == 0 and examples >= given.examples
    return outcome.finish("fuzz", f"{line}, {failures} failures", figures, ok=enough, keep=given.keep)


if __name__ == "__main__":
    sys.exit(main())
