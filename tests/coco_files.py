"""A tiny data set in COCO's format, written to disk: coloured rectangles with boxes, polygons and keypoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from torch import nn

COLOURS = {3: ("red", (220, 30, 30)), 7: ("green", (30, 200, 30)), 8: ("blue", (40, 40, 230))}
"""Category id -> name and colour; the ids have gaps, as COCO's do."""
KEYPOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)


def write_coco(
    root: Path,
    part: str = "train2017",
    *,
    count: int = 8,
    kind: str = "instances",
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Images 64 to 96 pixels a side under root/part and their annotations under root/annotations; `change` edits those.

    Image i has the id 10 + i, a height of 64 + 4·(i % 5) and a width of 96 − 8·(i % 4), and one or two rectangles.
    """
    draw = numpy.random.RandomState(len(part) + count)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": _categories(kind)}
    (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = 64 + 4 * (i % 5), 96 - 8 * (i % 4)
        pixels = draw.randint(90, 130, (height, width, 3)).astype(numpy.uint8)
        for j in range(1 + i % 2):
            colour = list(COLOURS)[(i + j) % 3]
            w, h = (int(size) for size in draw.randint(18, 30, 2))
            x, y = int(draw.randint(0, width // 2 - 14)) + j * (width // 2 - 8), int(draw.randint(0, height - h))
            w = min(w, width - x)
            pixels[y : y + h, x : x + w] = COLOURS[colour][1]
            content["annotations"].append(_entry(len(content["annotations"]), 10 + i, colour, (x, y, w, h), kind))
        name = f"{10 + i:012}.png"
        Image.fromarray(pixels).save(root / part / name)
        content["images"].append({"id": 10 + i, "file_name": name, "width": width, "height": height})
    if change is not None:
        change(content)
    stem = "person_keypoints" if kind == "keypoints" else "instances"
    path = root / "annotations" / f"{stem}_{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


class Tiny(nn.Module):
    """The smallest network that has the four stages of a ResNet."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 12, 16)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(8)
        for stage, (before, after) in enumerate(zip((8, *widths), widths, strict=False), 1):
            self.add_module(f"layer{stage}", nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()))


def lighten(detector: Any) -> Any:
    """The detector with fewer proposals and findings, so that its heads have little to do."""
    detector.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    detector.roi_heads.detections_per_img = 3
    detector.rpn._post_nms_top_n = {"training": 100, "testing": 50}
    return detector


def _categories(kind: str) -> list[dict[str, Any]]:
    if kind == "keypoints":
        return [{"id": 1, "name": "person", "keypoints": list(KEYPOINTS)}]
    return [{"id": number, "name": name} for number, (name, _) in reversed(COLOURS.items())]


def _entry(number: int, image: int, category: int, box: tuple[int, int, int, int], kind: str) -> dict[str, Any]:
    x, y, w, h = box
    entry: dict[str, Any] = {
        "id": number,  # 0 is an id here, which pycocotools by itself would not find
        "image_id": image,
        "category_id": 1 if kind == "keypoints" else category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }
    if kind == "keypoints":
        # Along the diagonal; the last two are not labelled.
        points = [[x + (k + 0.5) * w / 17, y + (k + 0.5) * h / 17, 2] for k in range(15)] + [[0, 0, 0]] * 2
        entry |= {"keypoints": [value for point in points for value in point], "num_keypoints": 15}
    return entry
