"""The two kinds of data set: images held in memory, and images in folders on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastrank import _checks

MAX_SIZE = 4096


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled images in memory: `pixels` (N, C, H, W) as they were read, `labels` (N,) int64 in [0, classes).

    `pixels` may be uint8 or floating-point; `mean` and `std` (C,) are in the same unit, and everything handed out is
    ``(pixels - mean) / std`` in float32. Augmentation happens on the pixels, so padding is black, not grey.
    size: hand the images out at that many pixels a side (bilinear, without aliasing), or as they are where None. They
    are resized batch by batch, behind the augmentation: only `images` ever holds the whole set at that size.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        *,
        classes: int,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        size: int | None = None,
    ) -> None:
        if not isinstance(pixels, Tensor):
            raise _checks.fail_type("pixels", "a torch.Tensor", pixels)
        if not (pixels.dtype == torch.uint8 or pixels.dtype.is_floating_point):
            raise TypeError(f"pixels must be a uint8 or floating-point tensor, got dtype {pixels.dtype}")
        if pixels.dim() != 4:
            raise _checks.fail("pixels", "of shape (N, C, H, W)", tuple(pixels.shape))
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
            raise _checks.fail_type("labels", "a tensor of integers", labels)
        if tuple(labels.shape) != (len(pixels),):
            raise _checks.fail("labels", f"of shape ({len(pixels)},), one an image", tuple(labels.shape))
        self.classes = _checks.integer("classes", classes, 1)
        check_labels("labels", labels, classes)
        self.pixels = pixels
        self.labels = labels.to(pixels.device, torch.int64)
        self.mean = self._per_channel("mean", mean, 0.0)
        self.std = self._per_channel("std", std, 1.0)
        if not bool((self.std > 0).all()):
            raise _checks.fail("std", "above 0 in every channel", self.std.tolist())
        self.size = None if size is None else _checks.integer("size", size, 1, MAX_SIZE)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.pixels.shape
        return (channels, height, width) if self.size is None else (channels, self.size, self.size)

    @property
    def images(self) -> Tensor:
        """All images, normalised: (N, C, H, W) float32, computed at every access."""
        return self.normalise(self.pixels)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) as the network gets them: float32, and of this set's size where it has one."""
        pixels = pixels.to(torch.float32)
        if self.size is not None and tuple(pixels.shape[-2:]) != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return pixels.sub(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on another device."""
        pixels, labels = self.pixels.to(device), self.labels.to(device)
        return ImageSet(pixels, labels, classes=self.classes, mean=self.mean, std=self.std, size=self.size)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One normalised image (C, H, W) and its label."""
        return self.normalise(self.pixels[index][None])[0], int(self.labels[index])

    def _per_channel(self, name: str, values: Sequence[float] | Tensor | None, default: float) -> Tensor:
        channels = self.pixels.shape[1]
        if values is None:
            return torch.full((channels,), default, device=self.pixels.device)
        result = torch.as_tensor(values, dtype=torch.float32, device=self.pixels.device)
        if tuple(result.shape) != (channels,):
            raise _checks.fail(name, f"of length {channels}, one number a channel", tuple(result.shape))
        return _checks.finite(name, result)


class FolderSet(Dataset[tuple[Tensor, int]]):
    """Images in one folder a class, decoded and transformed one by one when asked for.

    `transform` maps a PIL image to a float tensor of `shape` (C, H, W); it may draw from torch's global generator,
    which `batches` seeds per image. Needs torchvision.
    """

    def __init__(self, folder: str | os.PathLike[str], transform: Any, shape: tuple[int, int, int]) -> None:
        from torchvision.datasets import ImageFolder

        names = class_folders(folder)
        try:
            self._files = ImageFolder(str(folder), transform=transform)
        except FileNotFoundError as error:  # raised for a class folder that holds no image
            raise FileNotFoundError(f"root must hold images in every class folder: {error}") from error
        self.classes = len(names)
        self.shape = shape

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One transformed image (C, H, W) and the index of its folder in sorted order.

        Raises FileNotFoundError where the file has gone, ValueError, naming it, where it is damaged.
        """
        path = self._files.samples[index][0]
        if not Path(path).is_file():
            raise FileNotFoundError(f"root must keep its images while they are used, got {path}, which has gone")
        try:
            image, label = self._files[index]
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
            raise _checks.fail("root", "a folder of images that Pillow can read", f"{path} ({error})") from error
        return image, label


def class_folders(folder: str | os.PathLike[str]) -> list[str]:
    """The sorted names of the folders inside `folder`, one a class; FileNotFoundError where there is none."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if Path(folder).is_dir() else []
    if not names:
        raise FileNotFoundError(f"root must hold the folder {folder} with one folder of images a class, got none")
    return names


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless all labels lie in [0, classes)."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise _checks.fail(name, f"between 0 and {classes - 1}", f"{int(wrong[0])} among {len(labels)}")
