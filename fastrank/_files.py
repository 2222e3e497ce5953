"""Tensors as safetensors files with a checksum, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastrank import _checks
from fastrank._atomic import write_atomically

CHECKSUM = "sha256"
"""The metadata key that `save_tensors` writes and `load_tensors` takes out again."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and text to one safetensors file, atomically, with a SHA-256 over both in its header.

    Tensors of any shape, dtype, device and stride are stored as contiguous copies, so shared ones lose their tie.
    Raises TypeError or ValueError on what the format cannot hold, OSError where the file cannot be written.
    """
    metadata = dict(metadata or {})
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise _checks.fail_type(f"metadata[{key!r}]", "a str under a str", text)
    if CHECKSUM in metadata:
        raise _checks.fail("metadata", f"without the key {CHECKSUM!r}, which holds the checksum", sorted(metadata))
    copies = {name: _contiguous_copy(name, tensor) for name, tensor in tensors.items()}
    metadata[CHECKSUM] = _digest(copies, metadata)
    write_atomically(path, safetensors.torch.save(copies, metadata))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata that `save_tensors` wrote.

    Raises FileNotFoundError where there is no such file, and ValueError where the file is not safetensors, is cut or
    damaged, or carries no checksum. Never unpickles.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a safetensors file, got {path}, which does not exist")
    if not path.is_file():
        raise _checks.fail("path", "a safetensors file", f"{path}, which is not a file")
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        if data[:1] == b"\x80" or data[:2] == b"PK":  # only now: a header's length may begin with these bytes too
            refusal = f"{path}, a pickle by its first bytes: not opened"
            raise _checks.fail("path", "a safetensors file", refusal) from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _checks.fail("path", "a whole safetensors file", f"{path}: {reason}") from error
    metadata = header.get("__metadata__") or {}
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is None:
        raise _checks.fail("path", "a file that fastrank wrote", f"{path}, whose header holds no {CHECKSUM} checksum")
    if checksum != _digest(tensors, metadata):
        raise _checks.fail("path", "an undamaged file", f"{path}, whose contents do not match their checksum")
    return tensors, metadata


def _contiguous_copy(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise _checks.fail_type(f"tensors[{name!r}]", "a torch.Tensor", tensor)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise _checks.fail(f"tensors[{name!r}]", "a dense tensor with values", f"{tensor.layout} on {tensor.device}")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over everything that loading hands out: text, names, dtypes, shapes and bytes, in sorted order."""
    names = sorted(tensors)
    outline = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), outline]).encode())
    for name in names:
        if tensors[name].numel():
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
