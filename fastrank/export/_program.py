"""`program` and `package`: a compressed network as a `torch.export` program, or compiled ahead of time."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrank._atomic import require_place, write_atomically
from fastrank.export._trace import compare, first_line, quiet, trace


def program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write `model` in eval mode as a program of `torch.export`, atomically; factored layers become plain convolutions.

    ``torch.export.load(path).module()`` runs it, where torch is and fastrank need not be. path ends in .pt2. The other
    arguments, and the errors, are those of `onnx`; the check runs what `torch.export.load` reads.
    """
    place = require_place(path, ".pt2")
    traced = trace(model, example_input, dynamic_batch)
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        torch.export.save(traced.program, buffer)
        if check:
            buffer.seek(0)
            compare(traced, torch.export.load(buffer).module(), "the exported program")
    write_atomically(place, buffer.getvalue())


def package(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Compile `model` in eval mode by AOTInductor and write the package, atomically.

    ``torch._inductor.aoti_load_package(path)`` runs it, where torch is and fastrank need not be, on the kind of device
    and processor that it was compiled for. path ends in .pt2. The other arguments, and the errors, are those of
    `onnx`; RuntimeError too where there is no C++ compiler.
    """
    place = require_place(path, ".pt2")
    _require_compiler()
    traced = trace(model, example_input, dynamic_batch)
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.pt2")
        try:
            torch._inductor.aoti_compile_and_package(traced.program, package_path=file)
        except RuntimeError as error:
            reason = first_line(error)
            raise RuntimeError(f"AOTInductor could not compile {type(model).__name__}: {reason}") from error
        if check:
            compare(traced, torch._inductor.aoti_load_package(file), "the AOTInductor package")
        data = Path(file).read_bytes()
    write_atomically(place, data)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError("export.package needs a C++ compiler, got none: install g++, or name one in CXX") from error
