"""Annotation files in COCO's format, read and checked as a whole and kept as arrays, since COCO has 860,000 objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastrank import _checks

# Narrower boxes are without area: in float32, at the far side of a resized image, they would be.
THINNEST = 1e-3
MAX_ID = 2**63 - 1
MAX_SIDE = 2**24  # beyond it, float32 does not hold every pixel's place


@dataclass(frozen=True)
class Annotations:
    """N images by ascending id, and their M objects in the order of the images; image i has those of `rows(i)`.

    sizes (N, 2): height and width; categories: id -> name, ascending; boxes (M, 4): x, y, width, height in pixels, as
    in the file; category, crowd, area (M,); shapes: M segmentations, keypoints (M, K, 3): x, y, visibility (0 is
    unlabelled), each empty where the task has no use for it.
    """

    image_ids: list[int]
    files: list[str]
    sizes: Tensor
    categories: dict[int, str]
    boxes: Tensor
    category: Tensor
    crowd: Tensor
    area: Tensor
    shapes: list[Any]
    keypoints: Tensor
    keypoint_names: tuple[str, ...]
    first: Tensor

    def rows(self, image: int) -> slice:
        """The objects of image number `image`."""
        return slice(int(self.first[image]), int(self.first[image + 1]))


def read_annotations(path: Path, *, shapes: bool, keypoints: bool) -> Annotations:
    """The file at `path`; segmentations and keypoints where they are wanted.

    Raises FileNotFoundError, or ValueError with the first wrong entry.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotations must be a file in COCO's format, got {path}, which does not exist")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        found = f"{path}, which is no JSON ({error})"
        raise _checks.fail("annotations", "a JSON file in COCO's format", found) from error
    for key in ("images", "categories", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise _checks.fail("annotations", "a JSON file in COCO's format", f"{path} without a list {key!r}")
    images = _by_id(path, content["images"], "images", _check_image)
    categories = _by_id(path, content["categories"], "categories", _check_category)
    names = _keypoint_names(path, content["categories"]) if keypoints else ()

    position = {image_id: i for i, image_id in enumerate(images)}
    objects = [(i, entry) for i, entry in enumerate(content["annotations"])]
    for i, entry in objects:
        where = f"annotations[{i}] in {path}"
        if not isinstance(entry, dict) or not _is_one_of(entry.get("image_id"), position):
            raise _checks.fail(where, "an object of an image in the file", _shown(entry, "image_id"))
        if not _is_one_of(entry.get("category_id"), categories):
            raise _checks.fail(where, "an object of a category in the file", _shown(entry, "category_id"))
        if not _numbers(entry.get("bbox"), 4):
            raise _checks.fail(f"bbox of {where}", "four finite numbers", repr(entry.get("bbox")))
        if not _numbers([entry.get("area", 0)], 1) or entry.get("iscrowd", 0) not in (0, 1):
            expected = "an object with a finite area and iscrowd 0 or 1"
            raise _checks.fail(where, expected, _shown(entry, "area", "iscrowd"))
        if keypoints and not _numbers(entry.get("keypoints"), 3 * len(names)):
            raise _checks.fail(f"keypoints of {where}", f"{3 * len(names)} finite numbers", _shown(entry, "keypoints"))
    objects.sort(key=lambda pair: position[pair[1]["image_id"]])
    counts = torch.zeros(len(images) + 1, dtype=torch.int64)
    for _, entry in objects:
        counts[position[entry["image_id"]] + 1] += 1
    entries = [entry for _, entry in objects]
    boxes = _array([entry["bbox"] for entry in entries], (-1, 4))
    area = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries]
    sizes = torch.tensor([(image["height"], image["width"]) for image in images.values()]).view(-1, 2)
    return Annotations(
        image_ids=list(images),
        files=[image["file_name"] for image in images.values()],
        sizes=sizes,
        categories={key: category["name"] for key, category in categories.items()},
        boxes=boxes,
        category=torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64),
        crowd=torch.tensor([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=torch.bool),
        area=_array(area, (-1,)),
        shapes=[_shape(f"annotations[{i}] in {path}", e, images[e["image_id"]]) for i, e in objects] if shapes else [],
        keypoints=_array([entry["keypoints"] for entry in entries] if keypoints else [], (-1, len(names), 3)),
        keypoint_names=names,
        first=counts.cumsum(0),
    )


