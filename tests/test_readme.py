"""What README.md says is true: its code runs, its commands exist, its tables are those of the code and the results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastrank import cli, recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    assert "fastrank.make_plan" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small.safetensors").exists()


def test_the_use_on_ones_own_model_is_ten_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_every_command_and_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    seen = 0
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
            seen += 1
        elif words[:1] == ["fastrank"]:
            assert words[1] in known, line
            seen += 1
            if words[1] == "train":
                recipe.load(ROOT / words[2])
    assert seen >= 6


def test_the_generated_tables_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("exec make test")
