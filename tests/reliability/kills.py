"""Kill training runs at random moments, half of them while they save, and compare what they come to in the end.

    python tests/reliability/kills.py [--kills 60] [--seed 0] [--only trp ddp] [--keep]

Forked processes train every published system (NRMF; TRP with projections, sub-gradients and warm state; Funnel with
closing gates; NORTON's fine-tuning), `fastrank train` carries out a recipe, and two ranks train together. Each is
killed with SIGKILL: after a random time, when a temporary file is seen, or by itself in the middle of saving. After
every kill the newest checkpoint has to be whole and no older than the one before; what goes on from it has to end with
the bits of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import outcome
import process_groups
import runs
import torch
import yaml
from checkpoint_files import equal, same, step_of

from fastrank import _files, cli

MODES = ("time", "point", "seen", "point")
"""How a run is killed, in turn: two of four fall into saving, and one when its file is seen."""
EPOCHS = 8
RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5_nrmf"},
    "data": {"name": "digits", "held_out": 0.9},
    "train": {"epochs": 4, "batch_size": 64, "lr": 0.01, "checkpoint_steps": 1},
    "regularize": {"method": "nrmf", "alpha": 0.01},
    "compress": {"method": "nrmf", "energy": 0.5},
    "finetune": {"epochs": 2, "batch_size": 64, "lr": 0.01, "checkpoint_steps": 1},
}
LONGEST = 300.0
"""Seconds after which a run hangs."""
NEW_INTERPRETER = 3
"""Of so many runs of a recipe that are not killed at a point, one is started as a user would."""
POINTS = 40
"""A run that kills itself does so at one of its first so many points of saving: within some eight checkpoints."""


@dataclass
class Tally:
    """What became of the kills of one scenario. bad: what went wrong, in words."""

    name: str
    kills: int = 0
    saving: int = 0
    whole: int = 0
    runs: int = 0
    exact: int = 0
    bad: list[str] = field(default_factory=list)


class Forked:
    """A process that does `work`, and kills itself at a point of saving where that is not 0."""

    def __init__(self, work: Callable[[], None], point: int) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            ended = 1
            try:
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                with runs.points(runs.At(point, kill_oneself)):
                    work()
                ended = 0
            except process_groups.FAILURES:
                traceback.print_exc()
            finally:
                os._exit(ended)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Rank:
    """One rank of several: a process that a server forked."""

    def __init__(self, process: Any, note: Path) -> None:
        self.process, self.note = process, note

    def poll(self) -> int | None:
        """As `Forked.poll`; a rank always leaves with 0, and says in a note what went wrong."""
        if self.process.exitcode != 0:
            return self.process.exitcode  # type: ignore[no-any-return]
        return 0 if self.note.read_text() == "passed" else 1

    def kill(self) -> None:
        self.process.kill()


class Scenario:
    """A run to kill: one of a system, in a process of its own."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root, self.number = name, root, 0
        self.whole = root / f"{name}-whole"

    def work(self, folder: Path) -> None:
        """The whole run, or what is left of it."""
        runs.train(self.name, folder, epochs=EPOCHS)

    def begin(self, folder: Path, point: int) -> list[Any]:
        """Start it: a process each rank, with `poll` and `kill`; one of them kills itself at the point, if not 0."""
        self.number += 1
        return [Forked(lambda: self.work(folder), point)]

    def checkpoints(self, folder: Path) -> list[Path]:
        """The folders of checkpoints, in the order in which they are written."""
        return [folder]

    def progress(self, folder: Path) -> int:
        """Steps of all newest checkpoints, each read and checked."""
        return sum(step_of(inside) for inside in self.checkpoints(folder))

    def exact(self, folder: Path) -> bool:
        """Whether a run came to the bits of the one that nobody killed, and left nothing besides."""
        pairs = zip(self.checkpoints(folder), self.checkpoints(self.whole), strict=True)
        return all(same(one, other) for one, other in pairs) and not leftovers(folder)