def _array(values: list[Any], shape: tuple[int, ...]) -> Tensor:
    result = torch.tensor(values, dtype=torch.float64)
    return result.view(shape) if result.numel() else result.view(0, *shape[1:])


def _by_id(path: Path, entries: list[Any], key: str, check: Callable[[str, Any], None]) -> dict[int, Any]:
    """The entries by ascending id."""
    found: dict[int, Any] = {}
    for i, entry in enumerate(entries):
        where = f"{key}[{i}] in {path}"
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number <= MAX_ID or number in found:
            raise _checks.fail(where, "an entry with an id of its own, an int at least 0", _shown(entry, "id"))
        check(where, entry)
        found[number] = entry
    if not found:
        raise _checks.fail("annotations", f"a file with {key}", f"{path} with none")
    return dict(sorted(found.items()))


def _check_image(where: str, entry: Any) -> None:
    name = entry.get("file_name")
    # A file has to stay inside the folder of images.
    if not isinstance(name, str) or not name or name.startswith(("/", "\\")) or ".." in Path(name).parts or ":" in name:
        raise _checks.fail(where, "an image whose file_name lies inside its folder", _shown(entry, "file_name"))
    for side in ("width", "height"):
        if _checks.integer(f"{side} of {where}", entry.get(side), 1) > MAX_SIDE:
            raise _checks.fail(f"{side} of {where}", f"at most {MAX_SIDE}", _checks.shown(entry[side]))


def _check_category(where: str, entry: Any) -> None:
    if not isinstance(entry.get("name"), str) or entry["id"] < 1:
        raise _checks.fail(where, "a category with a name and an id of at least 1", _shown(entry, "id", "name"))


def _keypoint_names(path: Path, categories: list[Any]) -> tuple[str, ...]:
    names = categories[0].get("keypoints")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _checks.fail("annotations", "a file whose categories name their keypoints", f"{path}, which does not")
    if any(category.get("keypoints") != names for category in categories):
        expected = "a file whose categories have the same keypoints"
        raise _checks.fail("annotations", expected, f"{path} with several kinds")
    return tuple(names)


def _shape(where: str, entry: dict[str, Any], image: dict[str, Any]) -> Any:
    """The segmentation: a list of polygons as arrays (2·P,), P ≥ 3, or a run-length encoding of the image's size.

    Polygons of fewer corners, which have no area, are left out; pycocotools would take four numbers for a box.
    """
    shape, size = entry.get("segmentation"), [image["height"], image["width"]]
    if isinstance(shape, list):
        if not all(isinstance(polygon, list) and _numbers(polygon, len(polygon) // 2 * 2) for polygon in shape):
            raise _checks.fail(f"segmentation of {where}", "polygons of finite x and y", str(shape)[:80])
        return [numpy.asarray(polygon, dtype=numpy.float64) for polygon in shape if len(polygon) >= 6]
    if isinstance(shape, dict) and shape.get("size") == size:
        runs: Any = shape.get("counts")
        # Runs beyond the image would be written beyond its memory.
        whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        if isinstance(runs, str) or (whole and sum(runs) == size[0] * size[1]):
            return shape
    expected = f"polygons, or run lengths of {size[0]}×{size[1]} pixels"
    raise _checks.fail(f"segmentation of {where}", expected, str(shape)[:80])


def _numbers(values: Any, count: int) -> bool:
    """Whether `values` is a list of `count` finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(_checks.finite_number(value) for value in values)


def _is_one_of(value: Any, known: Mapping[int, object]) -> bool:
    return type(value) is int and value in known


def _shown(entry: Any, *keys: str) -> str:
    if not isinstance(entry, dict):
        return type(entry).__name__
    return ", ".join(f"{key} {str(entry.get(key, 'absent'))[:60]!r}" for key in keys)
