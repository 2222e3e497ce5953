"""The import rules of the house, off the syntax trees: truth below kernels, kernels below layers, nobody upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Room -> the rooms of fastrank that it may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "_checks": set(),
    "_stages": set(),
    "_atomic": set(),
    "_memory": set(),
    "_native": set(),
    "reference": set(),
    "_files": {"_checks", "_atomic"},
    "_tables": {"_atomic"},
    "_backends": {"_checks", "_native", "_tables"},
    "ops": {"_checks", "_backends", "_memory", "_native", "reference"},
    "ranks": {"_checks", "ops", "reference"},
    "decompose": {"_checks", "ops", "reference"},
    "nn": {"_backends", "_checks", "_stages", "decompose", "ops", "reference"},
    "plan": {"_atomic"},
    "complexity": {"_checks", "_stages", "nn"},
    "latency": {"_checks"},
    "models": {"_checks", "nn"},
    "prune": {"_checks", "decompose", "models", "nn", "ops", "ranks", "reference"},
    "data": {"_checks", "_files"},
    "regularize": {"_checks", "decompose", "latency", "nn", "ops", "ranks"},
    "calibration": {"_checks", "data", "nn"},
    "convert": {"_checks", "_stages", "calibration", "complexity", "decompose", "nn", "plan", "ranks"},
    "budget": {
        "_atomic", "_checks", "_memory", "_tables", "calibration", "convert", "decompose", "latency", "plan", "ranks",
    },
    "distributed": {"_checks", "complexity", "data", "ops", "regularize"},
    "train": {"_atomic", "_checks", "_files", "data", "distributed", "regularize"},
    "fuse": {"_checks", "convert", "nn"},
    "io": {"_checks", "_files", "fuse", "models", "nn", "plan"},
    "export": {"_atomic", "_checks", "convert", "nn"},
    "hub": {"_atomic", "_checks", "_version", "complexity", "convert", "io", "models"},
    "methods": {
        "_checks", "budget", "calibration", "complexity", "convert", "decompose", "models", "nn", "ops", "plan",
        "prune", "ranks", "regularize",
    },
    "recipe": {
        "_checks", "_atomic", "_version", "calibration", "complexity", "convert", "data", "distributed", "io",
        "methods", "models", "plan", "regularize", "report", "train",
    },
    "tune": {"_backends", "_checks", "_tables", "convert", "decompose", "nn", "ops", "reference"},
    "env": {"_backends", "_native", "_tables", "_version"},
    "benchmarks": {
        "_backends", "_checks", "_tables", "_version", "complexity", "convert", "decompose", "env", "fuse", "models",
        "nn", "ops", "plan", "reference",
    },
    "report": {
        "_atomic", "_checks", "complexity", "convert", "decompose", "io", "models", "nn", "plan", "ranks", "regularize",
    },
    "integrations": {"_checks", "_files", "regularize", "report", "train"},
    "demo": {
        "_atomic", "_version", "complexity", "convert", "data", "decompose", "io", "latency", "methods", "models",
        "plan", "ranks", "report", "train",
    },
}  # fmt: skip
# The rooms on top may import every room that is not private.
TOP = {"cli", "__init__", "__main__"}
FOREIGN = {"reference": {"torch"}, "plan": set(), "_atomic": set(), "_stages": set()}


def files() -> list[Path]:
    return sorted((ROOT / "fastrank").rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "fastrank").with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import; `from fastrank import x` counts as fastrank.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"fastrank.{a.name}" for a in node.names] if node.module == "fastrank" else [node.module or ""]
            found += [(name, id(node) not in inside) for name in names]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    here = room(path)
    for module, _ in imports(path):
        head, _, rest = module.partition(".")
        if head != "fastrank":
            allowed = FOREIGN.get(here)
            assert allowed is None or head in allowed | set(sys.stdlib_module_names), f"{here} imports {module}"
            continue
        target = rest.partition(".")[0]
        if target == "triton_kernels":
            assert here == "ops", f"{here} imports {module}: only ops touches a kernel"
        elif here in TOP:
            assert not target.startswith("_") or target == "_version", f"{here} imports {module}"
        elif target != here:
            assert target in ALLOWED[here], f"{here} imports {module}"


def test_the_rules_have_no_cycle() -> None:
    seen: dict[str, int] = {}

    def depth(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, " -> ".join((*path, name))
        if name not in seen:
            seen[name] = 1 + max((depth(below, (*path, name)) for below in ALLOWED[name]), default=0)
        return seen[name]

    for name in ALLOWED:
        depth(name)


def test_every_room_has_a_rule() -> None:
    assert {room(path) for path in files()} - TOP <= set(ALLOWED)


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_import_torch_and_triton_alone(path: Path) -> None:
    for module, _ in imports(path):
        head = module.partition(".")[0]
        assert head in {"torch", "triton"} | set(sys.stdlib_module_names) or module.startswith(
            "fastrank.triton_kernels"
        )


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_ops_names_a_kernel(path: Path) -> None:
    """Outside ops/ (and the selection itself) nobody names torch.ops.fastrank or a compiled part."""
    if room(path) in {"ops", "_backends", "_native", "env"}:
        return
    text = path.read_text(encoding="utf-8")
    for word in ("torch.ops.fastrank", "_native", "triton_kernels", "_host"):
        assert word not in text, f"{path.name} names {word}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_and_extras_are_never_imported_with_the_package(path: Path) -> None:
    optional = {
        "onnx", "onnxruntime", "onnxscript",
        "triton", "torchvision", "timm", "sklearn", "matplotlib", "tensorly", "scipy", "pytest", "pycocotools",
        "torch_pruning", "pytorch_grad_cam", "cv2",
        "lightning", "transformers", "accelerate", "tensorboard",
    }  # fmt: skip
    for module, at_top in imports(path):
        assert not (at_top and module.partition(".")[0] in optional), f"{path.name} imports {module} at import time"


def test_files_stay_short() -> None:
    limits = {".py": 400, ".cu": 600, ".cuh": 600, ".cpp": 600, ".h": 600}
    for folder in ("fastrank", "triton_kernels", "csrc", "bench", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in limits:
                lines = path.read_text(encoding="utf-8").count("\n")
                assert lines <= limits[path.suffix], f"{path.relative_to(ROOT)} has {lines} lines"


def succeeds(code: str) -> None:
    """`code` ends without an error in an interpreter of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, fastrank\n"
        "assert not {'fastrank.train', 'fastrank.methods', 'fastrank.io'} & set(sys.modules)\n"
        "assert all(getattr(fastrank, name) is not None for name in fastrank.__all__)\n"
        "assert set(fastrank.__all__) <= set(dir(fastrank)) and fastrank.report.write_html\n"
        "assert fastrank.compress is fastrank.convert.compress and fastrank.train.fit\n"
        "try: fastrank.tarin\n"
        "except AttributeError as error: assert 'tarin' in str(error)\n"
        "else: sys.exit('a name that is none')"
    )
    succeeds(code)


def test_import_is_light() -> None:
    """Importing fastrank imports nothing heavy that torch does not; flops are counted all the same."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastrank\n"
        "heavy = {'triton', 'torchvision', 'timm', 'sklearn', 'matplotlib', 'scipy', 'typer', 'rich', 'yaml',\n"
        "         'onnx', 'onnxruntime', 'onnxscript', 'lightning', 'transformers', 'accelerate', 'tensorboard',\n"
        "         'torch._dynamo', 'torch._inductor', 'torch.onnx', 'torch.utils.tensorboard'}\n"
        "loaded = heavy & (set(sys.modules) - before)\n"
        "assert not loaded, f'loaded: {sorted(loaded)}'\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "layer = fastrank.nn.FusedTucker2Conv(4, 6, 1, (2, 3))\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    layer(torch.ones(1, 4, 1, 1, requires_grad=True))\n"
        "assert counter.get_total_flops() == 2 * (4 * 2 + 2 * 3 + 3 * 6), counter.get_total_flops()\n"
    )
    succeeds(code)
