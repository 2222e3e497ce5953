"""What is installed has a hash, and nothing is downloaded, evaluated or unpickled: read off the sources."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import zipfile
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


def wheel(folder: Path, name: str, version: str, *lines: str) -> Path:
    """An empty package, as a wheel with these lines in its metadata."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(metadata))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_pip_takes_a_pin_of_what_another_package_wants_with_an_extra(tmp_path: Path) -> None:
    """pip before 23.3, which Python 3.10 and 3.11 carry, refuses it once a newer version than the pinned one is out."""
    extra = ("Provides-Extra: more",)
    old, _ = wheel(tmp_path, "part", "1.0", *extra), wheel(tmp_path, "part", "2.0", *extra)
    whole = wheel(tmp_path, "whole", "1.0", "Requires-Dist: part[more]>=1.0")
    lock = tmp_path / "lock.txt"
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (old, whole)]
    lock.write_text("part==1.0 --hash=sha256:{}\nwhole==1.0 --hash=sha256:{}\n".format(*hashes), encoding="utf-8")
    command = f"-m pip install --isolated --dry-run --no-index --find-links {tmp_path} --require-hashes -r {lock}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Would install part-1.0 whole-1.0" in done.stdout


def test_the_pip_that_installs_the_lock_is_installed_first() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nelse\n", 2)[-1]
    program = re.search(r"awk '([^']+)' requirements.lock > \$\(VENV\)/first.txt", recipe)
    assert program is not None
    command = ["awk", program[1].replace("$$", "$"), str(ROOT / "requirements.lock")]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pinned = {match[1]: match[2] for line in first if (match := PIN.match(line))}
    assert set(pinned) == {"pip", "setuptools"}
    assert tuple(int(part) for part in pinned["pip"].split(".")[:2]) >= (23, 3)


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
