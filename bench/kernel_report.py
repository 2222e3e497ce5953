"""Resources of every GPU kernel, compiled offline: registers, spills, shared and local memory, tensor-core use.

    python bench/kernel_report.py [--arch sm_80,sm_90a] [--json]

No GPU is needed. Triton kernels come from the KERNELS table beside their launchers, CUDA kernels from csrc/*/*.cu.
Exit code 1 where a kernel spills, needs more shared memory than a block can have, or is missing from the table.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = 227 * 1024
REGISTER_LIMIT = 255
DTYPES = ("fp32", "fp16", "bf16")

# Most dynamic shared memory a launch asks for, which a compiler cannot know. Every __global__ of csrc stands here.
DYNAMIC_SHARED = {
    "gated_factors_kernel": 32,
    "gated_factors_backward_kernel": 64,
    "funnel_partials_kernel": 32,
    "funnel_finish_kernel": 32,
    "funnel_backward_kernel": 0,
    "funnel_proximal_kernel": 0,
    "count_below_kernel": 64,
    "measure_kernel": 0,
    "stage_kernel": 16640,
    "gram_kernel": 17408,
    "assemble_kernel": 17664,
    "solve_kernel": 34304,
    "update_kernel": 34816,
    "order_kernel": 2056,
    "rotate_kernel": 17408,
    "settle_kernel": 0,
    "finish_kernel": 2056,
    "result_kernel": 17408,
    "factors_kernel": 0,
    "tucker2_pack_kernel": 0,
    "tucker2_ampere_kernel": 163 * 1024,
    "tucker2_hopper_kernel": SHARED_LIMIT,
}
# Kernels that are empty on every other architecture, and the instructions that kernels must show.
ONLY_ON = {"tucker2_hopper_kernel": "sm_90a"}
WANTED = {"tucker2_hopper_kernel": "hgmma", "tucker2_ampere_kernel": "hmma"}
# Triton kernels that must show either, but where float32 is multiplied as it is.
TENSOR = {"depthwise_kernel", "depthwise_input_kernel", "depthwise_weights_kernel"}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Sizes are bytes; hmma and hgmma count instructions in the machine code."""

    source: str
    kernel: str
    variant: str
    arch: str
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    hmma: int
    hgmma: int


def tool(name: str) -> str:
    """A CUDA binary tool: the one that ships inside triton, else the one on PATH; empty where there is none."""
    spec = find_spec("triton")
    if spec and spec.origin:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if inside.exists():
            return str(inside)
    return shutil.which(name) or ""


