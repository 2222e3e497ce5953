"""bench/compare.py: what it takes to claim a change, what is compared, and that nothing of it stays behind."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def compare() -> Any:
    return load("compare")


@pytest.fixture
def cases(compare: Any) -> Any:
    return compare.compare_cases


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small one with a package, kernels, and native parts that are a file."""
    root = tmp_path / "repository"
    files = {
        "fastrank/__init__.py": "version = 1\n",
        "triton_kernels/__init__.py": "",
        "csrc/a.cpp": "// one\n",
        "setup.py": "import pathlib\npathlib.Path('fastrank/_C.abi3.so').write_text('built anew')\n",
        ".gitignore": "*.so\n/build/\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    (root / "fastrank/__init__.py").write_text("version = 2\n", encoding="utf-8")
    (root / "fastrank/_C.abi3.so").write_text("of this tree", encoding="utf-8")
    return root


def options(**changed: Any) -> argparse.Namespace:
    usual = {"base": "HEAD", "families": "", "expression": "", "rounds": 1, "seconds": 0.0, "threads": 1}
    return argparse.Namespace(**{**usual, **changed})


def spread(compare: Any, low: float, middle: float, high: float) -> Any:
    return compare.timing.Quantiles(low, middle, high, 5)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((9, 10, 11), (7, 8, 8.9), "faster"),
        ((9, 10, 11), (7, 8, 9.0), "no claim"),  # they touch
        ((9, 10, 11), (11.1, 12, 13), "slower"),
        ((9, 10, 11), (11, 12, 13), "no claim"),
        ((9.99, 10, 10.01), (9.72, 9.73, 9.74), "no claim"),  # apart, by less than 3 %
        ((9.99, 10, 10.01), (9.69, 9.70, 9.71), "faster"),
        ((9.99, 10, 10.01), (10.27, 10.28, 10.29), "no claim"),
        ((9.99, 10, 10.01), (10.30, 10.31, 10.32), "slower"),
        ((9, 10, 11), (9, 10, 11), "no claim"),
    ],
)
def test_a_claim_needs_3_percent_and_times_apart(compare, before, after, told) -> None:
    assert compare.verdict(spread(compare, *before), spread(compare, *after)) == told


def test_results_are_compared_before_times(compare, cases) -> None:
    one = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert compare.difference([one, 0 * one], [one, 0 * one]) == 0
    assert compare.difference([one], [one + torch.tensor([0.0, 0.5])]) == pytest.approx(0.5 / (9 + 4.5**2) ** 0.5)
    for other in (one[:1], one * torch.nan, one * torch.inf, one * 1e9):
        assert compare.difference([one], [other]) > 0.9
    assert compare.difference([one], [one, one]) == float("inf")
    made = [cases.Case("f", name, lambda: lambda: None, 1e-3) for name in ("right", "wrong", "new", "gone")]
    times = {"us": [1.0, 1.0, 1.0]}
    found = {
        "base": {"f: right": times, "f: wrong": times, "f: new": {"absent": "no such op"}, "f: gone": times},
        "head": {
            "f: right": {"us": [0.5, 0.5, 0.5]},
            "f: wrong": {"us": [0.1, 0.1, 0.1]},
            "f: new": times,
            "f: gone": {"absent": "no such op"},
        },
    }
    outputs = {name: {title: [one] for title in found[name]} for name in found}
    outputs["head"]["f: wrong"] = [one * 1.01]
    rows = compare.judged(made, found, outputs)
    told = ["faster", "results differ", "absent in base", "absent in head"]
    assert [row["verdict"] for row in rows] == told
    assert ["change" in row for row in rows] == [True, False, False, False]
    assert [row["verdict"] for row in compare.judged(made, found, outputs, 2)] == ["no claim", *told[1:]]
    text = compare.shown(rows)
    assert "-50.0 %  faster" in text
    assert "absent in base: no such op" in text
    assert text.endswith("4 cases: 1 faster, 0 slower, 0 no claim, 3 not compared; geometric mean of after over before "
                         "0.500; results differ by 0.0e+00 at most.")  # fmt: skip
    assert json.loads(json.dumps(rows)) == rows


