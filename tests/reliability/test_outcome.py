"""How a long run ends: its line, its file, its exit code; and how docs/reliability.md shows it."""

from __future__ import annotations

import json
from pathlib import Path

import covered
import outcome
import pytest
from bench_modules import load


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(outcome, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(outcome, "SCRATCH", tmp_path / "scratch")
    return tmp_path


@pytest.mark.parametrize(
    ("ok", "code", "line"), [(True, 0, "soak: all well\n"), (False, 1, "soak: FAILED: all well\n")]
)
def test_a_run_ends_in_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str], ok: bool, code: int, line: str
) -> None:
    assert outcome.finish("soak", "all well", {"steps": 3}, ok=ok) == code
    assert capsys.readouterr().out == line
    found = json.loads((folders / "scratch" / "soak.json").read_text())
    assert (found["line"], found["ok"], found["steps"]) == ("all well", ok, 3)
    assert {"commit", "cpu", "cores", "torch"} <= found["machine"].keys()
    assert not (folders / "kept").exists()


def test_the_page_tells_failures_and_what_was_never_run(folders: Path) -> None:
    page = load("reliability_page")
    assert page.commands_table({}).count("not yet measured") == len(page.COMMANDS)
    assert page.bugs_table({}) == "Not yet measured."
    outcome.finish("soak", "ranks differ", {}, ok=False, keep=True)
    bug = {"file": "fastrank/nn/_conv.py", "name": "a bug"}
    rows = [{**bug, "outcome": "killed"}, {**bug, "name": "another", "outcome": "survived"}]
    outcome.finish("mutants", "1 of 2", {"rows": rows}, ok=False, keep=True)
    found = page.results(folders / "kept")
    assert "| **failed:** ranks differ |" in page.commands_table(found)
    assert "| `fastrank/nn` | 2 | 1 |" in page.bugs_table(found)
    assert page.bugs_table(found).endswith("Alive:\n\n- another (`fastrank/nn/_conv.py`)")
    outcome.finish("mutants", "1 of 1", {"rows": rows[:1]}, ok=True, keep=True)
    assert page.bugs_table(page.results(folders / "kept")).endswith("None is alive.")


def test_what_coverage_leaves_out_is_there() -> None:
    """A name that no test bears would leave out nothing."""
    files = [path.read_text(encoding="utf-8") for path in sorted((outcome.ROOT / "tests").rglob("test_*.py"))]
    for name in covered.LEFT_OUT:
        assert any(f"def {name}(" in text for text in files), name
