"""The pages under docs/extending, followed literally in a copy of the checkout.

A block with a file name is that file, a diff is applied to the file it names, and the shell lines are run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import docs_pages
import pytest
from docs_pages import DOCS, ROOT

PAGES = sorted((DOCS / "extending").glob("*.md"))


def edited(text: str, diff: str, where: str) -> str:
    """`text` with every hunk of a diff applied; hunks are parted by lines of @@, and match in one place alone."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        starts = [match.start() for match in re.finditer(f"^(?={re.escape(before)})", text, flags=re.M)]
        assert len(starts) == 1, f"{where}: {before!r} is there {len(starts)} times"
        text = text[: starts[0]] + after + text[starts[0] + len(before) :]
    return text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of this checkout a contributor edits and runs."""
    ignored = shutil.ignore_patterns("__pycache__", "_C_cuda*")
    shutil.copytree(ROOT / "fastrank", tmp_path / "fastrank", ignore=ignored)
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=docs_pages.name)
def test_following_the_page_works(page: Path, checkout: Path) -> None:
    ran = []
    for block in docs_pages.blocks(page):
        where = f"{docs_pages.name(page)}:{block.line}"
        if block.language == "sh":
            for line in block.commands:
                done = subprocess.run(
                    [sys.executable, "-m", *shlex.split(line, comments=True)],
                    cwd=checkout,
                    env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"
                ran.append(line.split()[0])
            continue
        assert block.title, f"{where}: a block of {block.language} must name its file"
        path = checkout / block.title
        if block.language == "diff":
            path.write_text(edited(path.read_text(encoding="utf-8"), block.code, where), encoding="utf-8")
        else:
            assert not path.exists(), f"{where}: {block.title} exists already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
    assert ran == ["ruff", "pytest"]


def test_pages_are_there() -> None:
    assert [page.stem for page in PAGES] == ["backend", "decomposition"]


def test_a_hunk_has_to_fit() -> None:
    assert edited("a\nb\nc\n", " b\n+x\n@@\n-c\n", "here") == "a\nb\nx\n"
    with pytest.raises(AssertionError, match="0 times"):
        edited("a\n", " b\n+x\n", "here")
    with pytest.raises(AssertionError, match="2 times"):
        edited("a\na\n", " a\n+x\n", "here")
