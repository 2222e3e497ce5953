"""Images with boxes, masks or keypoints in COCO's format, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.data._annotations import THINNEST, Annotations, read_annotations
from fastrank.data._batches import batch_generator, batches, rows_of

TASKS = {"detection": "instances", "instances": "instances", "keypoints": "person_keypoints"}
"""What `CocoSet` gives beside boxes, and how COCO's annotation files of it are called."""
_VISIBLE = 10
Target = dict[str, Tensor]


class CocoSet(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) in [0, 1], read when asked for, and targets as torchvision's detectors take them.

    A target has ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` (n,), ``image_id``, ``area`` and ``iscrowd``;
    for the task "instances" also ``masks`` (n, H, W) uint8, for "keypoints" ``keypoints`` (n, K, 3) as x, y and
    visibility. Crowds are left out, and so are objects (`dropped` of them) whose box has no area within the image, or,
    where masks are wanted, that have no polygon of three corners.

    Labels are 1 to the number of categories, by ascending category id, and 0 is the background, so that `classes`
    counts one more than the categories: 81 for COCO. torchvision's own references use the ids as they are, with gaps,
    and 91 classes; so does ``contiguous=False``.

    training: leave out images without an object, and, as torchvision does, images of persons with fewer than 10 visible
    keypoints (or fewer than one object has). Needs torchvision's Pillow, and pycocotools for masks.
    Raises FileNotFoundError for an absent file, naming the first, ValueError for wrong annotations, naming the entry.
    """

    shape = (3, 800, 800)
    """What detectors are counted and quoted at; the images themselves differ in size."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        task: str = "detection",
        training: bool = True,
        contiguous: bool = True,
    ) -> None:
        self.task = _checks.choice("task", task, TASKS)
        if task == "instances":
            coco_masks()  # absent, it is missed here and not in the first batch
        self.folder, path = Path(folder), Path(annotations)
        self.annotations = read_annotations(path, shapes=task == "instances", keypoints=task == "keypoints")
        ids = list(self.annotations.categories)
        self.category_of = dict(enumerate(ids, 1)) if contiguous else {number: number for number in ids}
        """Label -> category id."""
        self._label_of = {number: label for label, number in self.category_of.items()}
        self.contiguous, self.classes = contiguous, max(self.category_of) + 1
        self._corners, self._good = _corners(self.annotations)
        if task == "instances":
            self._good &= torch.tensor([bool(shape) for shape in self.annotations.shapes])
        self.dropped = int((~self._good & ~self.annotations.crowd).sum())
        if not bool(self._good.any()):
            raise _checks.fail("annotations", "a file with objects that have an area and are no crowds", f"{path}")
        everything = range(len(self.annotations.image_ids))
        self.indices = [i for i in everything if not training or self._worth_training(i)]
        if not self.indices:
            raise _checks.fail("annotations", "a file with images that have enough visible keypoints", f"{path}")
        _require_files(self.folder, [self.annotations.files[i] for i in self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """One image and its target."""
        known, image = self.annotations, self.indices[index]
        pixels = _read_image(self.folder / known.files[image], known.sizes[image].tolist())
        rows = known.rows(image)
        chosen = self._good[rows].nonzero()[:, 0] + rows.start
        labels = [self._label_of[number] for number in known.category[chosen].tolist()]
        target = {
            "boxes": self._corners[chosen],
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": torch.tensor(known.image_ids[image]),
            "area": known.area[chosen].to(torch.float32),
            "iscrowd": torch.zeros(len(chosen), dtype=torch.int64),
        }
        if self.task == "instances":
            target["masks"] = _masks([known.shapes[row] for row in chosen.tolist()], *pixels.shape[-2:])
        if self.task == "keypoints":
            target["keypoints"] = known.keypoints[chosen].to(torch.float32)
        return pixels, target

    @property
    def keypoint_mirror(self) -> list[int]:
        """For every keypoint the one that it becomes in a mirror, by the words left and right in their names."""
        names = self.annotations.keypoint_names
        swap = {"left": "right", "right": "left"}
        partners = [_swapped(name, swap) for name in names]
        return [names.index(partner) if partner in names else i for i, partner in enumerate(partners)]

    def ground_truth(self) -> dict[str, Any]:
        """The objects of this set's images, crowds included, as pycocotools wants them; ids count from 1.

        (An object with the id 0 counts as never found there, and areas and crowd flags may not be absent.)
        """
        known = self.annotations
        objects: list[dict[str, Any]] = []
        for image in self.indices:
            rows = known.rows(image)
            for row in range(rows.start, rows.stop):
                if self._good[row] or known.crowd[row]:
                    objects.append(self._object(row, known.image_ids[image], len(objects) + 1))
        sizes = known.sizes.tolist()
        return {
            "images": [{"id": known.image_ids[i], "height": sizes[i][0], "width": sizes[i][1]} for i in self.indices],
            "categories": [{"id": number, "name": name} for number, name in known.categories.items()],
            "annotations": objects,
        }

    def _object(self, row: int, image_id: int, number: int) -> dict[str, Any]:
        known = self.annotations
        entry = {
            "id": number,
            "image_id": image_id,
            "category_id": int(known.category[row]),
            "bbox": known.boxes[row].tolist(),
            "area": float(known.area[row]),
            "iscrowd": int(known.crowd[row]),
        }
        if self.task == "instances":
            entry["segmentation"] = known.shapes[row]
        if self.task == "keypoints":
            points = known.keypoints[row]
            entry |= {"keypoints": points.flatten().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        return entry

    def _worth_training(self, image: int) -> bool:
        rows = self.annotations.rows(image)
        good = self._good[rows]
        if self.task != "keypoints":
            return bool(good.any())
        visible = self.annotations.keypoints[rows][good][:, :, 2] > 0
        return int(visible.sum()) >= min(_VISIBLE, len(self.annotations.keypoint_names))


def coco(
    root: str | os.PathLike[str] | None, split: str, task: str = "detection", year: int = 2017, contiguous: bool = True
) -> CocoSet:
    """COCO's own layout: ``annotations/instances_train2017.json``, ``train2017/*.jpg``, and ``val2017`` for testing."""
    if root is None:
        raise _checks.fail("root", "the folder that holds annotations/ and the folders of images", None)
    _checks.choice("task", task, TASKS)
    _checks.integer("year", year, 2000)
    if not isinstance(contiguous, bool):
        raise _checks.fail_type("contiguous", "a bool", contiguous)
    part = f"{'train' if split == 'train' else 'val'}{year}"
    path = Path(root) / "annotations" / f"{TASKS[task]}_{part}.json"
    return CocoSet(Path(root) / part, path, task=task, training=split == "train", contiguous=contiguous)


def detection_batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    shuffle: bool = False,
    flip: bool = False,
    drop_last: bool = False,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Lists of images, which differ in size, and of targets; `flip` mirrors each image with probability ½.

    As with `batches`, batch i is a function of (seed, epoch, i) alone, and `part` gives a rank's share of it.
    """
    source: Iterator[Any] = batches(
        dataset,
        batch_size,
        seed=seed,
        epoch=epoch,
        start=start,
        shuffle=shuffle,
        drop_last=drop_last,
        workers=workers,
        collate=_lists,
        part=part,
    )
    mirror = getattr(dataset, "keypoint_mirror", None)
    for position, (images, targets) in enumerate(source, start):
        if flip:
            among = min(batch_size, len(dataset) - position * batch_size)  # type: ignore[arg-type]
            draws = torch.randint(0, 2, (among,), generator=batch_generator(seed, epoch, position)).tolist()
            draws = draws[rows_of(among, *part)]
            pairs = zip(images, targets, draws, strict=True)
            mixed = [_mirrored(image, target, mirror) if draw else (image, target) for image, target, draw in pairs]
            images, targets = [image for image, _ in mixed], [target for _, target in mixed]
        yield images, targets


def coco_masks() -> Any:
    """The module pycocotools.mask, or ImportError that says how to get it."""
    try:
        import pycocotools.mask
    except ImportError as error:
        raise ImportError("masks need pycocotools, which is absent: pip install 'fastrank[detection]'") from error
    return pycocotools.mask


def _lists(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in items], [target for _, target in items]


def _corners(known: Annotations) -> tuple[Tensor, Tensor]:
    """Boxes (M, 4) float32 as corners within their images, and which of them (M,) are objects to train on."""
    counts = known.first[1:] - known.first[:-1]
    limits = known.sizes.flip(1).repeat_interleave(counts, 0).repeat(1, 2).to(torch.float64)  # W, H, W, H
    corners = torch.cat([known.boxes[:, :2], known.boxes[:, :2] + known.boxes[:, 2:]], 1)
    corners = corners.clamp(min=0).minimum(limits).to(torch.float32)
    good = ((corners[:, 2:] - corners[:, :2]) > THINNEST).all(1) & ~known.crowd
    return corners, good


def _require_files(folder: Path, files: list[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must hold the images that the annotations name, got {folder}, which is none")
    there = {entry.name for entry in os.scandir(folder)}
    absent = [name for name in files if name not in there and not (folder / name).is_file()]
    if absent:
        more = f"and {len(absent) - 1} more " if len(absent) > 1 else ""
        found = f"{absent[0]} {more}{'are' if more else 'is'} missing"
        raise FileNotFoundError(f"{folder} must hold the images that the annotations name, {found}")


def _read_image(path: Path, size: list[int]) -> Tensor:
    """The image as (3, H, W) float32 in [0, 1], checked to be of the size (height, width) that the annotations say."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            width, height = file.size
            if [height, width] != size:  # before anything is decoded
                shown = f"{path} of {height}×{width} where they say {size[0]}×{size[1]}"
                raise _checks.fail("images", "of the sizes in the annotations", shown)
            pixels = torch.from_numpy(numpy.array(file.convert("RGB")))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError for some broken PNG files
        raise _checks.fail("images", "files that Pillow can read", f"{path} ({error})") from error
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32) / 255


def _masks(shapes: list[Any], height: int, width: int) -> Tensor:
    """(n, H, W) uint8, 1 inside."""
    mask = coco_masks()
    planes = torch.zeros(len(shapes), height, width, dtype=torch.uint8)
    for plane, shape in zip(planes, shapes, strict=True):
        packed = isinstance(shape, dict) and isinstance(shape["counts"], str)
        runs = shape if packed else mask.frPyObjects(shape, height, width)
        plane.copy_(torch.from_numpy(mask.decode(mask.merge(runs) if isinstance(runs, list) else runs)))
    return planes


def _mirrored(image: Tensor, target: Target, keypoint_mirror: list[int] | None) -> tuple[Tensor, Target]:
    """Image and target as in a mirror; left and right keypoints change places, unlabelled ones stay at 0, 0."""
    width = image.shape[-1]
    target = dict(target)
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    if "keypoints" in target:
        if keypoint_mirror is None:
            raise _checks.fail("flip", "False for a data set without keypoint_mirror", True)
        x, y, seen = target["keypoints"][:, keypoint_mirror].unbind(2)
        target["keypoints"] = torch.stack([torch.where(seen > 0, width - x, 0), torch.where(seen > 0, y, 0), seen], 2)
    return image.flip(-1), target


def _swapped(name: str, swap: dict[str, str]) -> str:
    for side, other in swap.items():
        if side in name:
            return name.replace(side, other)
    return name
