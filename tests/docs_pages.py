"""The pages of the documentation as tests see them: their code blocks, and the lines of a shell block."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands behind it ("no-run", 'title="x.py"'), its code, its first line."""

    language: str
    rest: str
    code: str
    line: int

    @property
    def title(self) -> str:
        """The file that the block stands for, empty where it names none."""
        found = re.search(r'title="([^"]+)"', self.rest)
        return found[1] if found else ""

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones joined, comments and blank ones left out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(language, rest.strip(), textwrap.dedent(match["code"]), line))
    return found


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page under docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    """A page as a test's name shows it."""
    return str(page.relative_to(ROOT))
