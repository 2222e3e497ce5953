"""Puts every bug of seeded_bugs.yaml into a copy of the tree, and counts those that the tests let live.

    python tests/reliability/mutants.py [--only TEXT] [--jobs N] [--suite-passed] [--keep]

First the tests named by the list have to pass in a copy without a bug (not asked again with --suite-passed). A bug is
killed when one of its tests fails, or runs for more than LIMIT_S; those marked slow are asked last. Bugs of csrc/ are
compiled into the module that runs kernels on the host. Nothing of the tree that this file lies in is written to, but
for the result, and outcomes of a run that is stopped: the next one of the very same files goes on from there. Exit code
1 where fewer than 95 % are killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import outcome
from outcome import ROOT

LIST = Path(__file__).with_name("seeded_bugs.yaml")
WANTED = 0.95
LIMIT_S = 900.0
NO_TESTS = 5  # pytest's exit code where it finds none
RUNNING: set[int] = set()
"""Process groups at work, for an interrupted run to take along."""


@dataclass(frozen=True)
class Bug:
    """old, which stands once in file (from the root), becomes new; one of tests (files or folders) has to fail."""

    name: str
    file: str
    tests: str
    old: str
    new: str

    @property
    def compiled(self) -> bool:
        """Whether a module has to be built before the bug is in."""
        return self.file.startswith("csrc/")


def seeded() -> list[Bug]:
    """The list."""
    return [Bug(**entry) for entry in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


class Copy:
    """A copy of the tree, as Python imports it when `run` starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "fastrank").glob("*.so")]
        for name in (*filter(None, listed.split("\0")), *compiled, "fastrank/_build_info.json"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "fastrank" / "triton_kernels").symlink_to("../triton_kernels")  # where an installation has them

    def digest(self) -> str:
        """Of all files that a bug's tests may read, with their names."""
        found = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder)
            if name.suffix not in (".md", ".pyc") and name.parts[:2] != ("bench", "results"):
                found.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return found.hexdigest()[:16]

    def run(self, command: list[str], limit_s: float = LIMIT_S, **more: str) -> tuple[int | None, str]:
        """Exit code (None: out of time) and the end of what was printed."""
        variables = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", **more}
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            RUNNING.add(process.pid)
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            finally:
                RUNNING.discard(process.pid)
            log.seek(0)
            return code, log.read()[-3000:]

    def pytest(self, tests: Iterable[str]) -> tuple[int | None, str]:
        """The tests, up to the first that fails, the slow ones last."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        first, last = self.run([*command, "-m", "not slow"]), None
        if first[0] in (0, NO_TESTS):
            last = self.run([*command, "-m", "slow"])
        return first if last is None or (first[0] == 0 and last[0] == NO_TESTS) else last

    def build(self) -> tuple[int | None, str]:
        """The module that runs the kernels on the host."""
        return self.run([sys.executable, "setup.py", "build_ext", "--inplace"], FASTRANK_CUDA="0")


def attempt(bug: Bug, copy: Copy) -> dict[str, Any]:
    """Put the bug in, run its tests, take it out again: {"outcome": "killed" | "survived" | "broken", ...}."""
    path, begin = copy.folder / bug.file, time.monotonic()
    right = path.read_text(encoding="utf-8")
    native = {each: each.read_bytes() for each in (copy.folder / "fastrank").glob("*.so")} if bug.compiled else {}
    found: dict[str, Any] = {"outcome": "killed"}
    try:
        path.write_text(right.replace(bug.old, bug.new), encoding="utf-8")
        built, text = copy.build() if bug.compiled else (0, "")
        if built != 0:
            return {"outcome": "broken", "why": f"it does not compile: {text[-300:]}"}
        code, text = copy.pytest(bug.tests.split())
        if code == 0:
            found = {"outcome": "survived"}
        elif code in (None, 1, 2):  # 2: an import failed, or the run was interrupted by a crash of the collection
            found["by"] = "time" if code is None else next((x for x in text.splitlines() if x.startswith("FAILED")), "")
        elif code < 0:
            found["by"] = f"signal {-code}"
        else:
            found = {"outcome": "broken", "why": text[-300:]}
    finally:
        path.write_text(right, encoding="utf-8")
        for each, data in native.items():
            each.write_bytes(data)
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def attempt_all(bugs: list[Bug], jobs: int, scratch: Path) -> dict[str, dict[str, Any]]:
    """The outcome of every bug, by its name, from `jobs` copies at work side by side; those that are known stay."""
    copies = [Copy(scratch / str(number)) for number in range(jobs)]
    notes = outcome.SCRATCH / f"mutants-{copies[0].digest()}.json"
    known: dict[str, dict[str, Any]] = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    found = {bug.name: known[bug.name] for bug in bugs if bug.name in known}
    if found:
        print(f"{len(found)} outcomes are those of a run that was stopped, in {notes}", flush=True)
    waiting: queue.SimpleQueue[Bug] = queue.SimpleQueue()
    for bug in sorted(bugs, key=lambda each: not each.compiled):  # the long ones first
        if bug.name not in found:
            waiting.put(bug)
    one = threading.Lock()

    def work(copy: Copy) -> None:
        while True:
            try:
                bug = waiting.get_nowait()
            except queue.Empty:
                return
            result = attempt(bug, copy)
            with one:
                found[bug.name] = result
                notes.parent.mkdir(parents=True, exist_ok=True)
                notes.write_text(json.dumps(known | found), encoding="utf-8")
            print(f"{result['outcome']:9}{bug.name} ({bug.file})", flush=True)

    workers = [threading.Thread(target=work, args=(copy,)) for copy in copies]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if (known | found).keys() >= {bug.name for bug in seeded()}:
        notes.unlink(missing_ok=True)  # nothing is left to go on with
    return found


def stop(number: int, _: object) -> None:
    """A run that is stopped leaves no tests behind."""
    for group in list(RUNNING):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    parser = outcome.parser(__doc__)
    parser.add_argument("--only", default="", help="bugs whose name or file holds this text")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2 * 2), help="copies side by side")
    parser.add_argument("--suite-passed", action="store_true", help="the suite has just passed on this very tree")
    options = parser.parse_args()
    bugs = [bug for bug in seeded() if options.only in bug.name or options.only in bug.file]
    with tempfile.TemporaryDirectory() as scratch:
        if not options.suite_passed:
            tests = sorted({test for bug in bugs for test in bug.tests.split()})
            print(f"{len(bugs)} bugs; first their tests without any: {' '.join(tests)}", flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(options.jobs), *tests]
            code, text = Copy(Path(scratch) / "whole").run(command, 3600.0)
            if code != 0:
                print(text)
                return outcome.finish("mutants", "the tests fail without any bug", {}, ok=False, keep=options.keep)
        found = attempt_all(bugs, options.jobs, Path(scratch))
    killed = sum(each["outcome"] == "killed" for each in found.values())
    alive = [bug.name for bug in bugs if found[bug.name]["outcome"] != "killed"]
    line = f"{killed} of {len(bugs)} seeded bugs killed ({100 * killed / max(len(bugs), 1):.0f} %)"
    line += f"; alive: {', '.join(alive)}" if alive else ""
    rows = [{**asdict(bug), **found[bug.name]} for bug in bugs]
    ok = bool(bugs) and killed >= WANTED * len(bugs)
    figures = {"bugs": len(bugs), "killed": killed, "rows": rows}
    return outcome.finish("mutants", line, figures, ok=ok, keep=options.keep and not options.only)


if __name__ == "__main__":
    sys.exit(main())
