"""Parts of batches, one a rank: together they are the batch, in order, bit for bit, whatever the augmentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from fastrank.data import Augment, ImageSet, batches, detection_batches, span
from fastrank.data._batches import rows_of


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_spans_cover_a_batch_evenly(count: int, ranks: int) -> None:
    spans = [span(count, rank, ranks) for rank in range(ranks)]
    assert [spans[0][0], *(end for _, end in spans)] == [*(first for first, _ in spans), count]
    sizes = [end - first for first, end in spans]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert all(rows_of(count, rank, ranks) == slice(0, 1) for rank in range(ranks) if not sizes[rank])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_make_the_batch(in_memory: bool, ranks: int) -> None:
    images, labels = torch.rand(23, 2, 5, 6), torch.arange(23) % 3
    data: Any = ImageSet(images, labels, classes=3) if in_memory else TensorDataset(images, labels)
    options: dict[str, Any] = {"seed": 5, "epoch": 1, "start": 1, "shuffle": True, "augment": Augment(2, True)}
    whole = list(batches(data, 10, **options))
    parts = [list(batches(data, 10, part=(rank, ranks), **options)) for rank in range(ranks)]
    assert [len(labels) for _, labels in whole] == [10, 3]
    for position, (images, labels) in enumerate(whole):
        own = [part[position] for part in parts]
        full = [len(range(*span(len(labels), rank, ranks))) for rank in range(ranks)]
        assert torch.equal(torch.cat([found[0][:n] for found, n in zip(own, full, strict=True)]), images)
        assert torch.equal(torch.cat([found[1][:n] for found, n in zip(own, full, strict=True)]), labels)
        for found, n in zip(own, full, strict=True):
            if not n:
                assert torch.equal(found[0], images[:1])


def test_parts_of_lists_of_images_are_mirrored_as_in_the_batch() -> None:
    data: Any = [(torch.rand(3, 4, 5), {"boxes": torch.tensor([[0.0, 0.0, n + 1.0, 1.0]])}) for n in range(9)]
    options: dict[str, Any] = {"seed": 1, "shuffle": True, "flip": True}
    whole = list(detection_batches(data, 5, **options))
    parts = [list(detection_batches(data, 5, part=(rank, 2), **options)) for rank in range(2)]
    for (images, targets), *own in zip(whole, *parts, strict=True):
        found = [image for part in own for image in part[0]]
        boxes = [target["boxes"] for part in own for target in part[1]]
        assert all(torch.equal(a, b) for a, b in zip(found, images, strict=True))
        assert all(torch.equal(a, b["boxes"]) for a, b in zip(boxes, targets, strict=True))