class Recipe(Scenario):
    """`fastrank train` of a recipe: two trainings, a compression between them. Now and then by a new interpreter."""

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(name, root)
        self.file = root / "recipe.yaml"
        self.file.write_text(yaml.safe_dump(RECIPE))

    def work(self, folder: Path) -> None:
        sys.argv = ["fastrank", "train", str(self.file), "--out", str(folder)]
        try:
            cli.main()
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"fastrank train ended with exit code {done.code}") from done

    def begin(self, folder: Path, point: int) -> list[Any]:
        if point or self.number % NEW_INTERPRETER:
            return super().begin(folder, point)
        self.number += 1
        command = [sys.executable, "-m", "fastrank", "train", str(self.file), "--out", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        before = self.progress(folder)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Its imports take as long as its training: time counts from its first checkpoint on.
        until(lambda: self.progress(folder) > before or process.poll() is not None)
        return [process]

    def checkpoints(self, folder: Path) -> list[Path]:
        return [folder / "train", folder / "finetune"]

    def exact(self, folder: Path) -> bool:
        one, other = (_files.load_tensors(place / "model.safetensors")[0] for place in (folder, self.whole))
        texts = [(folder / name, self.whole / name) for name in ("plan.json", "summary.json")]
        return super().exact(folder) and equal(one, other) and all(a.read_bytes() == b.read_bytes() for a, b in texts)


class Ranks(Scenario):
    """Two ranks that train together, with checkpoints of a file a rank: sharded ("fsdp") or not ("ddp")."""

    def begin(self, folder: Path, point: int) -> list[Any]:
        self.number += 1
        job = self.root / f"{self.name}-job{self.number}"
        job.mkdir()
        told = {"kind": self.name, "folder": str(folder), "point": point, "rank": self.number % 2}
        (job / "told.json").write_text(json.dumps(told))
        found = [
            Rank(process, job / f"ended.{rank}") for rank, process in enumerate(process_groups.start(rank_job, 2, job))
        ]
        # Two processes take long to find each other: time counts from there on.
        until(lambda: (job / "ready").exists() or found[0].poll() is not None)
        return found


def rank_job(rank: int, world: int, folder: Path) -> None:
    """What each of the ranks does."""
    told = json.loads((folder / "told.json").read_text())
    if rank == 0:
        (folder / "ready").touch()
    with runs.points(runs.At(told["point"] if rank == told["rank"] else 0, kill_oneself)):
        runs.train("trp", Path(told["folder"]), epochs=EPOCHS, parallel=told["kind"])


KINDS: dict[str, type[Scenario]] = {
    **dict.fromkeys(runs.SYSTEMS, Scenario),
    "recipe": Recipe,
    "ddp": Ranks,
    "fsdp": Ranks,
}


def kill_oneself() -> None:
    """SIGKILL leaves a process no time for anything."""
    os.kill(os.getpid(), signal.SIGKILL)


def until(what: Callable[[], bool], pause: float = 0.01) -> None:
    """Wait for something that has to come; RuntimeError where it does not."""
    deadline = time.monotonic() + LONGEST
    while not what():
        if time.monotonic() > deadline:
            raise RuntimeError(f"a run hangs: nothing happened for {LONGEST:g} s")
        time.sleep(pause)


def leftovers(folder: Path) -> list[Path]:
    """What killed writers left: temporary files, and folders of shards that nothing names."""
    found, named = [], set()
    for place, folders, files in os.walk(folder):  # what vanishes meanwhile is passed over
        found += [Path(place, name) for name in folders if name.startswith("checkpoint-")]
        found += [Path(place, name) for name in files if name.startswith(".") and name.endswith(".tmp")]
        if "checkpoint.json" in files:
            with suppress(FileNotFoundError):
                named.add(json.loads(Path(place, "checkpoint.json").read_bytes())["folder"])
    return [path for path in found if path.name not in named]


def end(processes: Sequence[Any]) -> list[int]:
    """Wait for the end of all of them; once one has failed, the others are killed. Their exit codes."""
    until(lambda: all(p.poll() is not None for p in processes) or any(p.poll() for p in processes))
    for process in processes:
        process.kill()
    until(lambda: all(p.poll() is not None for p in processes))
    return [process.poll() for process in processes]


def attempt(scenario: Scenario, folder: Path, mode: str, numbers: random.Random, seconds: float) -> list[int]:
    """Start the run, or go on with it, and kill it in the given way; the exit codes: 0 where it ended before that."""
    processes = scenario.begin(folder, numbers.randint(1, POINTS) if mode == "point" else 0)
    started, wanted = time.monotonic(), numbers.uniform(0, seconds)
    seen: set[Path] = set()
    count = numbers.randint(1, POINTS // 5)

    def due() -> bool:
        if any(process.poll() is not None for process in processes):
            return True
        if mode == "seen":
            seen.update(leftovers(folder))
            return len(seen) >= count
        return mode == "time" and time.monotonic() - started > wanted

    until(due, 0.0005)
    if mode == "seen":
        time.sleep(numbers.uniform(0, 0.003))
    if mode != "point" and all(process.poll() is None for process in processes):
        numbers.choice(processes).kill()
    return end(processes)


def campaign(name: str, kills: int, root: Path, seed: int = 0) -> Tally:
    """Kill runs of one scenario `kills` times and have each of them end; what became of it."""
    scenario, tally, numbers = KINDS[name](name, root), Tally(name), random.Random(f"{seed} {name}")
    started = time.monotonic()
    if any(codes := end(scenario.begin(scenario.whole, 0))):
        tally.bad.append(f"the run that nobody kills ended with {codes}")
        return tally
    seconds = (time.monotonic() - started) / 4
    while tally.kills < kills or tally.exact < tally.runs:
        folder, reached = root / f"{name}-{tally.runs}", 0
        tally.runs += 1
        while True:
            killing = tally.kills < kills
            mode = MODES[tally.kills % len(MODES)]
            codes = attempt(scenario, folder, mode, numbers, seconds) if killing else end(scenario.begin(folder, 0))
            if not any(codes):
                break
            if -signal.SIGKILL not in codes or not killing:
                tally.bad.append(f"{folder.name} after {tally.kills} kills ended with {codes}")
                return tally
            tally.kills += 1
            tally.saving += mode == "point" or bool(leftovers(folder))
            try:
                before, reached = reached, scenario.progress(folder)
            except (ValueError, OSError, KeyError) as error:
                tally.bad.append(f"{folder.name} after {tally.kills} kills, the last by {mode}: {error}")
                return tally
            if reached < before:
                tally.bad.append(f"{folder.name} went back from step {before} to {reached}")
            tally.whole += 1
        if not scenario.exact(folder):
            tally.bad.append(f"{folder.name} differs from the run that nobody killed, or left {leftovers(folder)}")
            return tally
        tally.exact += 1
        shutil.rmtree(folder)
    return tally


def main() -> int:
    """The campaign of every scenario; exit code 0 where nothing went wrong."""
    parser = outcome.parser(__doc__)
    parser.add_argument("--kills", type=int, default=60, help="kills in all (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="scenarios (all)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other, and bits depend on the number
    tallies = []
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(options.only):
            share = options.kills // len(options.only) + (number < options.kills % len(options.only))
            tallies.append(campaign(name, share, Path(root), options.seed))
            print(json.dumps(asdict(tallies[-1])), flush=True)
    kills, whole, saving, exact, count = (
        sum(getattr(tally, name) for tally in tallies) for name in ("kills", "whole", "saving", "exact", "runs")
    )
    ok = not any(tally.bad for tally in tallies) and kills == whole == options.kills and exact == count
    line = f"{kills} kills, {saving} of them while saving: {whole} whole checkpoints, {exact} of {count} runs bit-exact"
    figures = {"seed": options.seed, "scenarios": [asdict(tally) for tally in tallies]}
    return outcome.finish("faults", line, figures, ok=ok, keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