def test_unknown_revisions_are_refused_in_one_sentence(compare, repository) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert compare.commit_of(repository, "HEAD") == head == compare.commit_of(repository, head[:8])
    for name in ("nowhere", f"{head[:8]}-dirty", "--help", "HEAD:csrc", ""):
        with pytest.raises(compare.Refused, match=r"^--base must name a commit of .*, got '"):
            compare.commit_of(repository, name)


def test_the_base_is_the_commit_with_native_parts_of_its_own(compare, repository, tmp_path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    for text, part in (("// one\n", "of this tree"), ("// two\n", "built anew")):
        (repository / "csrc/a.cpp").write_text(text, encoding="utf-8")
        assert compare.native_differs(repository, head) == (part == "built anew")
        folder = tmp_path / part
        folder.mkdir()
        compare.unpack(repository, head, folder)
        assert (folder / "fastrank/__init__.py").read_text(encoding="utf-8") == "version = 1\n"
        assert (folder / "fastrank/_C.abi3.so").read_text(encoding="utf-8") == part
        assert (folder / "fastrank/triton_kernels").resolve() == folder / "triton_kernels"
    (repository / "csrc/a.cpp").write_text("// one\n", encoding="utf-8")
    (repository / "csrc/b.cpp").write_text("// new\n", encoding="utf-8")
    assert compare.native_differs(repository, head)


def test_a_base_that_does_not_build_is_refused(compare, repository, tmp_path) -> None:
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n", encoding="utf-8")
    git(repository, "commit", "-qam", "broken")
    (repository / "csrc/a.cpp").write_text("// two\n", encoding="utf-8")
    (tmp_path / "base").mkdir()
    with pytest.raises(compare.Refused, match=r"^the native parts of the base were not built: no compiler$"):
        compare.unpack(repository, git(repository, "rev-parse", "HEAD"), tmp_path / "base")


def test_processes_in_turns_that_swap_every_round(compare, repository, tmp_path, monkeypatch) -> None:
    seen: list[tuple[str, bool]] = []

    def once(tree: Path, scratch: Path, asked: list[str]) -> dict[str, Any]:
        seen.append((tree.name, "--outputs" in asked))
        return {"f: a": {"us": [float(len(seen))]}, "f: b": {"absent": "why"}}

    monkeypatch.setattr(compare, "once", once)
    found = compare.rounds({"base": Path("b"), "head": Path("h")}, tmp_path, 3, [])
    assert seen == [("b", True), ("h", True), ("h", False), ("b", False), ("b", False), ("h", False)]
    assert found["base"] == {"f: a": {"us": [1.0, 4.0, 5.0]}, "f: b": {"absent": "why"}}
    assert found["head"]["f: a"]["us"] == [2.0, 3.0, 6.0]


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm", "failure"])
def test_nothing_stays_behind(compare, repository, monkeypatch, capsys, way) -> None:
    folders: list[Path] = []

    def rounds(trees: dict[str, Path], *arguments: Any) -> None:
        folders.append(trees["base"])
        assert trees["base"].is_dir()
        if way == "sigterm":
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt if way == "ctrl-c" else compare.Refused("it broke")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compare, "rounds", rounds)
    monkeypatch.setattr(compare, "ROOT", repository)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--base", "HEAD"])
    try:
        code = compare.main()
    except SystemExit as error:
        code = error.code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == {"ctrl-c": 130, "sigterm": 143, "failure": 2}[way]
    assert len(folders) == 1
    assert list((repository / "build").iterdir()) == []
    assert git(repository, "worktree", "list").count("\n") == 0
    if way == "failure":
        assert capsys.readouterr().err == "there is nothing to compare: it broke\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"families": "tukcer"}, "--families must name some of tucker2, cp, .*, got tukcer$"),
        ({"expression": "no such case"}, "^-k must match a case, got 'no such case'$"),
        ({"base": "nowhere"}, "^--base must name a commit"),
    ],
)
def test_mistakes_are_told_before_anything_is_unpacked(compare, repository, change, reason) -> None:
    with pytest.raises((compare.Refused, ValueError), match=reason):
        compare.compare(repository, options(**change))
    assert not (repository / "build").exists()


