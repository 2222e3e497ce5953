"""MNIST from disk in its IDX format, plain or gzipped (Fashion-MNIST and KMNIST have the same files)."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastrank import _checks
from fastrank.data._sets import ImageSet, check_labels

SIDE = 28
Root = str | os.PathLike[str] | None
Numbers = Sequence[float]

_PREFIXES = {"train": "train", "test": "t10k"}
# Magic number: two zero bytes, 8 for unsigned bytes, the number of dimensions.
_MAGIC = {1: b"\x00\x00\x08\x01", 3: b"\x00\x00\x08\x03"}
_MAX_RECORDS = 1_000_000
_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for at most
_MEAN, _STD = 0.1307, 0.3081


def mnist(
    root: Root,
    split: str,
    size: int | None = None,
    channels: int = 1,
    mean: Numbers | float | None = None,
    std: Numbers | float | None = None,
) -> ImageSet:
    """MNIST as uint8 pixels (N, channels, 28, 28); mean and std as fractions of 255, size as in `ImageSet`.

    `root` is, or holds as "MNIST/raw", "mnist" or "MNIST", the folder of the four files. channels: 1, or 3 equal ones.
    """
    if channels not in (1, 3):
        raise _checks.fail("channels", "1 or 3", channels)
    folder = _find(root, split)
    images, labels = (_read(folder, split, kind, dims) for kind, dims in (("images", 3), ("labels", 1)))
    if len(images) != len(labels):
        raise _checks.fail(f"the labels in {folder}", f"{len(images)}, one an image", len(labels))
    labels = labels.to(torch.int64)
    check_labels(f"labels in {folder}", labels, 10)
    numbers = [
        [255 * value] * channels if isinstance(value, int | float) else [255 * number for number in value]
        for value in (_MEAN if mean is None else mean, _STD if std is None else std)
    ]
    # Equal channels share their memory; a batch of them is copied when it is gathered.
    pixels = images[:, None].expand(-1, channels, -1, -1)
    return ImageSet(pixels, labels, classes=10, mean=numbers[0], std=numbers[1], size=size)


def _names(split: str, kind: str, dims: int) -> list[str]:
    """The file's published name and the one of other copies, each plain and gzipped."""
    stem = f"{_PREFIXES[split]}-{kind}"
    return [f"{stem}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]


def _find(root: Root, split: str) -> Path:
    names = _names(split, "images", 3)
    wanted = f"the folder that is or holds MNIST's files, such as {names[0]} or {names[1]}"
    if root is None:
        raise _checks.fail("root", wanted, None)
    root = Path(root)
    for folder in (root, root / "MNIST" / "raw", root / "mnist", root / "MNIST"):
        if any((folder / name).is_file() for name in names):
            return folder
    problem = "which has none" if root.is_dir() else "which is not a folder"
    raise FileNotFoundError(f"root must be {wanted}, got {root}, {problem}")


def _read(folder: Path, split: str, kind: str, dims: int) -> Tensor:
    """The bytes of one file, (N, 28, 28) or (N,), checked against its header to the last one."""
    names = _names(split, kind, dims)
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"root must hold {folder / names[0]}, plain or gzipped, which does not exist")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
            whole = len(header) == 4 + 4 * dims and header[:4] == _MAGIC[dims]
            if not whole or sizes[1:] != [SIDE] * (dims - 1) or not 0 < sizes[0] <= _MAX_RECORDS:
                expected = f"an IDX header of {'N×28×28' if dims == 3 else 'N'} bytes"
                raise _checks.fail(f"the first bytes of {path}", expected, header.hex() or "none")
            count = sizes[0] * SIDE ** (2 * (dims == 3))
            # Memory is asked for only where the file can fill it.
            most = path.stat().st_size * (_DEFLATED if path.suffix == ".gz" else 1)
            data = file.read(min(count, most) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _checks.fail(str(path), "a whole gzip file", f"one that cannot be read: {error}") from error
    if len(data) != count:
        raise _checks.fail(f"the data in {path}", f"{count} bytes long, as its header says", _length(data, count))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, *[SIDE] * (dims - 1))


def _length(data: bytes, count: int) -> str:
    return "more" if len(data) > count else str(len(data))
