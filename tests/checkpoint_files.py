"""Checkpoints on disk, as tests compare them: whole or not, how far they got, equal but for times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrank import _files
from fastrank.train._checkpoint import KEY
from fastrank.train._place import CHECKPOINT, POINTER

Contents = tuple[dict[str, Tensor], dict[str, Any]]


def contents(folder: Path) -> Contents | None:
    """Tensors and header of the checkpoint of a run, each checked against its checksums; None where there is none.

    The tensors of several ranks bear their shard's name as well. Raises ValueError or OSError where it is not whole.
    """
    if (folder / POINTER).exists():
        inside = folder / json.loads((folder / POINTER).read_bytes())["folder"]
        header = json.loads((inside / "header.json").read_bytes())
        tensors = {}
        for shard, digest in header["files"].items():
            if hashlib.sha256((inside / shard).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{inside / shard} does not match its checksum")
            tensors.update({f"{shard}/{name}": tensor for name, tensor in _shard(inside / shard).items()})
        return tensors, header
    if not (folder / CHECKPOINT).exists():
        return None
    tensors, metadata = _files.load_tensors(folder / CHECKPOINT)
    return tensors, json.loads(metadata[KEY])


def _shard(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def step_of(folder: Path) -> int:
    """The optimizer steps that the checkpoint of a run holds, 0 where there is none; errors as in `contents`."""
    found = contents(folder)
    return 0 if found is None else int(found[1]["step"])


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(_bits(left[name]), _bits(right[name]))
        for name in left
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def same(left: Path, right: Path) -> bool:
    """Two checkpoints agree in every bit of every tensor and in the header, but for times and files' checksums."""
    found = []
    for folder in (left, right):
        read = contents(folder)
        assert read is not None, f"{folder} holds no checkpoint"
        tensors, header = read
        del header["seconds"]
        header.pop("files", None)  # a shard's header tells its tensors in an order that may differ
        for row in header["history"]:
            del row["seconds"]
        found.append((tensors, header))
    (one, first), (other, second) = found
    return equal(one, other) and first == second
