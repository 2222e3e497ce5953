"""`load`: a data set by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastrank import _checks
from fastrank.data import _cifar, _coco, _mnist
from fastrank.data._coco import CocoSet
from fastrank.data._sets import FolderSet, ImageSet, class_folders
from fastrank.data._shards import TarSet, shards_of

Root = str | os.PathLike[str] | None
AnySet = ImageSet | FolderSet | TarSet | CocoSet


def load(name: str, *, root: Root = None, split: str = "train", **options: Any) -> AnySet:
    """The data set `name`, split "train" or "test", from files under `root`.

    - "digits": scikit-learn's 1,797 handwritten 8×8 digits, embedded in that package (`root` is not used). Options:
      ``size=8`` pixels a side (bilinear), ``channels=1`` or 3, ``held_out=0.3``, the share of
      each class that is the test split.
    - "mnist": 28×28 grey images; `root` is, or holds, the folder of the four IDX files, plain or gzipped. Options:
      ``size``, ``channels=1`` or 3, ``mean`` and ``std``.
    - "cifar10", "cifar100": 32×32 colour images; `root` is, or holds, the extracted binary or Python folder. Options:
      ``size``; ``mean`` and ``std``, a fraction of full brightness a channel, for networks trained with others than the
      default.
    - "imagenet": folders ``train/CLASS/*`` and ``val/CLASS/*`` under `root`; the usual random crop and flip for
      training, the central crop for testing; needs torchvision. Options: ``size=224`` pixels a side.
    - "webdataset": tar files of images and labels, as WebDataset has them (see `TarSet`): ``train/*.tar`` and
      ``val/*.tar`` under `root`, or ``*train*.tar`` and ``*val*.tar`` in it; images as with "imagenet", read one by one
      from where they lie. Options: ``size=224``; ``classes``, by default one more than the largest label;
      ``index``, a folder that keeps where the images lie for the next time.
    - "coco": objects in images of any size, for detectors (see `CocoSet`); ``annotations/instances_train2017.json`` or
      ``person_keypoints_…`` and the folders ``train2017`` and ``val2017`` under `root`; needs Pillow, and pycocotools
      for masks. Options: ``task="detection"``, "instances" or "keypoints"; ``year=2017``; ``contiguous=True``.

    ``size`` of MNIST and CIFAR is the pixels a side that images are handed out with (bilinear); the set itself stays as
    small as it is on disk, and each batch is resized when it is taken.

    The result has ``len``, ``classes`` (an int), ``shape`` (C, H, W); those in memory have ``images`` and ``labels``.
    Raises ValueError or TypeError for a wrong argument or a damaged file, FileNotFoundError, naming what was expected
    where, for an absent one, ImportError for an absent package.
    """
    loader, known = _LOADERS[_checks.choice("name", name, NAMES)]
    _checks.choice("split", split, ("train", "test"))
    for option in options:
        if option not in known:
            raise TypeError(f"options of {name} must be among {list(known)}, got {option!r}")
    return loader(root, split, **options)


def _digits(_: Root, split: str, size: int = 8, channels: int = 1, held_out: float = 0.3) -> ImageSet:
    _checks.integer("size", size, 1, 1024)
    if channels not in (1, 3):
        raise _checks.fail("channels", "1 or 3", channels)
    if not 0 < _checks.number("held_out", held_out, 0, 1) < 1:
        raise _checks.fail("held_out", "between 0 and 1, both excluded", held_out)
    try:
        import numpy
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits needs scikit-learn, which is absent: pip install 'fastrank[demo]'") from error
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    pixels = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    if size != 8:
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)

    # RandomState's stream is frozen for good, so the split is the same under every version of every package.
    shuffled = numpy.random.RandomState(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        rows = shuffled.permutation((labels == digit).nonzero()[:, 0].numpy())
        test[rows[: round(held_out * len(rows))]] = True
    mean, std = pixels[~test].mean(), pixels[~test].std()
    chosen = test if split == "test" else ~test
    if not bool(chosen.any()):
        raise _checks.fail("held_out", f"a share that leaves images to the {split} split", held_out)
    return ImageSet(
        pixels[chosen].repeat(1, channels, 1, 1),
        labels[chosen],
        classes=10,
        mean=mean.repeat(channels),
        std=std.repeat(channels),
    )


def _imagenet(root: Root, split: str, size: int = 224) -> FolderSet:
    if root is None:
        raise _checks.fail("root", "the folder that holds train/ and val/", None)
    transform = _cropped("imagenet", split, size)
    train, val = Path(root) / "train", Path(root) / "val"
    folder = train if split == "train" else val
    if train.is_dir() and val.is_dir() and class_folders(train) != class_folders(val):
        odd = sorted(set(class_folders(train)) ^ set(class_folders(val)))[0]
        raise _checks.fail("root", "a folder with one set of classes in train/ and val/", f"{root}, {odd} in one only")
    return FolderSet(folder, transform, (3, size, size))


def _webdataset(root: Root, split: str, size: int = 224, classes: int | None = None, index: Root = None) -> TarSet:
    transform, shards = _cropped("webdataset", split, size), shards_of(root, split)
    kept = None if index is None else Path(index) / f"{split}.index.safetensors"
    return TarSet(shards, transform, (3, size, size), classes=classes, index=kept)


def _cropped(name: str, split: str, size: int) -> Any:
    """What ImageNet's images go through: a random crop and flip for training, the central crop for testing."""
    _checks.integer("size", size, 1)
    try:
        from torchvision import transforms
    except ImportError as error:
        raise ImportError(f"{name} needs torchvision, which is absent: pip install 'fastrank[vision]'") from error
    normalise = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    if split == "train":
        first = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        first = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    return transforms.Compose([*first, *normalise])


_LOADERS: dict[str, tuple[Callable[..., AnySet], tuple[str, ...]]] = {
    "digits": (_digits, ("size", "channels", "held_out")),
    "mnist": (_mnist.mnist, ("size", "channels", "mean", "std")),
    "cifar10": (_cifar.cifar10, ("mean", "std", "size")),
    "cifar100": (_cifar.cifar100, ("mean", "std", "size")),
    "imagenet": (_imagenet, ("size",)),
    "webdataset": (_webdataset, ("size", "classes", "index")),
    "coco": (_coco.coco, ("task", "year", "contiguous")),
}
NAMES: tuple[str, ...] = tuple(_LOADERS)
"""What `load` knows."""
