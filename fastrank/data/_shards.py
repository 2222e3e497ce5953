"""Images in tar files of WebDataset's form, read where they lie: one look at the headers, then image by image."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastrank import _checks, _files

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABELS = ("cls", "cls.txt")
MAX_LABEL = 64
"""Bytes of the longest file that is read as a label."""
MAX_OPEN = 256
"""Shards that a process has open at a time; systems commonly allow 1,024 files."""
KEY = "fastrank.shards"


class TarSet(Dataset[tuple[Tensor, int]]):
    """Labelled images in tar files, map-style: any image can be read at any time, none is kept.

    A sample is two members next to each other of one name up to the first dot, such as ``n01440764_10026.jpg`` and
    ``n01440764_10026.cls`` (the label as digits); members of other endings are passed over. Images come by shard, and
    within it in the order of the members. The headers are read once, when the set is made: 24 bytes
    an image stay in memory. index: a file that keeps them for the next time, for as long as the shards have the same
    names, sizes and times. transform: maps a PIL image to a float tensor of `shape` (C, H, W).

    Raises FileNotFoundError for an absent shard, ValueError, naming shard and member, for one that is compressed,
    damaged, or has an image without a label or a label that is no number from 0 on.
    """

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        transform: Any,
        shape: tuple[int, int, int],
        *,
        classes: int | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        self.shards = [Path(shard) for shard in shards]
        if not self.shards:
            raise _checks.fail("shards", "at least one tar file", "none")
        for shard in self.shards:
            if not shard.is_file():
                raise FileNotFoundError(f"shards must be tar files, got {shard}, which does not exist")
        self.shape, self._transform = shape, transform
        # Arrays, not lists: the processes of a loader share them as long as nobody counts references in them.
        self._entries = _indexed(self.shards, index)
        if not len(self._entries):
            raise _checks.fail("shards", f"tar files with images ({', '.join(IMAGES)}) and labels", "none of them")
        largest = int(self._entries["label"].max())
        self.classes = largest + 1 if classes is None else _checks.integer("classes", classes, 1)
        if largest >= self.classes:
            raise _checks.fail("classes", f"above the largest label, {largest}", classes)
        self._open: tuple[int, dict[int, int]] = (0, {})

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One transformed image (C, H, W) and its label."""
        from PIL import Image

        entry = self._entries[index]
        shard = int(entry["shard"])
        data = os.pread(self._descriptor(shard), int(entry["size"]), int(entry["offset"]))
        try:
            with Image.open(io.BytesIO(data)) as file:
                image = file.convert("RGB")
        # What Pillow raises for broken files differs by format; a bomb is an image of more pixels than it unpacks.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            where = f"{self.shards[shard]}, image number {index} at byte {int(entry['offset'])} ({error})"
            raise _checks.fail("shards", "tar files of images that Pillow can read", where) from error
        return self._transform(image), int(entry["label"])

    def _descriptor(self, shard: int) -> int:
        """The open shard, opened by each process for itself."""
        if self._open[0] != os.getpid():
            self._open = os.getpid(), {}
        opened = self._open[1]
        if shard not in opened:
            if len(opened) == MAX_OPEN:
                os.close(opened.pop(next(iter(opened))))
            opened[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, {})}

    def __del__(self) -> None:
        process, opened = self.__dict__.get("_open", (0, {}))
        if process == os.getpid():
            for descriptor in opened.values():
                os.close(descriptor)


_ENTRY = numpy.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("shard", "<i4")])


def _indexed(shards: list[Path], index: str | os.PathLike[str] | None) -> Any:
    """The entries of all shards: from `index` where that is of these files, else from their headers, and kept there."""
    facts = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards])
    if index is not None and Path(index).exists():
        tensors, metadata = _files.load_tensors(index)
        kept = tensors.get("entries")
        if KEY not in metadata or kept is None or kept.dtype != torch.uint8 or kept.numel() % _ENTRY.itemsize:
            raise _checks.fail("index", "a file that fastrank keeps an index in, or free", index)
        if metadata[KEY] == facts:
            found = numpy.frombuffer(kept.numpy().tobytes(), _ENTRY)
            if not _inside(found, [path.stat().st_size for path in shards]):
                raise _checks.fail("index", "of images that lie within the shards (remove it)", index)
            return found
    entries = numpy.concatenate([_entries(shard, number) for number, shard in enumerate(shards)])
    if index is not None:
        _files.save_tensors(index, {"entries": torch.from_numpy(entries.view(numpy.uint8).copy())}, {KEY: facts})
    return entries


