"""The sdist and the wheel: what is in them, what is not, and that they work where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What git holds at the top; of a build or a run there must be nothing.
SOURCES = (
    ".ci",
    "bench",
    "csrc",
    "docs",
    "fastrank",
    "recipes",
    "tests",
    "triton_kernels",
    "setup.py",
    "pyproject.toml",
    "requirements.lock",
    "mkdocs.yml",
    "Makefile",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
LARGEST_WHEEL = 20e6


def run(command: list[object], **options: object) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in SOURCES:
        source, target = ROOT / name, folder / "src" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json"))
        else:
            shutil.copy(source, target)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "src"])
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from that sdist without nvcc's part, as on a machine that has only a C++ compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist],
        env={**os.environ, "FASTRANK_CUDA": "0"},
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that the wheel is installed in.

    Its other packages are this one's, seen through a path file: in such a folder no path file counts, and so this
    checkout, which is installed by one, is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    run([*pip, "install", "-q", "--no-index", "--no-deps", wheel])
    return folder / "bin"


@pytest.mark.slow
def test_the_sdist_holds_what_a_developer_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in SOURCES:
        assert name in names or any(each.startswith(f"{name}/") for each in names), name
    for name in ("fastrank/py.typed", "csrc/registry.cpp", "docs/index.md", "tests/conftest.py", "bench/tables.py"):
        assert name in names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "runs/" in name]


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
def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST_WHEEL


@pytest.mark.slow
def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert {"vision", "plot", "onnx", "lightning", "hf", "tensorboard", "docs", "dev"} <= extras
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    always = {requirement.partition(">")[0] for requirement in needed if "extra ==" not in requirement}
    assert always == {"torch", "numpy", "scipy", "safetensors", "pyyaml", "typer", "rich"}
    assert "Classifier: Typing :: Typed" in lines


@pytest.mark.slow
def test_it_works_where_it_was_installed(environment: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, fastrank\n"
        f"assert fastrank.__file__.startswith({str(environment.parent)!r}), fastrank.__file__\n"
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
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run([environment / "python", "-c", code], cwd=tmp_path, env=clean)


@pytest.mark.slow
def test_the_command_is_installed(environment: Path, tmp_path: Path) -> None:
    assert "compress" in run([environment / "fastrank", "--help"], cwd=tmp_path)
