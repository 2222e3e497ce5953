"""Data in COCO's format: what items hold, what is left out, what is refused before any training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import COLOURS, KEYPOINTS, write_coco
from torch import Tensor

from fastrank import data
from fastrank.data import CocoSet, detection_batches

Content = dict[str, Any]
# Of pycocotools itself, under recent versions of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def loaded(root: Path, change: Callable[[Content], object] | None = None, **options: Any) -> CocoSet:
    kind = "keypoints" if options.get("task") == "keypoints" else "instances"
    part = "val2017" if options.get("split") == "test" else "train2017"
    write_coco(root, part, kind=kind, change=change)
    found = data.load("coco", root=root, **options)
    assert isinstance(found, CocoSet)
    return found


def boxes_drawn(image: Tensor) -> dict[int, list[int]]:
    """Category -> corners of what has its colour (two rectangles of one colour do not occur in an image)."""
    found = {}
    for number, (_, colour) in COLOURS.items():
        inside = (image - torch.tensor(colour)[:, None, None] / 255).abs().amax(0) < 0.01
        if bool(inside.any()):
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            found[number] = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return found


def test_items_hold_what_the_images_show(tmp_path: Path) -> None:
    found = loaded(tmp_path)
    assert (len(found), found.classes, found.category_of) == (8, 4, {1: 3, 2: 7, 3: 8})
    sizes = set()
    for index in range(8):
        image, target = found[index]
        sizes.add(tuple(image.shape))
        assert image.dtype == target["boxes"].dtype == torch.float32
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert int(target["image_id"]) == 10 + index
        assert target["labels"].dtype == torch.int64
        shown = boxes_drawn(image)
        numbers = [found.category_of[label] for label in target["labels"].tolist()]
        wanted = dict(zip(numbers, target["boxes"].tolist(), strict=True))
        # The second rectangle may cover a part of the first, never the other way round.
        last = numbers[-1]
        assert set(shown) <= set(wanted)
        assert shown[last] == wanted[last]
        assert len(numbers) == 1 + index % 2
    assert len(sizes) > 4


def test_original_ids_where_they_are_wanted(tmp_path: Path) -> None:
    one, other = loaded(tmp_path), loaded(tmp_path, contiguous=False)
    assert (other.classes, other.category_of) == (9, {3: 3, 7: 7, 8: 8})
    for index in range(8):
        numbers = [one.category_of[label] for label in one[index][1]["labels"].tolist()]
        assert other[index][1]["labels"].tolist() == numbers


def test_what_is_left_out(tmp_path: Path) -> None:
    def change(content: Content) -> None:
        first, second, third, *rest = content["annotations"]
        first["bbox"] = [-5, 2, 30, 10]  # reaches out of the image
        second["bbox"] = [4, 4, 0, 9]  # no width
        third["bbox"] = [500, 4, 9, 9]  # outside
        crowds = [entry for entry in rest if entry["image_id"] == 12]
        for entry in crowds:
            entry["iscrowd"] = 1
        del rest[-1]["area"], rest[-1]["iscrowd"]

    training, testing = loaded(tmp_path, change), loaded(tmp_path, change, split="test")
    assert (len(training), len(testing)) == (6, 8), "images 11 and 12 have nothing to train on"
    assert (training.dropped, testing.dropped) == (2, 2)
    assert training[0][1]["boxes"].tolist() == [[0, 2, 25, 12]]
    empty = testing[1][1]
    assert (empty["boxes"].shape, empty["labels"].shape) == ((0, 4), (0,))
    truth = testing.ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == list(range(1, 11)), "pycocotools would pass over an id 0"
    assert sum(entry["iscrowd"] for entry in truth["annotations"]) == 1
    assert truth["annotations"][0]["bbox"] == [-5, 2, 30, 10]
    last = truth["annotations"][-1]
    assert last["area"] == last["bbox"][2] * last["bbox"][3]
    assert len(training.ground_truth()["images"]) == 6


def test_masks_of_polygons_and_of_run_lengths(tmp_path: Path) -> None:
    def change(content: Content) -> None:
        entry, size = content["annotations"][0], content["images"][0]
        x, y, w, h = entry["bbox"]
        mask = torch.zeros(size["height"], size["width"], dtype=torch.int64)
        mask[y : y + h, x : x + w] = 1
        runs, value = [0], 0
        for pixel in mask.t().flatten().tolist():  # by columns, beginning with zeros
            if pixel != value:
                runs, value = [*runs, 0], pixel
            runs[-1] += 1
        entry["segmentation"] = {"size": list(mask.shape), "counts": runs}

    def thin(content: Content) -> None:
        first, second = content["annotations"][:2]
        first["segmentation"].append([1, 2, 3, 4])  # a line
        second["segmentation"] = [[1, 2, 3, 4]]

    assert loaded(tmp_path, thin, task="instances").dropped == 1
    for edit in (None, change, thin):
        found = loaded(tmp_path, edit, task="instances")
        for index in range(8):
            image, target = found[index]
            assert target["masks"].shape == (len(target["labels"]), *image.shape[-2:])
            assert target["masks"].dtype == torch.uint8
            for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                wanted = torch.zeros_like(mask)
                wanted[box[1] : box[3], box[0] : box[2]] = 1
                assert torch.equal(mask, wanted)


def test_keypoints_and_images_that_show_too_few(tmp_path: Path) -> None:
    def change(content: Content) -> None:
        for entry in content["annotations"]:
            if entry["image_id"] == 10:
                entry["keypoints"][9 * 3 :] = [0] * 8 * 3  # 9 are left

    found = loaded(tmp_path, change, task="keypoints")
    assert (len(found), found.classes) == (7, 2)
    target = found[0][1]
    assert target["keypoints"].shape == (2, 17, 3)
    assert target["keypoints"][0, :, 2].tolist() == [2.0] * 15 + [0.0] * 2
    assert len(loaded(tmp_path, change, task="keypoints", split="test")) == 8
    assert found.ground_truth()["annotations"][0]["num_keypoints"] == 15


def test_mirrors(tmp_path: Path) -> None:
    found = loaded(tmp_path, task="keypoints")
    mirror = found.keypoint_mirror
    assert mirror[0] == 0
    assert all(mirror[mirror[k]] == k for k in range(17))
    assert KEYPOINTS[mirror[KEYPOINTS.index("left_wrist")]] == "right_wrist"
    plain = dict(enumerate(zip(*next(detection_batches(found, 8)), strict=True)))
    turned = 0
    for index, (image, target) in enumerate(zip(*next(detection_batches(found, 8, flip=True)), strict=True)):
        before, known = plain[index]
        width = image.shape[-1]
        if torch.equal(image, before):
            assert all(torch.equal(target[key], known[key]) for key in known)
            continue
        turned += 1
        assert torch.equal(image, before.flip(-1))
        x1, y1, x2, y2 = known["boxes"].unbind(1)
        assert torch.equal(target["boxes"], torch.stack([width - x2, y1, width - x1, y2], 1))
        wrist, other = KEYPOINTS.index("left_wrist"), KEYPOINTS.index("right_wrist")
        assert torch.equal(target["keypoints"][:, wrist, 0], width - known["keypoints"][:, other, 0])
        assert torch.equal(target["keypoints"][:, 15:], torch.zeros(len(target["labels"]), 2, 3)), "not labelled"
    assert 0 < turned < 8
    assert "masks" in loaded(tmp_path, task="instances")[0][1]


def test_batches_depend_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    found = loaded(tmp_path, task="instances")
    options: dict[str, Any] = {"seed": 3, "epoch": 2, "shuffle": True, "flip": True}
    whole = list(detection_batches(found, 3, **options))
    torch.rand(5)
    late = list(detection_batches(found, 3, start=1, workers=1, **options))
    assert [len(images) for images, _ in whole] == [3, 3, 2]
    for (images, targets), (again, repeated) in zip(whole[1:], late, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(images, again, strict=True))
        for target, other in zip(targets, repeated, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[key], other[key]) for key in target)
    numbers = [int(target["image_id"]) for _, targets in whole for target in targets]
    assert sorted(numbers) == list(range(10, 18))
    assert numbers != sorted(numbers)
    assert [len(images) for images, _ in detection_batches(found, 3, drop_last=True)] == [3, 3]


def _set(path: str, value: object) -> Callable[[Content], object]:
    """Set content[list][0][key] for a path list/key, or content[list] itself."""
    name, _, key = path.partition("/")
    return (lambda c: c[name][0].update({key: value})) if key else (lambda c: c.update({name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("images", None), "in COCO's format, got .* without a list 'images'"),
        (_set("images", []), "a file with images, got .* with none"),
        (_set("images/id", 11), r"images\[1\] in .* must be an entry with an id of its own.*got id '11'"),
        (_set("images/id", "a"), r"images\[0\] in .* must be an entry with an id of its own"),
        (_set("images/file_name", "../secret.png"), r"images\[0\].* must be an image whose file_name lies inside"),
        (_set("images/file_name", "/etc/passwd"), r"images\[0\].* must be an image whose file_name lies inside"),
        (_set("images/width", 0), r"width of images\[0\] .* must be an int at least 1, got 0"),
        (_set("categories/id", 0), r"categories\[0\] .* must be a category with a name and an id of at least 1"),
        (_set("annotations/image_id", 99), r"annotations\[0\] .* must be an object of an image .* got image_id '99'"),
        (_set("annotations/category_id", 1), r"must be an object of a category in the file, got category_id '1'"),
        (_set("annotations/bbox", [1, 2, 3]), r"bbox of annotations\[0\] .* must be four finite numbers, got \[1, 2"),
        (_set("annotations/bbox", [0, 0, float("nan"), 1]), r"bbox of annotations\[0\] .* must be four finite numbers"),
        (_set("annotations/iscrowd", 2), "must be an object with a finite area and iscrowd 0 or 1"),
        (
            _set("annotations/segmentation", None),
            r"segmentation of annotations\[0\] .* must be polygons, or run lengths",
        ),
        (_set("annotations/segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "must be polygons of finite x and y"),
        (_set("annotations/segmentation", [["a"] * 6]), "must be polygons of finite x and y"),
        (
            _set("annotations/segmentation", {"size": [64, 96], "counts": [0, 10**9]}),
            "must be polygons, or run lengths of 64×96 pixels",
        ),
        (
            lambda c: [entry.update(iscrowd=1) for entry in c["annotations"]],
            "objects that have an area and are no crow",
        ),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, change: Callable[[Content], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        loaded(tmp_path, change, task="instances")


def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="root must be the folder that holds annotations/"):
        data.load("coco")
    with pytest.raises(FileNotFoundError, match=r"got .*annotations.instances_train2017.json, which does not exist"):
        data.load("coco", root=tmp_path)
    path = write_coco(tmp_path)
    for name in ("000000000013.png", "000000000015.png", "000000000017.png"):
        (tmp_path / "train2017" / name).unlink()
        with pytest.raises(FileNotFoundError, match=r"must hold the images .*, 000000000013\.png ") as caught:
            data.load("coco", root=tmp_path)
    assert "000000000013.png and 2 more are missing" in str(caught.value)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="folder must hold the images"):
        data.load("coco", root=tmp_path)
    for text in ("{", "[" * 100_000, "[]", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="annotations must be a JSON file in COCO's format"):
            data.load("coco", root=tmp_path)
    found = loaded(tmp_path, _set("images/width", 70))
    with pytest.raises(ValueError, match="images must be of the sizes in .*, got .* of 64×96 where they say 64×70"):
        found[0]
    (tmp_path / "train2017" / "000000000011.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images must be files that Pillow can read, got .*11\.png"):
        found[1]
    with pytest.raises(ValueError, match="task must be one of .*did you mean 'keypoints'"):
        data.load("coco", root=tmp_path, task="keypoint")
    with pytest.raises(TypeError, match="options of coco must be among"):
        data.load("coco", root=tmp_path, size=3)
    with pytest.raises(ValueError, match="categories name their keypoints"):
        CocoSet(tmp_path / "train2017", path, task="keypoints")
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r"masks need pycocotools.*fastrank\[detection\]"):
        data.load("coco", root=tmp_path, task="instances")
