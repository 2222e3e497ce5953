"""The compiled parts: their schemas, what is said where they are missing, and an import that needs none of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrank.ops
from fastrank import _native
from fastrank.ops import _register

ROOT = Path(fastrank.__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
needs_source = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the package")


def schemas_in_cpp() -> dict[str, str]:
    """Operator name -> schema, from the m.def calls of csrc/registry.cpp."""
    code = (CSRC / "registry.cpp").read_text(encoding="utf-8")
    calls = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", code)
    schemas = ["".join(re.findall(r"\"([^\"]*)\"", call)) for call in calls]
    return {schema.split("(", 1)[0]: schema for schema in schemas}


@needs_source
def test_schemas_are_the_same_in_cpp_and_python() -> None:
    graph = {name: schema for name, schema in schemas_in_cpp().items() if not name.startswith("launch_")}
    assert graph == _register.SCHEMAS


@needs_source
def test_every_launcher_is_implemented() -> None:
    declared = {name for name in schemas_in_cpp() if name.startswith("launch_")}
    code = "".join(path.read_text(encoding="utf-8") for path in CSRC.glob("*/*.cpp"))
    assert set(re.findall(r"m\.impl\(\"(\w+)\"", code)) == declared


@needs_source
@pytest.mark.skipif(not _native.load("_C"), reason=_native.why_missing("_C") or "built")
def test_schemas_of_the_build_are_those_of_the_source() -> None:
    for name, schema in schemas_in_cpp().items():
        built = str(getattr(torch.ops.fastrank, name).default._schema)
        assert built == f"fastrank::{torch._C.parse_schema(schema)}", (
            "rebuild: the compiled schemas are older than the source"
        )


@pytest.mark.skipif(not _native.load("_C_cuda"), reason=_native.why_missing("_C_cuda") or "built")
def test_cuda_kernels_are_registered() -> None:
    for name in (name for name in schemas_in_cpp() if name.startswith("launch_")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrank::{name}", "CUDA")


def test_why_missing_is_empty_or_one_sentence() -> None:
    for part in _native.PARTS:
        reason = _native.why_missing(part)
        assert _native.load(part) == (not reason)
        assert reason == "" or (f"fastrank.{part}" in reason and "\n" not in reason)
    with pytest.raises(ValueError, match="name must be one of"):
        _native.why_missing("_D")


def test_build_info() -> None:
    info = _native.build_info()
    assert {"missing", "nvcc", "archs", "torch"} <= set(info)
    assert all(part.startswith("fastrank._") and reason for part, reason in info["missing"].items())


def test_host_says_what_it_is() -> None:
    if reason := _native.why_missing("_host"):
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            _native.host()
        return
    facts = _native.host().build_facts()
    assert set(facts) == {"compiler", "cplusplus", "nvcc", "archs"}
    assert facts["cplusplus"] >= 201703


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter that finds the package where this one does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch
from fastrank import ops
out = ops.gated_factor(torch.ones(2, 4), torch.ones(2))
assert torch.allclose(out, torch.full((2, 4), 0.5)), out
"""


def test_imports_without_compiled_parts() -> None:
    code = """
import pathlib
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [p for p in glob(self, pattern) if p.suffix not in (".so", ".pyd")]
"""
    code += USE + "from fastrank import _native\nprint([_native.load(part) for part in _native.PARTS])"
    assert run(code).strip() == "[False, False, False]"


def test_imports_without_triton() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.modules["triton"] = None
"""
    code += USE + "from fastrank import _backends\nprint(_backends.why_no_triton())"
    assert run(code, TRITON_INTERPRET="0").strip() == "the triton package is not installed"


def test_triton_kernels_are_found_in_a_source_tree() -> None:
    code = "from fastrank import _native\nprint(_native.triton_kernels('gates').__name__)"
    assert run(code).strip() == "fastrank.triton_kernels.gates"
