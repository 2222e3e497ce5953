"""The list of seeded bugs fits the tree as it is, and what mutants.py makes of one."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest
from outcome import ROOT

BUGS = mutants.seeded()


def test_there_are_enough_and_no_two_alike() -> None:
    assert len(BUGS) >= 60
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_changes_one_place_and_names_its_tests(bug: mutants.Bug) -> None:
    assert (ROOT / bug.file).read_text(encoding="utf-8").count(bug.old) == 1, "old must stand there once"
    assert bug.old != bug.new
    assert bug.tests.split()
    assert [test for test in bug.tests.split() if not (ROOT / test).exists()] == []


@pytest.fixture
def copy(tmp_path: Path) -> mutants.Copy:
    """A tree of one function and one test."""
    tree = tmp_path / "tree"
    (tree / "fastrank").mkdir(parents=True)
    (tree / "code.py").write_text("def twice(x):\n    return 2 * x\n")
    (tree / "test_twice.py").write_text(
        "import importlib.util as u\nspec = u.spec_from_file_location('c', 'code.py')\n"
        "c = u.module_from_spec(spec)\nspec.loader.exec_module(c)\n\n\ndef test():\n    assert c.twice(3) == 6\n"
    )
    made = object.__new__(mutants.Copy)
    made.folder = tree
    return made


@pytest.mark.parametrize(
    ("new", "tests", "outcome"),
    [("3 * x", "test_twice.py", "killed"), ("x + x", "test_twice.py", "survived"), ("3 * x", "none.py", "broken")],
)
def test_killed_survived_and_broken(copy: mutants.Copy, new: str, tests: str, outcome: str) -> None:
    before = (copy.folder / "code.py").read_text()
    found = mutants.attempt(mutants.Bug("a bug", "code.py", tests, "2 * x", new), copy)
    assert found["outcome"] == outcome
    assert (copy.folder / "code.py").read_text() == before


def test_a_test_that_never_ends_counts_as_a_kill(copy: mutants.Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.folder / "test_twice.py").write_text("import time\n\n\ndef test():\n    time.sleep(60)\n")
    run = copy.run
    monkeypatch.setattr(copy, "run", lambda command, limit_s=0.0: run(command, 3.0))
    found = mutants.attempt(mutants.Bug("a bug", "code.py", "test_twice.py", "2 * x", "x"), copy)
    assert (found["outcome"], found["by"]) == ("killed", "time")


def test_slow_tests_are_asked_where_the_others_find_nothing(copy: mutants.Copy) -> None:
    text = (copy.folder / "test_twice.py").read_text()
    (copy.folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    text = text.replace("def test()", "@pytest.mark.slow\ndef test()") + "\n\ndef test_fast():\n    pass\n"
    (copy.folder / "test_twice.py").write_text("import pytest\n" + text)
    for new, outcome in (("3 * x", "killed"), ("x + x", "survived")):
        bug = mutants.Bug("a bug", "code.py", "test_twice.py", "2 * x", new)
        assert mutants.attempt(bug, copy)["outcome"] == outcome


def test_a_stopped_run_goes_on(copy: mutants.Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (mutants.Bug(name, "code.py", "test_twice.py", "2 * x", new) for name, new in (("a", "x"), ("b", "0")))
    asked: list[str] = []
    attempt = mutants.attempt
    monkeypatch.setattr(mutants.outcome, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(mutants, "Copy", lambda folder: copy)
    monkeypatch.setattr(mutants, "seeded", lambda: [one, other])
    monkeypatch.setattr(mutants, "attempt", lambda bug, where: asked.append(bug.name) or attempt(bug, where))
    assert mutants.attempt_all([one], 1, tmp_path).keys() == {"a"}
    assert mutants.attempt_all([one, other], 1, tmp_path).keys() == {"a", "b"}
    assert asked == ["a", "b"]
    assert not list((tmp_path / "scratch").iterdir())  # done: the next run begins anew
    mutants.attempt_all([one], 1, tmp_path)
    (copy.folder / "code.py").write_text("def twice(x):\n    return 2 * x + 0\n")
    mutants.attempt_all([one], 1, tmp_path)
    assert asked == ["a", "b", "a", "a"]  # files that differ are another tree
