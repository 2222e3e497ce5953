"""Coverage-guided fuzzing, by atheris, of one reader of files: python fuzz_parser.py TARGET --seconds N

What counts as a crash is said in `parsers.attempt`; the input is then written to --crashes, and the exit code is 1.
Where atheris is not installed (it has wheels for Python 3.11 to 3.13), the same inputs are changed without looking at
what they reach.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("plan", "convert", "io", "hub", "_files", "recipe", "models.rates", "train._checkpoint", "_tables", "data")
"""What is looked into, of fastrank; PyYAML too."""

try:
    import atheris
except ImportError:
    atheris = None


def instrumented() -> Any:
    """The context in which the readers are to be imported."""
    if atheris is None:
        return nullcontext()
    found = importlib.util.find_spec("fastrank")
    assert found is not None
    assert found.origin is not None
    home = Path(found.origin).parent
    names = [".".join(path.relative_to(home).with_suffix("").parts) for path in home.rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in names]
    chosen = tuple(f"{name}." for name in MODULES)
    rest = [f"fastrank.{name}" for name in names if not f"{name}.".startswith(chosen)]
    return atheris.instrument_imports(
        include=["fastrank", "yaml"], exclude=[*rest, "fastrank"], enable_loader_override=False
    )


with instrumented():
    import guards
    import mutations
    import parsers
    from parser_targets import TARGETS, scratch


def main() -> int:
    """Fuzz one target; libFuzzer ends the process itself."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("target", choices=TARGETS)
    asked.add_argument("--seconds", type=int, default=60)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--crashes", type=Path, default=Path("runs/reliability/crashes"))
    given = asked.parse_args()
    target, folder = TARGETS[given.target], scratch() / "target"
    folder.mkdir()
    given.crashes.mkdir(parents=True, exist_ok=True)
    parsers.warm(target, folder)
    seeds = [*target.seeds(), *parsers.corpus(given.target)]
    runs = 0

    def one(payload: bytes) -> None:
        nonlocal runs
        runs += 1
        parsers.attempt(target, payload, folder)

    with guards.little_memory():
        for payload in seeds:
            one(payload)
        if atheris is None:
            return without(one, seeds, given)
        guided(atheris, one, seeds, given)
    return 0


def guided(library: ModuleType, one: Any, seeds: list[bytes], given: argparse.Namespace) -> None:
    """libFuzzer chooses the inputs by what they reach; it prints how many it ran, and ends the process."""
    start = scratch() / "seeds"
    start.mkdir()
    for number, payload in enumerate(seeds):
        (start / str(number)).write_bytes(payload)

    def change(payload: bytes, longest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        changed: bytes = library.Mutate(payload, longest) if draw.random() < 0.3 else mutations.mutate(payload, draw)
        return changed[:longest]

    options = [f"-max_total_time={given.seconds}", f"-seed={given.seed}", f"-timeout={int(2 * guards.SECONDS)}"]
    options += [f"-artifact_prefix={given.crashes}/{given.target}-", "-max_len=20000", "-rss_limit_mb=6000"]
    library.Setup([sys.argv[0], *options, "-print_final_stats=1", str(start)], one, custom_mutator=change)
    library.Fuzz()


def without(one: Any, seeds: list[bytes], given: argparse.Namespace) -> int:
    """The same changes drawn blindly, for as long."""
    draw, end, runs = random.Random(given.seed), time.monotonic() + given.seconds, 0
    while time.monotonic() < end:
        payload = mutations.mutate(draw.choice(seeds), draw)[:20000]
        runs += 1
        try:
            one(payload)
        except BaseException:  # noqa: BLE001  (whatever it is, a reader may not raise it)
            (given.crashes / f"{given.target}-crash-{given.seed}-{runs}").write_bytes(payload)
            traceback.print_exc()
            return 1
    print(f"{parsers.COUNTED}{runs}, without atheris, which is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
