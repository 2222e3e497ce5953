"""MNIST from small IDX files, and images handed out at another size than they are kept in."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastrank import data

COUNT = 6


def pixels(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (COUNT, 28, 28), generator=generator, dtype=torch.uint8)


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


def write(folder: Path, *, zipped: bool = False, dot: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, prefix in enumerate(("train", "t10k")):
        labels = torch.arange(COUNT, dtype=torch.uint8) + seed
        for kind, content in (("images-idx3", idx(pixels(seed))), ("labels-idx1", idx(labels))):
            name = f"{prefix}-{kind}-ubyte".replace("-idx", f"{dot}idx")
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("inner", ["", "MNIST/raw", "mnist", "MNIST"])
@pytest.mark.parametrize(("zipped", "dot"), [(False, "-"), (True, "-"), (False, ".")])
def test_mnist_is_found_and_read(tmp_path: Path, inner: str, zipped: bool, dot: str) -> None:
    write(tmp_path / inner, zipped=zipped, dot=dot)
    for seed, split in enumerate(("train", "test")):
        found = data.load("mnist", root=tmp_path, split=split)
        assert isinstance(found, data.ImageSet)
        assert (len(found), found.classes, found.shape) == (COUNT, 10, (1, 28, 28))
        assert torch.equal(found.pixels[:, 0], pixels(seed))
        assert found.labels.tolist() == list(range(seed, COUNT + seed))
        torch.testing.assert_close(found.images[:, 0], (pixels(seed) / 255 - 0.1307) / 0.3081)


def test_mnist_options(tmp_path: Path) -> None:
    write(tmp_path)
    colour = data.load("mnist", root=tmp_path, channels=3, size=32, mean=0.5, std=(0.25, 0.5, 1.0))
    assert isinstance(colour, data.ImageSet)
    assert (colour.shape, tuple(colour.pixels.shape)) == ((3, 32, 32), (COUNT, 3, 28, 28))
    image, _ = colour[0]
    torch.testing.assert_close(image[0] * 0.25, image[2])
    assert colour.pixels.untyped_storage().nbytes() == COUNT * 28 * 28
    for options in ({"channels": 2}, {"size": 0}, {"mean": (0.1, 0.2)}, {"std": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            data.load("mnist", root=tmp_path, **options)


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MNIST's files, such as train-images-idx3-ubyte .* which has none"):
        data.load("mnist", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        data.load("mnist", root=tmp_path / "none")
    write(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    good = images.read_bytes()
    damaged = {
        b"": "first bytes .* must be an IDX header of N×28×28 bytes, got none",
        good[:9]: "first bytes of .*train-images-idx3-ubyte must be",
        b"\x00\x00\x0d" + good[3:]: "first bytes",
        good[:11] + b"\x1d" + good[12:]: "first bytes",
        good[:4] + b"\xff" + good[5:]: "first bytes",
        good[:-1]: r"data in .* must be 4704 bytes long, as its header says, got 4703",
        good + b"\x00": "got more",
    }
    for content, reason in damaged.items():
        images.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            data.load("mnist", root=tmp_path)
    images.write_bytes(good)
    for content, reason in {
        idx(torch.arange(5, 11, dtype=torch.uint8)): "labels in .* between 0 and 9, got 10",
        idx(torch.zeros(5, dtype=torch.uint8)): r"labels in .* must be 6, one an image, got 5",
    }.items():
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            data.load("mnist", root=tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte, plain or gzipped, which does not exist"):
        data.load("mnist", root=tmp_path)


def test_damaged_gzip_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    for content in (good[:-20], b"PK" + good[2:], bytes(flipped), good[:-8] + bytes(8)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz must be"):
            data.load("mnist", root=tmp_path, split="test")


def test_batches_are_resized_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = data.ImageSet(kept, torch.zeros(10, dtype=torch.int64), classes=1, mean=[100.0] * 3, std=[50.0] * 3)
    large = data.ImageSet(kept, plain.labels, classes=1, mean=plain.mean, std=plain.std, size=20)
    assert large.shape == (3, 20, 20)
    assert large.to("cpu").shape == (3, 20, 20)
    sizes = []
    resize = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *a, **k: (sizes.append(len(x)), resize(x, *a, **k))[1])
    order = {"seed": 3, "shuffle": True, "augment": data.Augment(shift=2, flip=True)}
    small, big = (torch.cat([x for x, _ in data.batches(s, 4, **order)]) for s in (plain, large))
    assert sizes == [4, 4, 2]
    # The same draws move the pixels first; resizing and normalising are both linear and commute to rounding.
    want = resize(small, (20, 20), mode="bilinear", align_corners=False)
    # Pixels of 0 to 255 are rounded a few times before they are divided by 50.
    torch.testing.assert_close(big, want, rtol=0, atol=16 * 255 / 50 * torch.finfo(torch.float32).eps)


def test_a_set_of_its_own_size_is_left_alone() -> None:
    kept = torch.rand(2, 1, 6, 6)
    same = data.ImageSet(kept, torch.zeros(2, dtype=torch.int64), classes=1, size=6)
    assert torch.equal(same.images, kept)
    shrunk = data.ImageSet(torch.tensor([0.0, 1.0]).repeat(1, 1, 8, 4), same.labels[:1], classes=1, size=2)
    # Stripes one pixel wide are an even grey from afar; without low-pass filtering they would stay stripes.
    torch.testing.assert_close(shrunk.images, torch.full((1, 1, 2, 2), 0.5), rtol=0, atol=0.1)
    for size, error in ((0, ValueError), (5000, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="size must be an int"):
            data.ImageSet(kept, same.labels, classes=1, size=size)
