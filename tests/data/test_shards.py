"""Tar shards of WebDataset's form: read in any order, never held in memory, refused where they are not whole."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastrank import _files
from fastrank.data import TarSet, _shards, batches, load

Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def picture(number: int, side: int = 4) -> bytes:
    """A PPM file of noise."""
    pixels = numpy.random.RandomState(number).bytes(3 * side * side)
    return f"P6 {side} {side} 255\n".encode() + pixels


def samples(first: int, count: int, side: int = 4) -> Members:
    members: Members = []
    for number in range(first, first + count):
        members += [(f"./{number:06d}.cls", str(number % 7).encode()), (f"./{number:06d}.ppm", picture(number, side))]
    return members


def pixels(image: Any) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()


def expected(number: int, side: int = 4) -> Tensor:
    data = torch.tensor(list(picture(number, side)[-3 * side * side :]), dtype=torch.float32)
    return data.view(side, side, 3).permute(2, 0, 1)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"{n}.tar", samples(5 * n, 5)) for n in range(3)]


def test_images_and_labels_in_the_order_of_the_shards(shards: list[Path]) -> None:
    data = TarSet(shards, pixels, (3, 4, 4))
    assert (len(data), data.classes, data.shape) == (15, 7, (3, 4, 4))
    for number in (14, 0, 7, 7):
        image, label = data[number]
        assert torch.equal(image, expected(number))
        assert label == number % 7
    assert TarSet(shards, pixels, (3, 4, 4), classes=9).classes == 9


def test_agrees_with_webdataset(shards: list[Path]) -> None:
    wds = pytest.importorskip("webdataset", reason="the package whose format this is")
    data = TarSet(shards, pixels, (3, 4, 4))
    theirs = wds.WebDataset([str(path) for path in shards], shardshuffle=False).to_tuple("ppm", "cls")
    for (image, label), own in zip(theirs, data, strict=False):
        assert int(label) == own[1]
        assert list(image[-48:]) == own[0].permute(1, 2, 0).flatten().int().tolist()


def test_other_members_and_folders(tmp_path: Path) -> None:
    members = [
        ("a/1.json", b"{}"),
        ("a/1.PPM", picture(1)),
        ("a/1.txt", b"x"),
        ("a/1.cls", b" 3\n"),
        ("b/1.cls", b"2"),
        ("b/1.seg.png", b"none of ours"),
        ("b/1.ppm", picture(2)),
        ("readme.md", b"hello"),
    ]
    data = TarSet([write(tmp_path / "x.tar", members)], pixels, (3, 4, 4))
    assert [label for _, label in (data[0], data[1])] == [3, 2]
    assert torch.equal(data[1][0], expected(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_any_epoch_are_the_same_in_parts(shards: list[Path], workers: int) -> None:
    data = TarSet(shards, pixels, (3, 4, 4))
    options: dict[str, Any] = {"seed": 3, "epoch": 2, "shuffle": True, "workers": workers}
    whole = list(batches(data, 4, **options))
    parts = [list(batches(data, 4, start=1, part=(rank, 2), **options)) for rank in range(2)]
    for (images, labels), *found in zip(whole[1:], *parts, strict=True):
        assert torch.equal(torch.cat([part[0] for part in found]), images)
        assert torch.equal(torch.cat([part[1] for part in found]), labels)


def test_an_index_is_kept_and_used_while_the_shards_stay(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index.safetensors"
    first = TarSet(shards, pixels, (3, 4, 4), index=index)
    with monkeypatch.context() as patch:
        patch.setattr(_shards, "_entries", None)
        again = TarSet(shards, pixels, (3, 4, 4), index=index)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=False))
    write(shards[1], samples(50, 2))
    assert len(TarSet(shards, pixels, (3, 4, 4), index=index)) == 12
    _files.save_tensors(index, {"entries": torch.zeros(3)})
    with pytest.raises(ValueError, match="index must be a file that fastrank keeps an index in, or free"):
        TarSet(shards, pixels, (3, 4, 4), index=index)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda p: write(p, samples(0, 2), "w:gz"), "must be whole, uncompressed tar files"),
    "no tar": (lambda p: p.write_bytes(b"x" * 2000), "must be whole, uncompressed tar files"),
    "cut": (lambda p: p.write_bytes(write(p, samples(0, 9, 40)).read_bytes()[:-12000]), "whole, uncompressed"),
    "no label": (lambda p: write(p, [("1.ppm", picture(1)), *samples(5, 1)]), "1: an image without a label"),
    "no image": (lambda p: write(p, [*samples(5, 1), ("8.cls", b"1")]), "8: a label without an image"),
    "words": (lambda p: write(p, [("1.cls", b"cat")]), r"labels of digits, got .*1\.cls: b'cat'"),
    "negative": (lambda p: write(p, [("1.cls", b"-1")]), "labels of digits"),
    "long": (lambda p: write(p, [("1.cls", b"1" * 70)]), "labels of digits"),
    "empty": (lambda p: write(p, []), "images .* and labels, got none of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_shard(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    make(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=message):
        TarSet([tmp_path / "x.tar"], pixels, (3, 4, 4))


def test_other_refusals(tmp_path: Path, shards: list[Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"shards must be tar files, got .*no\.tar, which does not exist"):
        TarSet([tmp_path / "no.tar"], pixels, (3, 4, 4))
    with pytest.raises(ValueError, match="classes must be above the largest label, 6, got 3"):
        TarSet(shards, pixels, (3, 4, 4), classes=3)
    with pytest.raises(ValueError, match="shards must be at least one tar file, got none"):
        TarSet([], pixels, (3, 4, 4))
    path = write(tmp_path / "bad.tar", [("1.ppm", b"P6 no"), ("1.cls", b"0")])
    with pytest.raises(ValueError, match=r"images that Pillow can read, got .*bad\.tar, image number 0 at byte 512"):
        TarSet([path], pixels, (3, 4, 4))[0]
    with pytest.raises(FileNotFoundError, match=r"root must be the folder that holds train/\*\.tar or \*train\*\.tar"):
        load("webdataset", root=tmp_path / "none")
    with pytest.raises(ValueError, match="root must be the folder that holds val/"):
        load("webdataset", split="test")


def test_by_name(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "a.tar", samples(0, 3, 40))
    write(tmp_path / "imagenet-validation-00.tar", samples(3, 2, 40))
    train = load("webdataset", root=tmp_path, size=16, classes=7, index=tmp_path)
    test = load("webdataset", root=tmp_path, split="test", size=16, classes=7)
    assert (len(train), len(test)) == (3, 2)
    assert train[0][0].shape == test[0][0].shape == train.shape == (3, 16, 16)
    assert (tmp_path / "train.index.safetensors").exists()


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "MAX_OPEN", 2)
    data = TarSet([write(tmp_path / f"{n}.tar", samples(n, 1)) for n in range(4)], pixels, (3, 4, 4))
    for number in (0, 1, 2, 3, 0, 2):
        assert torch.equal(data[number][0], expected(number))
        assert len(data._open[1]) <= 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory that is in use from /proc")
def test_no_more_than_a_batch_is_in_memory(tmp_path: Path) -> None:
    """60 MB of images pass through; what is in use grows by less than a fifth of that."""
    side, count = 256, 76
    paths = [write(tmp_path / f"{n}.tar", samples(count * n, count, side)) for n in range(4)]
    size = sum(path.stat().st_size for path in paths)
    assert size > 55e6

    def in_use() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    data = TarSet(paths, lambda image: pixels(image)[:, ::8, ::8].contiguous(), (3, 32, 32))
    source = batches(data, 8, shuffle=True)
    next(source)
    before = most = in_use()
    for _ in source:
        most = max(most, in_use())
    assert most - before < size / 5
    assert data._entries.nbytes < 30 * len(data)
