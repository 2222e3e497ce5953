"""What is installed has a hash, and nothing is downloaded, evaluated or unpickled: read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;]+)( ;[^\\]*)?( \\)?$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")
SHIPPED = [*(ROOT / "fastrank").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py"), ROOT / "setup.py"]
# Calls that run text or what a file names, by the end of their dotted name.
FORBIDDEN = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "dill.load",
)
FORBIDDEN += ("yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "joblib.load", "marshal.loads", "shelve.open")
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "ssl"}


def pins() -> dict[str, int]:
    """Package -> how many hashes its pins have."""
    found: dict[str, int] = {}
    name = ""
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if match := PIN.match(line):
            name = match[1]
            found[name] = min(found.get(name, 0), 0)
        else:
            assert HASH.match(line), line
            found[name] += 1
    return found


def test_every_pin_has_hashes() -> None:
    assert len(pins()) > 100
    assert [name for name, hashes in pins().items() if hashes == 0] == []


def test_everything_that_is_asked_for_is_pinned() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = set()
    for block in re.findall(
        r"^dependencies = \[.*?^\]|^\[project\.optional-dependencies\].*?(?=^\[)", text, re.M | re.S
    ):
        asked |= {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z0-9_-]+)\s*(?:[><=]|")', block)}
    assert {"torch", "pytest", "ruff"} <= asked
    assert sorted(asked - {"fastrank"} - set(pins())) == []


def test_the_makefile_installs_by_hashes_alone() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("$(READY): ")[1].split("\nlock:")[0]
    pinned = recipe.split("else\n")[1]
    installs = [line for line in pinned.splitlines() if "install" in line and "echo" not in line]
    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_evaluated_unpickled_or_downloaded(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, call in calls(tree):
        method = isinstance(call.func, ast.Attribute) and name not in FORBIDDEN
        assert method or name.split(".")[-1] not in FORBIDDEN, name
        assert name not in FORBIDDEN, name
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("shell", "False") == "False", name
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        if name == "yaml.load":
            assert ast.unparse(call.args[1]) == "_Loader", "the safe loader of recipes"
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not NETWORK & {name.split(".")[0] for name in names}


def test_importing_everything_connects_to_nothing() -> None:
    """Every room of the package, in a process that may not open a connection, start a program, or write a file."""
    program = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"):
        raise SystemExit(f"{event} {arguments}")
import torch, numpy, scipy.optimize, yaml, typer, rich
sys.addaudithook(watch)
import importlib, pkgutil, fastrank
left = ("triton_kernels", "integrations", "_C", "_C_cuda", "__main__")
for found in pkgutil.walk_packages(fastrank.__path__, "fastrank."):
    if found.name.split(".")[1] not in left:
        importlib.import_module(found.name)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "done\n", done.stderr[-2000:]
