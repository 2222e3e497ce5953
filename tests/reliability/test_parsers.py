"""Every reader of files from elsewhere under changed bytes, a little of what `fuzz.py` does at length."""

from __future__ import annotations

import random
import time
from pathlib import Path

import guards
import mutations
import parsers
import pytest
from parser_targets import TARGETS

# By cost: a model or a training run is built for some.
COUNTS = {"model": 30, "checkpoint": 30, "table": 30, "plan": 30, "recipe": 60, "hub": 40}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target, draw = TARGETS[name], random.Random(name)
    parsers.warm(target, tmp_path)
    seeds = [*target.seeds(), *parsers.corpus(name)]
    read = 0
    with guards.little_memory():
        for payload in parsers.corpus(name):
            parsers.attempt(target, payload, tmp_path)
        for _ in range(COUNTS.get(name, 150)):
            read += not parsers.attempt(target, mutations.mutate(draw.choice(seeds), draw), tmp_path)
    assert read < COUNTS.get(name, 150)


def test_the_corpus_belongs_to_targets() -> None:
    assert {path.name for path in parsers.CORPUS.iterdir()} <= set(TARGETS)


def test_what_a_reader_may_not_do_is_noticed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_bytes(b"secret")
    calls = {
        "to read": lambda: outside.read_bytes(),
        "to write": lambda: (tmp_path / "new").write_bytes(b""),
        "os.remove": lambda: outside.unlink(),
        "os.mkdir": lambda: (tmp_path / "folder").mkdir(),
        "os.listdir": lambda: list(tmp_path.iterdir()),
        "subprocess.Popen": lambda: __import__("subprocess").run(["true"], check=True),
        "socket": lambda: __import__("socket").socket(),
        "pickle.find_class": lambda: __import__("pickle").loads(b"cos\nsystem\n."),
    }
    for event, call in calls.items():
        with pytest.raises(guards.Forbidden, match=event), guards.watched(inside):
            call()
    (inside / "link").symlink_to(outside)
    with pytest.raises(guards.Forbidden, match="to read"), guards.watched(inside):
        (inside / "link").read_bytes()
    with guards.watched(inside):
        (inside / "own").write_bytes(b"1")
        assert (inside / "own").read_bytes() == b"1"
    assert outside.read_bytes() == b"secret"
    with pytest.raises(guards.Hang), guards.watched(inside, seconds=0.05):
        time.sleep(30)


def test_memory_that_a_file_does_not_back_is_refused() -> None:
    with guards.little_memory(), pytest.raises(MemoryError):
        bytearray(2 * guards.ROOM)
