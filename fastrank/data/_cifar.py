"""CIFAR-10 and CIFAR-100 from disk, in their binary and in their Python format."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrank import _checks
from fastrank.data._pickled import read_arrays
from fastrank.data._sets import ImageSet, check_labels

PIXELS = 3 * 32 * 32
Numbers = Sequence[float]
Arrays = tuple[Tensor, Tensor]
Root = str | os.PathLike[str] | None


@dataclass(frozen=True)
class _Layout:
    """Where one of the two sets keeps what. The fine label is the last byte before the pixels of a binary record."""

    classes: int
    binary_folder: str
    python_folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    label_key: str
    mean: Numbers
    std: Numbers


_CIFAR10 = _Layout(
    classes=10,
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    label_bytes=1,
    label_key="labels",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = _Layout(
    classes=100,
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    train=("train",),
    test=("test",),
    label_bytes=2,
    label_key="fine_labels",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar10(
    root: Root, split: str, mean: Numbers | None = None, std: Numbers | None = None, size: int | None = None
) -> ImageSet:
    """CIFAR-10 as uint8 pixels (N, 3, 32, 32); mean and std as fractions of 255, size as in `ImageSet`."""
    return _read(_CIFAR10, root, split, mean, std, size)


def cifar100(
    root: Root, split: str, mean: Numbers | None = None, std: Numbers | None = None, size: int | None = None
) -> ImageSet:
    """CIFAR-100, fine labels, as uint8 pixels (N, 3, 32, 32); the options are those of `cifar10`."""
    return _read(_CIFAR100, root, split, mean, std, size)


def _read(
    layout: _Layout, root: Root, split: str, mean: Numbers | None, std: Numbers | None, size: int | None
) -> ImageSet:
    names = layout.train if split == "train" else layout.test
    folder, suffix, read = _find(layout, root, names[0])
    parts = []
    for name in names:
        path = folder / (name + suffix)
        if not path.is_file():
            raise FileNotFoundError(f"root must hold {path}, which does not exist")
        parts.append(read(path, layout))
    pixels, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    scaled = [
        torch.as_tensor(default if given is None else given, dtype=torch.float32) * 255
        for given, default in ((mean, layout.mean), (std, layout.std))
    ]
    pixels = pixels.view(-1, 3, 32, 32)
    return ImageSet(pixels, labels, classes=layout.classes, mean=scaled[0], std=scaled[1], size=size)


def _find(layout: _Layout, root: Root, first: str) -> tuple[Path, str, Callable[[Path, _Layout], Arrays]]:
    """The folder that holds the split, the suffix of its files and their reader; `root` itself may be the folder."""
    wanted = f"the folder that is or holds {layout.binary_folder} or {layout.python_folder}"
    if root is None:
        raise _checks.fail("root", wanted, None)
    root = Path(root)
    for inner, suffix, read in ((layout.binary_folder, ".bin", _binary), (layout.python_folder, "", _python)):
        for folder in (root / inner, root):
            if (folder == root and (root / (first + suffix)).is_file()) or (folder != root and folder.is_dir()):
                return folder, suffix, read
    problem = "which has neither" if root.is_dir() else "which is not a folder"
    raise FileNotFoundError(f"root must be {wanted}, got {root}, {problem}")


def _binary(path: Path, layout: _Layout) -> Arrays:
    """Records of one label byte (CIFAR-100: coarse, fine) and 3,072 bytes: red, green, blue planes by rows."""
    record = layout.label_bytes + PIXELS
    data = path.read_bytes()
    if not data or len(data) % record:
        raise _checks.fail(f"the size of {path}", f"a positive multiple of {record} bytes", len(data))
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, record)
    labels = records[:, layout.label_bytes - 1].to(torch.int64)
    check_labels(f"labels in {path}", labels, layout.classes)
    return records[:, layout.label_bytes :].contiguous(), labels


def _python(path: Path, layout: _Layout) -> Arrays:
    """A pickled dictionary with "data", (N, 3072) uint8, and a list of labels."""
    content = read_arrays(path)
    pixels, labels = content.get("data"), content.get(layout.label_key)
    if not isinstance(pixels, Tensor) or pixels.dim() != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        got = f"one of shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise _checks.fail(f"'data' in {path}", f"a uint8 array of shape (N, {PIXELS})", got)
    if not isinstance(labels, list) or len(labels) != len(pixels) or any(type(label) is not int for label in labels):
        got = f"{len(labels)} items" if isinstance(labels, list) else type(labels).__name__
        raise _checks.fail(f"{layout.label_key!r} in {path}", f"a list of {len(pixels)} ints", got)
    if not 0 <= min(labels) <= max(labels) < layout.classes:
        raise _checks.fail(f"labels in {path}", f"between 0 and {layout.classes - 1}", [min(labels), max(labels)])
    return pixels, torch.tensor(labels, dtype=torch.int64)
