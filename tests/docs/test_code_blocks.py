"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, page by page, as a reader would run it.

A page's ```python blocks share one namespace and one folder, empty but for the checkout's recipes; a line of a ```sh
block that begins with `fastrank` goes through the command line in the same folder. Of ```sh no-run blocks, and of
other commands, it is checked that what they name exists. The pages under docs/extending change fastrank itself: see
test_extending.py.
"""

from __future__ import annotations

import linecache
import os
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_pages
import numpy as np
import pytest
import torch
import typer
from docs_pages import ROOT, Block

from fastrank import cli

# What a block may be: run, checked, or only shown ("py-old" is another library's code, on the migration page).
LANGUAGES = {"python", "sh", "diff", "json", "yaml", "toml", "text", "py-old"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = [page for page in docs_pages.pages() if page.parent.name != "extending"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page's code runs; what it changes of the process is undone."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    environment, path = dict(os.environ), list(sys.path)
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    precision = torch.get_float32_matmul_precision()
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    torch.set_num_threads(1)  # the examples are small: two threads would wait for each other where cores are shared
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield tmp_path
    random.setstate(drawn)
    np.random.set_state(drawn_by_numpy)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.set_float32_matmul_precision(precision)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `fastrank ...` line, as the entry point runs it."""
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    code: Any = None
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    assert not code, f"{line}: exit code {code}"


def check_command(line: str) -> None:
    """What a line names exists: a command of fastrank and its options, a target of make, a file of this checkout."""
    words = shlex.split(line, comments=True)
    if "fastrank" in words:
        words = words[words.index("fastrank") + 1 :]
        group: Any = typer.main.get_command(cli.app)
        assert words, line
        assert words[0] in group.commands, f"{line}: no command {words[0]!r}"
        known = {
            option for p in group.commands[words[0]].params for option in (*p.opts, *getattr(p, "secondary_opts", ()))
        } | {"--help"}
        for word in words[1:]:
            option = word.partition("=")[0]
            assert not re.match(r"--?[a-z]", option) or option in known, f"{line}: no option {option!r}"
        for word in words[1:]:
            assert not word.startswith("recipes/") or (ROOT / word).exists(), f"{line}: no file {word!r}"
    elif words[0] == "make":
        for word in words[1:]:
            assert "=" in word or re.search(rf"^{word}:", MAKEFILE, flags=re.M), f"{line}: no target {word!r}"
    elif words[0] in ("python", "pytest"):
        for word in words[1:]:
            assert not word.endswith(".py") or (ROOT / word).exists(), f"{line}: no file {word!r}"


@pytest.mark.parametrize("page", PAGES, ids=docs_pages.name)
def test_the_blocks_of_a_page_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in docs_pages.blocks(page):
        where = f"{docs_pages.name(page)}:{block.line}"
        if block.language == "python":
            name = f"<{where}>"
            linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
            exec(compile(block.code, name, "exec"), namespace)
        elif block.language == "sh":
            for line in block.commands:
                check_command(line)
                if shlex.split(line)[0] == "fastrank" and block.rest != "no-run":
                    run_command(line, monkeypatch)
    assert Path.cwd() == folder
    capsys.readouterr()


@pytest.mark.parametrize("page", docs_pages.pages(), ids=docs_pages.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in docs_pages.blocks(page):
        where = f"{docs_pages.name(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: the block is {block.language!r}, not one of {sorted(LANGUAGES)}"
        assert block.language != "sh" or block.rest in ("", "no-run"), f"{where}: sh {block.rest!r}"


def test_a_block_is_found_with_what_it_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'a\n\n```sh no-run\nfastrank \\\n  env  # c\n# d\n```\n\n  ```python title="b.py"\n  x = 1\n  ```\n'
    )
    shell, code = docs_pages.blocks(page)
    assert (shell.language, shell.rest, shell.line) == ("sh", "no-run", 4)
    assert [shlex.split(line, comments=True) for line in shell.commands] == [["fastrank", "env"]]
    assert code == Block("python", 'title="b.py"', "x = 1\n", 10)
    assert code.title == "b.py"


@pytest.mark.parametrize(
    "line", ["fastrank nonsense", "fastrank env --nonsense", "make nonsense", "python bench/nonsense.py"]
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError, match="nonsense"):
        check_command(line)
