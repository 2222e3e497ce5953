"""Batches whose order and augmentation are pure functions of (seed, epoch, batch index), so that resuming is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastrank import _checks
from fastrank.data._sets import ImageSet

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augment:
    """Random changes of a batch: each image moves by up to `shift` pixels a direction (zeros come in), and mirrors."""

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _checks.integer("shift", self.shift, 0)
        if not isinstance(self.flip, bool):
            raise _checks.fail_type("flip", "a bool", self.flip)

    def __call__(
        self, images: Tensor, generator: torch.Generator, *, first: int = 0, among: int | None = None
    ) -> Tensor:
        """Images (N, C, H, W) of any dtype, each moved and mirrored by its own draws from a CPU generator.

        They are those from number `first` on of a batch of `among` images (None: N), and get what they would get there.
        """
        count, _, height, width = images.shape
        among = count if among is None else among
        if self.shift:
            offsets = torch.randint(0, 2 * self.shift + 1, (2, among, 1), generator=generator)
            offsets = offsets[:, first : first + count].to(images.device)
            rows = offsets[0] + torch.arange(height, device=images.device)
            columns = offsets[1] + torch.arange(width, device=images.device)
            padded = F.pad(images, (self.shift,) * 4).permute(0, 2, 3, 1)
            image = torch.arange(count, device=images.device)[:, None, None]
            images = padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        if self.flip:
            mirrored = torch.randint(0, 2, (among, 1, 1, 1), generator=generator)
            mirrored = mirrored[first : first + count].to(images.device, torch.bool)
            images = torch.where(mirrored, images.flip(-1), images)
        return images


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    shuffle: bool = False,
    augment: Augment | None = None,
    drop_last: bool = False,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Images (B, C, H, W) float32 and labels (B,) int64 of one epoch, from batch `start` on.

    An `ImageSet` is gathered as one tensor on its own device; any other map-style data set of (image, label) goes
    through a DataLoader with `workers` processes. Batch i is the same whatever `start` and `workers` are: order and
    augmentation come from (seed, epoch, i), and torch's global generator is seeded from them around each image that
    is read from disk. Nothing else draws from the global generator. `drop_last` leaves out an incomplete last batch.
    An OSError or ValueError of the data set is raised as it is, in whichever process it came up; RuntimeError where a
    worker was ended from outside.
    `collate` makes a pair of a list of items read from disk, for items that do not stack. `part`, the number of a rank
    and how many there are, gives the share of each batch that `span` says, made of nothing but its own images; where
    that is empty, the first image of the batch.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise _checks.fail_type("dataset", "a map-style data set with a length", dataset)
    total = len(dataset)
    _checks.integer("batch_size", batch_size, 1)
    _checks.integer("seed", seed, 0)
    _checks.integer("epoch", epoch, 0)
    _checks.integer("workers", workers, 0)
    count = total // batch_size if drop_last else -(-total // batch_size)
    _checks.integer("start", start, 0, count)
    order = torch.randperm(total, generator=batch_generator(seed, epoch)) if shuffle else torch.arange(total)
    firsts = range(start * batch_size, min(total, count * batch_size), batch_size)
    indices = [order[first : first + batch_size] for first in firsts]
    parts = [_Part(rows, *part) for rows in indices]
    if isinstance(dataset, ImageSet):
        return _gathered(dataset, parts, augment, seed, epoch, start)
    return _read(dataset, parts, augment, seed, epoch, start, workers, collate)


def span(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and end of the share of `count` images that a rank has: sizes differ by at most one, the larger first."""
    size, more = divmod(count, ranks)
    first = rank * size + min(rank, more)
    return first, first + size + (rank < more)


def rows_of(count: int, rank: int, ranks: int) -> slice:
    """The images of a batch that a rank reads: those of `span`, and the first one where there is none."""
    first, end = span(count, rank, ranks)
    return slice(first, end) if end > first else slice(0, 1)


class _Part:
    """One rank's images of a batch: their rows, the number of the first one, and how many the batch has."""

    def __init__(self, rows: Tensor, rank: int, ranks: int) -> None:
        own = rows_of(len(rows), rank, ranks)
        self.rows, self.first, self.among = rows[own], own.start, len(rows)

    def augmented(self, images: Tensor, augment: Augment | None, *seeds: int) -> Tensor:
        if augment is None:
            return images
        return augment(images, batch_generator(*seeds), first=self.first, among=self.among)


def _gathered(
    dataset: ImageSet, parts: list[_Part], augment: Augment | None, seed: int, epoch: int, start: int
) -> Iterator[Batch]:
    for position, part in enumerate(parts, start):
        rows = part.rows.to(dataset.pixels.device)
        pixels = part.augmented(dataset.pixels[rows], augment, seed, epoch, position)
        yield dataset.normalise(pixels), dataset.labels[rows]


def _read(
    dataset: Dataset[Any],
    parts: list[_Part],
    augment: Augment | None,
    seed: int,
    epoch: int,
    start: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None,
) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Seeded(dataset, seed, epoch),
        batch_sampler=[part.rows.tolist() for part in parts],
        num_workers=workers,
        collate_fn=_Collate(collate or default_collate),
        generator=torch.Generator(),  # its own, because a DataLoader otherwise draws from the global one
    )
    for position, (part, batch) in enumerate(zip(parts, loader, strict=True), start):
        if isinstance(batch, _Failed):
            raise batch.error
        images, labels = batch
        yield part.augmented(images, augment, seed, epoch, position), labels


@dataclass(frozen=True)
class _Failed:
    """An error on its way to the process that trains: a loader would wrap it into the text of a traceback."""

    error: Exception


class _Collate:
    """Makes a batch of items, or hands on the first error among them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        failed = next((item for item in items if isinstance(item, _Failed)), None)
        return self.collate(items) if failed is None else failed


class _Seeded(Dataset[Any]):
    """A data set whose random transforms depend on (seed, epoch, index) alone, in whichever process they run."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(_number(self.seed, self.epoch, index))
        try:
            return self.dataset[index]
        except (OSError, ValueError) as error:
            if type(error).__module__ != "builtins" or not all(isinstance(a, str | int | None) for a in error.args):
                raise  # it may not survive the way
            return _Failed(error)
        finally:
            torch.set_rng_state(state)


def _number(*parts: int) -> int:
    """63 bits that differ for every tuple of ints; unlike a sum, (0, 1) and (1, 0) are strangers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def batch_generator(*parts: int) -> torch.Generator:
    """A generator on the CPU whose stream depends on `parts` alone."""
    return torch.Generator().manual_seed(_number(*parts))
