"""The wheel: what is in it, what is not, and that it works from where it was unpacked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "csrc",
    "fastrank",
    "triton_kernels",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources without nvcc's part, as on a machine that has only a C++ compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "src" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json"))
        else:
            shutil.copy(source, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "src"],
        env={**os.environ, "FASTRANK_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_nothing_but_fastrank_is_installed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastrank"}
    for name in (
        "fastrank/py.typed",
        "fastrank/_tables/cpu.json",
        "fastrank/triton_kernels/gates.py",
        "fastrank/_build_info.json",
        "fastrank/cli/__init__.py",
    ):
        assert name in names
    assert not [name for name in names if "test" in name or name.endswith((".cu", ".cpp"))]


@pytest.mark.slow
def test_it_works_from_where_it_was_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib.util, sys, fastrank\n"
        f"assert fastrank.__file__.startswith({str(tmp_path)!r}), fastrank.__file__\n"
        "assert importlib.util.find_spec('fastrank.triton_kernels')\n"
        "assert not importlib.util.find_spec('triton_kernels')\n"
        "from fastrank import env\n"
        "compiled = env.collect()['compiled']\n"
        "assert compiled['_C'] == compiled['_host'] == 'loaded', compiled\n"
        "assert 'FASTRANK_CUDA=0' in compiled['_C_cuda'], compiled\n"
        "import torch\n"
        "layer = fastrank.nn.FusedTucker2Conv(4, 6, 3, (2, 3))\n"
        "assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_is_installed(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "fastrank = fastrank.cli:main" in archive.read(entry).decode()