def test_exit_codes(compare, monkeypatch, tmp_path, capsys) -> None:
    def judge(verdict: str, *flags: str) -> int:
        row = {"case": "f: a", "tolerance": 1e-3, "difference": 1.0, "verdict": verdict}
        result = {"base": {"commit": "0" * 40}, "head": "abc", "rows": [row]}
        monkeypatch.setattr(compare, "compare", lambda root, asked: result)
        monkeypatch.setattr(compare.signal, "signal", lambda number, call: None)
        argv = ["compare.py", "--base", "main", "--json", str(tmp_path / "rows.json"), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        code: int = compare.main()
        assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == result
        return code

    assert [judge(told) for told in ("slower", "faster")] == [0, 0]
    told = ("slower", "results differ", "absent in head", "faster", "no claim", "absent in base")
    assert [judge(each, "--fail-slower") for each in told] == [1, 1, 1, 0, 0, 0]
    assert "results differ: by 1.0e+00, 1.0e-03 is rounding" in capsys.readouterr().out


def test_a_case_that_a_revision_lacks(cases) -> None:
    def make() -> Any:
        from fastrank import ops

        return ops.conv_of_the_future

    row, outputs = cases.run(cases.Case("f", "new", make, 1e-3), 0.0)
    assert row == {"absent": "AttributeError: module 'fastrank.ops' has no attribute 'conv_of_the_future'"}
    assert outputs == []


def test_every_title_is_another_and_every_tolerance_small(cases) -> None:
    found = cases.cases()
    assert len({case.title for case in found}) == len(found) > 40
    assert all(10 * EPS < case.tolerance < 0.02 for case in found)
    assert {case.family for case in found} == {"tucker2", "cp", "nn", "linalg", "gates", "compress", "train"}


@pytest.mark.parametrize("family", ["gates", "linalg", "train", "compress"])
def test_two_makings_of_a_case_compute_the_same(compare, cases, one_thread, monkeypatch, family) -> None:
    """What is drawn depends on the seed alone: else two revisions could not be compared."""
    monkeypatch.setattr(cases, "LEAST_SAMPLES", 1)
    monkeypatch.setattr(cases, "LEAST_SAMPLE_S", 0.0)
    for case in cases.chosen([family], "^(?!.*(norton|large))"):
        (row, first), (_, second) = cases.run(case, 0.0), cases.run(case, 0.0)
        assert row["us"]
        assert sum(tensor.numel() for tensor in first) > 0
        assert compare.difference(first, second) <= case.tolerance, case.title


@pytest.mark.skipif(not (BENCH.parent / ".git").exists(), reason="the tests do not run in a git checkout")
def test_a_real_comparison(compare, monkeypatch) -> None:
    monkeypatch.setattr(compare, "native_differs", lambda root, commit: False)
    before = set(os.listdir(BENCH.parent / "build")) if (BENCH.parent / "build").is_dir() else set()
    result = compare.compare(BENCH.parent, options(expression="funnel_penalty$"))
    (row,) = result["rows"]
    assert row["case"] == "gates: funnel_penalty"
    assert row["verdict"] == "no claim"  # which one round cannot be for
    assert row["difference"] <= row["tolerance"]
    assert row["base"]["samples"] >= 5 <= row["head"]["samples"]
    assert set(os.listdir(BENCH.parent / "build")) == before