def _inside(entries: Any, sizes: list[int]) -> bool:
    """Whether every entry names one of the shards, of these sizes in bytes, and a place in it."""
    shard, offset, size = (entries[name].astype(numpy.int64) for name in ("shard", "offset", "size"))
    if not bool(((shard >= 0) & (shard < len(sizes)) & (offset >= 0) & (size >= 0) & (entries["label"] >= 0)).all()):
        return False
    return bool((offset <= numpy.array(sizes, dtype=numpy.int64)[shard] - size).all())


def _entries(shard: Path, number: int) -> Any:
    """Where the images of one shard lie, and their labels."""
    found: list[tuple[int, int, int, int]] = []
    name, image, label = "", None, None
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=_Within(file), mode="r:") as tar:
            size = os.fstat(file.fileno()).st_size
            at = -1
            for member in tar:
                if not at < member.offset_data or (member.isreg() and not _holds(member, size)):
                    raise tarfile.TarError(f"{member.name[:80]!r} does not lie within it")
                at = member.offset_data
                # The headers of all members, which it would otherwise keep.
                tar.members = []  # type: ignore[attr-defined]
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}"
                if key != name:
                    _whole(shard, name, image, label)
                    name, image, label = key, None, None
                if ending.lower() in IMAGES:
                    image = (member.offset_data, member.size)
                elif ending.lower() in LABELS:
                    text = os.pread(file.fileno(), MAX_LABEL, member.offset_data)
                    label = _label(shard, member.name, text, member.size)
                if image is not None and label is not None:
                    found.append((*image, label, number))
                    name = ""
            _whole(shard, name, image, label)
    except tarfile.TarError as error:
        raise _checks.fail("shards", "whole, uncompressed tar files", f"{shard} ({error})") from error
    return numpy.array(found, dtype=_ENTRY)


def _holds(member: tarfile.TarInfo, size: int) -> bool:
    """Whether a tar file of so many bytes holds all of a member's."""
    return 0 <= member.size <= size - member.offset_data and not member.issparse()


class _Within(io.RawIOBase):
    """A file for `tarfile`, which would make room for as many bytes as a header claims and go back where it says so."""

    def __init__(self, file: Any) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size if 0 <= size <= self.size else self.size)
        return data

    def tell(self) -> int:
        place: int = self.file.tell()
        return place

    def seek(self, place: int, whence: int = 0) -> int:
        if not 0 <= place <= 2 * self.size + tarfile.RECORDSIZE:
            raise tarfile.ReadError("a header points out of it")
        found: int = self.file.seek(place, whence)
        return found


def _whole(shard: Path, name: str, image: Any, label: Any) -> None:
    if name and (image is None) != (label is None):
        what = "an image without a label" if label is None else "a label without an image"
        found = f"{shard}, {_shown(name.strip('/'))}: {what}"
        raise _checks.fail("shards", "tar files of images with a label each (.cls)", found)


def _label(shard: Path, name: str, data: bytes, size: int) -> int:
    text = data[:size].strip()
    if size > MAX_LABEL or not re.fullmatch(rb"\d{1,9}", text):
        raise _checks.fail("shards", "tar files with labels of digits", f"{shard}, {_shown(name)}: {text[:20]!r}")
    return int(text)


def _shown(name: str) -> str:
    """A member's name for a message, in which a line ends where the message does."""
    return name.encode("unicode_escape").decode("ascii")


def shards_of(root: str | os.PathLike[str] | None, split: str) -> list[Path]:
    """The shards of a split, "train" or "test", by name: ``root/train/*.tar`` or ``root/*train*.tar``; test: "val"."""
    words = ("train",) if split == "train" else ("val", "test")
    wanted = f"the folder that holds {words[0]}/*.tar or *{words[0]}*.tar"
    if root is None:
        raise _checks.fail("root", wanted, None)
    for word in words:
        for folder, pattern in ((Path(root) / word, ".tar"), (Path(root), ".tar")):
            names = os.listdir(folder) if folder.is_dir() else []
            inside = folder != Path(root)
            found = sorted(name for name in names if name.endswith(pattern) and (inside or word in name))
            if found:
                return [folder / name for name in found]
    raise FileNotFoundError(f"root must be {wanted}, got {root}, which has none")
