"""`onnx`: a compressed network as one ONNX file of plain convolutions."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank._atomic import require_place, write_atomically
from fastrank.export._trace import Traced, compare, first_line, quiet, trace

OPSETS = range(18, 24)
"""Versions of the ONNX operator set that `onnx` can write."""
# Protocol buffers end at 2 GiB; what is not weights (the graph and its names) has ample room in the rest.
MAX_WEIGHTS = 2**31 - 2**26


def onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    opset: int = OPSETS[0],
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write `model` in eval mode to one ONNX file, atomically; factored layers become plain convolutions (`lowered`).

    The file's inputs are called "input" and its outputs "output", or "input_0", "input_1", ... where there are
    several, in the order in which the network takes and gives them.

    Args:
        model: any network from tensors to tensors, compressed or not, fused for inference or not; it is left as it is.
        path: ends in .onnx.
        example_input: the input of `model`, or a tuple of its positional inputs.
        opset: version of the operator set, one of `OPSETS`.
        dynamic_batch: leave the first size of all inputs that share it open; the other sizes are the example's.
        check: run the file by ONNX Runtime, on the example and on a batch of another size, and compare: outputs may
            differ by 1e-4 of the largest, in float16 by half of the digits.

    Raises TypeError or ValueError, naming the argument, ImportError where a package is missing (extra "onnx"), OSError
    where the file cannot be written, and RuntimeError where the outputs differ. Nothing is written then.
    """
    place = require_place(path, ".onnx")
    _checks.integer("opset", opset, OPSETS[0], OPSETS[-1])
    packages = ("onnx", "onnxscript", "onnxruntime") if check else ("onnx", "onnxscript")
    *_, last = (_needed(package) for package in packages)
    size = _bytes(model)
    if size > MAX_WEIGHTS:
        raise _checks.fail("model", f"of at most {MAX_WEIGHTS:,} bytes of weights for one ONNX file", f"{size:,}")
    traced = trace(model, example_input, dynamic_batch, "cpu")
    data, inputs = _translated(traced, opset)
    if check:
        _compare(last, traced, data, inputs)
    write_atomically(place, data)


def _translated(traced: Traced, opset: int) -> tuple[bytes, list[str]]:
    """The file's content and the names of its inputs."""
    signature = traced.program.graph_signature
    names = [
        _names(kind, len(values))
        for kind, values in (("input", signature.user_inputs), ("output", signature.user_outputs))
    ]
    try:
        with quiet():
            made: Any = torch.onnx.export(
                traced.program,
                traced.examples[0],
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=tuple({0: "batch"} if one else None for one in traced.free),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        expected = "a network that torch.onnx can translate"
        raise _checks.fail("model", expected, f"{type(traced.plain).__name__}: {first_line(error)}") from error
    written = made.model.opset_imports[""]
    if written != opset:  # the version converter keeps what it cannot convert
        raise _checks.fail("opset", f"{written} for this network, whose operators cannot be converted", opset)
    data: bytes = made.model_proto.SerializeToString()
    return data, names[0]


def _compare(runtime: Any, traced: Traced, data: bytes, inputs: list[str]) -> None:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    # ONNX Runtime's own errors derive from Exception alone, and are found only in a private module.
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    errors = (state.Fail, state.NotImplemented, state.InvalidGraph, state.InvalidArgument, state.RuntimeException)
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except errors as error:
        refusal = f"True, and ONNX Runtime cannot run it on a CPU: {first_line(error)}"
        raise _checks.fail("check", "False for this network", refusal) from error

    def run(*values: Tensor) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
        return [torch.from_numpy(value) for value in found]

    compare(traced, run, "ONNX Runtime")


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{i}" for i in range(count)]


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"export.onnx needs {package}, which is absent: pip install 'fastrank[onnx]'", name=package
        ) from error


def _bytes(model: Any) -> int:
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