def tensor_instructions(cubin: Path) -> dict[str, tuple[int, int]]:
    """(HMMA, HGMMA) instructions of each function of a cubin; nothing where cuobjdump is missing or cannot read it."""
    cuobjdump = tool("cuobjdump")
    if not cuobjdump:
        return {}
    path = os.pathsep.join((str(Path(cuobjdump).parent), os.environ.get("PATH", "")))
    dump = subprocess.run(
        [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    parts = re.split(r"Function : (\S+)", dump.stdout)
    return {
        name: (len(re.findall(r"\bHMMA\b", code)), len(re.findall(r"\bHGMMA\b", code)))
        for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled, local and static shared bytes of each entry function, from `ptxas -v`."""
    found: dict[str, dict[str, int]] = {}
    for name, text in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL
    ):

        def number(pattern: str, text: str = text) -> int:
            return sum(int(n) for n in re.findall(pattern, text))

        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill"),
            "local_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


def demangle(names: list[str]) -> dict[str, str]:
    """Kernel names as `kernel<arguments>`, where c++filt is installed; else as they are."""
    if not shutil.which("c++filt") or not names:
        return {name: name for name in names}
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    # Casts of template arguments, and the namespaces of the kernel and of its arguments.
    dropped = r"\((int|bool)\)|\(anonymous namespace\)::|\w+::"
    return {
        name: re.sub(r"\(.*", "", re.sub(dropped, "", line)).removeprefix("void ")
        for name, line in zip(names, plain.splitlines(), strict=True)
    }


def cuda_rows(nvcc: str, archs: list[str], folder: Path) -> list[Row]:
    """Compile every .cu of csrc for every architecture."""
    running = []
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        for arch in archs:
            cubin = folder / f"{source.stem}_{arch}.cubin"
            command = [
                nvcc,
                "-cubin",
                f"-arch={arch}",
                "-O3",
                "-Xptxas=-v",
                f"-I{ROOT / 'csrc'}",
                str(source),
                "-o",
                str(cubin),
            ]
            running.append((arch, cubin, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    rows = []
    for arch, cubin, process in running:
        log = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"nvcc could not compile {cubin.stem}:\n{log}")
        if "wgmma.mma_async instructions are serialized" in log:
            raise SystemExit(f"the assembler serialises the tensor cores' work in {cubin.stem}:\n{log}")
        resources, tensor = parse_ptxas(log), tensor_instructions(cubin)
        names = demangle(list(resources))
        for mangled, values in resources.items():
            kernel, _, variant = names[mangled].partition("<")
            if ONLY_ON.get(kernel, arch) != arch:
                continue
            values["shared_bytes"] += DYNAMIC_SHARED.get(kernel, 0)
            hmma, hgmma = tensor.get(mangled, (0, 0))
            rows.append(Row("cuda", kernel, variant.rstrip(">"), arch, **values, hmma=hmma, hgmma=hgmma))
    return rows


def triton_rows(archs: list[str], folder: Path) -> list[Row]:
    """Compile every entry of every KERNELS table for every architecture and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrank import _native

    pending: list[Future[Row]] = []
    pool = ThreadPoolExecutor(os.cpu_count())  # for the assembler, which is a process of its own
    for jit, elements, others, constants, multiples in (
        entry for path in kernel_files() for entry in getattr(_native.triton_kernels(path.stem), "KERNELS", ())
    ):
        for dtype, constant, whole in itertools.product(DTYPES if elements else DTYPES[:1], constants, (True, False)):
            if not whole and (dtype != "fp32" or not multiples):
                continue  # that odd sizes cost no spills is shown in the widest dtype
            if dtype not in constant.get("DTYPES", DTYPES):
                continue  # sizes of blocks that are launched with other dtypes
            least = constant.get("LEAST", 0)  # the compute capability, ten times, that they are launched from
            constant = {k: v for k, v in constant.items() if k not in ("DTYPES", "LEAST")}
            constexprs = {k: v for k, v in constant.items() if k in jit.arg_names}
            options = {k: v for k, v in constant.items() if k not in jit.arg_names}
            types = {**dict.fromkeys(elements, f"*{dtype}"), **others}
            signature = {name: types.get(name, "constexpr") for name in jit.arg_names}
            # What the launcher would find out: torch's tensors are 16-byte aligned. Without it nothing is vectorised.
            divisible = {name for name, t in signature.items() if t.startswith("*")} | set(multiples if whole else ())
            attrs = {(jit.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
            source = ASTSource(jit, signature, {(jit.arg_names.index(k),): v for k, v in constexprs.items()}, attrs)
            variant = ", ".join([dtype, *(f"{k}={int(v)}" for k, v in constant.items())]) + (
                "" if whole else ", odd size"
            )
            for arch in archs:
                target = GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32)
                if target.arch < least:
                    continue
                compiled = triton.compile(source, target=target, options=options)
                pending.append(
                    pool.submit(triton_row, compiled, jit.__name__, variant, arch, folder / str(len(pending)))
                )
    with pool:
        return [future.result() for future in pending]


def triton_row(compiled: object, kernel: str, variant: str, arch: str, folder: Path) -> Row:
    """Assemble once more, verbosely: triton keeps the machine code but not what ptxas said."""
    from triton.backends.nvidia.compiler import get_ptxas

    folder.mkdir()
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])  # type: ignore[attr-defined]
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    assert target is not None
    # Triton carries more than one assembler; only the one it would take itself reads the PTX version it wrote.
    assembler = get_ptxas(int(re.sub(r"\D", "", arch))).path
    command = [assembler, "-v", f"-arch={target[1]}", str(ptx), "-o", str(cubin)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (values,) = parse_ptxas(log).values()
    values["shared_bytes"] = compiled.metadata.shared  # type: ignore[attr-defined]
    (counts,) = tensor_instructions(cubin).values() or [(0, 0)]
    return Row("triton", kernel, variant, arch, **values, hmma=counts[0], hgmma=counts[1])


def kernel_files() -> list[Path]:
    return sorted(path for path in (ROOT / "triton_kernels").glob("*.py") if path.stem != "__init__")


def kernels_in_source() -> dict[str, set[str]]:
    """The names of all kernels: @triton.jit functions (a leading underscore marks a helper) and __global__ ones."""
    triton_names = set()
    for path in kernel_files():
        if path.stem == "common":  # what kernels call
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                triton_names.add(node.name)
    cuda_names = set()
    for path in (ROOT / "csrc").rglob("*.cu*"):
        code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        cuda_names |= set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", code))
    return {"triton": triton_names, "cuda": cuda_names}


def problems(rows: list[Row], skipped: dict[str, str]) -> list[str]:
    """Everything that is wrong, one sentence each."""
    found = []
    for row in rows:
        where = f"{row.source} {row.kernel} ({row.variant}) on {row.arch}"
        if row.spill_bytes:
            found.append(f"{where} spills {row.spill_bytes} bytes")
        if row.local_bytes:
            found.append(f"{where} uses {row.local_bytes} bytes of local memory")
        if row.registers > REGISTER_LIMIT:
            found.append(f"{where} uses {row.registers} registers")
        if (wanted := WANTED.get(row.kernel)) and not getattr(row, wanted):
            found.append(f"{where} has no {wanted.upper()} in its machine code")
        if row.kernel in TENSOR and "TF32=0" not in row.variant and not (row.hmma or row.hgmma):
            found.append(f"{where} has no tensor-core instructions in its machine code")
        if row.shared_bytes > SHARED_LIMIT:
            found.append(f"{where} needs {row.shared_bytes} bytes of shared memory, of {SHARED_LIMIT}")
    for source, names in kernels_in_source().items():
        listed = {row.kernel for row in rows if row.source == source}
        found += [f"{source} {name} is not in the table" for name in sorted(names - listed) if source not in skipped]
    undeclared = kernels_in_source()["cuda"] - set(DYNAMIC_SHARED)
    return found + [f"cuda {name} has no entry in DYNAMIC_SHARED" for name in sorted(undeclared)]


def report(archs: list[str]) -> tuple[list[Row], dict[str, str]]:
    """All rows, and for each source that could not be compiled here the reason."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if Path(nvcc).exists():
            rows += cuda_rows(nvcc, archs, folder)
        else:
            skipped["cuda"] = "no nvcc was found on PATH or in CUDA_HOME"
        if find_spec("triton"):
            rows += triton_rows(archs, folder)
        else:
            skipped["triton"] = "the triton package is not installed"
    return rows, skipped


def show(rows: list[Row]) -> None:
    """A table, by rich where it is installed."""
    heads = ("source", "kernel", "variant", "arch", "regs", "spills", "local", "shared", "HMMA", "HGMMA")
    lines = [tuple(str(value) for value in asdict(row).values()) for row in rows]
    if find_spec("rich"):
        rich_table, rich_console = importlib.import_module("rich.table"), importlib.import_module("rich.console")
        table = rich_table.Table()
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i > 3 else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console = rich_console.Console()
        (console if console.is_terminal else rich_console.Console(width=160)).print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    for line in (heads, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80,sm_90a", help="architectures, separated by commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    archs = options.arch.split(",")
    if wrong := [arch for arch in archs if not re.fullmatch(r"sm_\d+[af]?", arch)]:
        parser.error(f"--arch must be a list such as sm_80,sm_90a, got {wrong[0]!r}")
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    sys.path.insert(0, str(ROOT))
    rows, skipped = report(archs)
    wrong = problems(rows, skipped)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "skipped": skipped, "problems": wrong}, indent=1))
        return bool(wrong)
    show(rows)
    for source, reason in skipped.items():
        print(f"{source} kernels were not compiled: {reason}")
    for line in wrong:
        print(f"PROBLEM: {line}")
    print(f"{len(rows)} kernels compiled, {len(wrong)} problems")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
