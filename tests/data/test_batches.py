"""Batches: order and augmentation depend on (seed, epoch, batch index) and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastrank.data import Augment, FolderSet, ImageSet, batches


def _images(count: int = 23, dtype: torch.dtype = torch.uint8) -> ImageSet:
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (count, 3, 6, 5), generator=numbers).to(dtype)
    labels = torch.arange(count) % 7
    return ImageSet(pixels, labels, classes=7, mean=[100.0, 120.0, 90.0], std=[50.0, 60.0, 70.0])


class _Noisy(Dataset[Any]):
    """A data set read item by item, with a random transform as torchvision's: from the global generator."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(1, 2, 2) + index, index


def _same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("dataset", [_images(), _Noisy()], ids=["memory", "disk"])
def test_resuming_at_any_batch_is_exact_and_draws_nothing(dataset: Dataset[Any]) -> None:
    options: dict[str, Any] = {"seed": 3, "epoch": 2, "shuffle": True, "augment": Augment(shift=2, flip=True)}
    before = torch.get_rng_state()
    whole = list(batches(dataset, 4, **options))
    for start in range(len(whole) + 1):
        torch.rand(start)
        assert _same(list(batches(dataset, 4, start=start, **options)), whole[start:])
    torch.set_rng_state(before)
    list(batches(dataset, 4, **options))
    assert torch.equal(torch.get_rng_state(), before)
    for other in ({"seed": 2}, {"epoch": 3}):
        assert not _same(list(batches(dataset, 4, **{**options, **other})), whole)


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        images = torch.cat([images for images, _ in batches(_images(), 4, seed=seed, epoch=epoch, shuffle=True)])
        return tuple(images.flatten(1).sum(1).tolist())

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert len({tuple(sorted(each)) for each in orders}) == 1


def test_workers_read_the_same_batches() -> None:
    options: dict[str, Any] = {"seed": 1, "epoch": 1, "shuffle": True, "augment": Augment(shift=1)}
    assert _same(list(batches(_Noisy(), 3, workers=2, **options)), list(batches(_Noisy(), 3, **options)))


def test_every_image_once_in_order_or_shuffled() -> None:
    dataset = _images()
    plain = list(batches(dataset, 5))
    assert [len(labels) for _, labels in plain] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in plain]), dataset.images)
    assert torch.equal(torch.cat([labels for _, labels in plain]), dataset.labels)
    shuffled = torch.cat([images for images, _ in batches(dataset, 5, shuffle=True)])
    assert not torch.equal(shuffled, dataset.images)
    assert torch.equal(shuffled.flatten(1).sum(1).sort()[0], dataset.images.flatten(1).sum(1).sort()[0])
    assert [len(labels) for _, labels in batches(dataset, 5, drop_last=True)] == [5, 5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_moves_each_image_whole_and_fills_with_black(dtype: torch.dtype) -> None:
    images = _images(200, dtype).pixels
    moved = Augment(shift=2)(images, torch.Generator().manual_seed(0))
    assert moved.dtype == dtype
    assert moved.shape == images.shape
    found = set()
    for image, result in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        matches = [
            (dy, dx) for dy in range(5) for dx in range(5) if torch.equal(padded[:, dy : dy + 6, dx : dx + 5], result)
        ]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) == 25, "all 25 offsets occur among 200 images"


def test_flip_mirrors_about_half() -> None:
    images = _images(200).pixels
    flipped = Augment(flip=True)(images, torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(a, b.flip(-1)) for a, b in zip(images, flipped, strict=True))
    kept = sum(torch.equal(a, b) for a, b in zip(images, flipped, strict=True))
    assert mirrored + kept == 200
    assert 70 <= mirrored <= 130, "within four standard deviations"
    assert torch.equal(Augment()(images, torch.Generator()), images)


def test_padding_is_black_after_normalisation() -> None:
    dataset = ImageSet(torch.full((64, 1, 4, 4), 200, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64), classes=1)
    dataset = ImageSet(dataset.pixels, dataset.labels, classes=1, mean=[100.0], std=[50.0])
    images, _ = next(batches(dataset, 64, augment=Augment(shift=1)))
    assert set(images.unique().tolist()) == {2.0, -2.0}


def test_images_from_folders_are_augmented_reproducibly(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="folders of images need torchvision and Pillow")
    transforms = pytest.importorskip("torchvision.transforms", reason="folders of images need torchvision")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / name / "0.png")
    transform = transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()])
    dataset = FolderSet(tmp_path, transform, (3, 8, 8))
    first = list(batches(dataset, 1, epoch=1))
    assert _same(list(batches(dataset, 1, epoch=1)), first)
    assert _same(list(batches(dataset, 1, epoch=1, start=1)), first[1:])
    assert not _same(list(batches(dataset, 1, epoch=2)), first)


def test_empty_sets_and_wrong_arguments() -> None:
    empty = ImageSet(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64), classes=2)
    assert list(batches(empty, 4, shuffle=True)) == []
    with pytest.raises(TypeError, match="dataset must be a map-style data set with a length, got int"):
        batches(3, 4)  # type: ignore[arg-type]
    wrong: list[tuple[str, dict[str, Any]]] = [
        *[("batch_size", {"batch_size": 0}), ("seed", {"seed": -1}), ("epoch", {"epoch": -1}), ("start", {"start": 7})],
        *[("start", {"start": -1}), ("workers", {"workers": -1})],
    ]
    for name, options in wrong:
        with pytest.raises(ValueError, match=f"{name} must be an int"):
            batches(_images(), **{"batch_size": 4, **options})
    with pytest.raises(ValueError, match="shift must be an int at least 0, got -1"):
        Augment(shift=-1)
    with pytest.raises(TypeError, match="flip must be a bool, got int"):
        Augment(flip=1)  # type: ignore[arg-type]


def test_image_sets_check_what_they_hold() -> None:
    pixels, labels = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1])
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        ([1], labels, {"classes": 2}, TypeError, "pixels must be a torch.Tensor, got list"),
        (pixels.long(), labels, {"classes": 2}, TypeError, "pixels must be a uint8 or floating-point tensor"),
        (pixels[0], labels, {"classes": 2}, ValueError, r"pixels must be of shape \(N, C, H, W\), got \(1, 2, 2\)"),
        (pixels, labels.float(), {"classes": 2}, TypeError, "labels must be a tensor of integers"),
        (pixels, labels[:2], {"classes": 2}, ValueError, r"labels must be of shape \(3,\), one an image, got \(2,\)"),
        (pixels, labels, {"classes": 1}, ValueError, "labels must be between 0 and 0, got 1 among 3"),
        (pixels, -labels, {"classes": 2}, ValueError, "labels must be between 0 and 1, got -1"),
        (pixels, labels, {"classes": 0}, ValueError, "classes must be an int at least 1"),
        (pixels, labels, {"classes": 2, "mean": [0.0, 1.0]}, ValueError, "mean must be of length 1"),
        (pixels, labels, {"classes": 2, "mean": [float("nan")]}, ValueError, "mean must be finite"),
        (pixels, labels, {"classes": 2, "std": [0.0]}, ValueError, "std must be above 0"),
    ]
    for one, other, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            ImageSet(one, other, **options)
    assert ImageSet(pixels, labels.to(torch.uint8), classes=2).labels.dtype == torch.int64
