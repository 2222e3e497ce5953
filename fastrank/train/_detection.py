"""Detectors of torchvision's kind: their training, and the average precisions that COCO's own program finds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastrank import _checks
from fastrank.data import CocoSet, ImageSet, detection_batches
from fastrank.distributed import ALONE, Parallel
from fastrank.train._config import TrainConfig
from fastrank.train._evaluate import flags_restored, ready, resolve_device
from fastrank.train._task import Outcome, Task

# What is measured for each task of the data, the foremost first.
KINDS = {"detection": ("bbox",), "instances": ("segm", "bbox"), "keypoints": ("keypoints", "bbox")}
_OUTPUTS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
# Where COCO's program puts what; the lists differ because persons are measured at 20 detections an image alone.
_BOX_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
_KEYPOINT_STATS = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75")
_COCO_KEYPOINTS = 17


@dataclass(frozen=True)
class DetectionResult:
    """Average precision and recall as COCO defines them, shares of 1.

    kind: what is compared: "bbox", "segm" (masks) or "keypoints". ap, ar: means over the overlaps 0.50, 0.55 … 0.95
    (for keypoints, over as many object similarities); ap50, ap75, ar50, ar75: at one of them; ar1, ar10, ar100: ar with
    so many detections an image. None: not defined for the kind (ar1 … ar100 for keypoints; ar, ar50, ar75 for the
    others), or no object of that size. count: images. boxes: the result for the boxes of a mask or keypoint network.
    """

    kind: str
    count: int
    ap: float
    ap50: float
    ap75: float
    ar1: float | None = None
    ar10: float | None = None
    ar100: float | None = None
    ar: float | None = None
    ar50: float | None = None
    ar75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    boxes: DetectionResult | None = None

    def metrics(self) -> dict[str, float]:
        """{"bbox_ap": ..., ...}: the columns of the published tables, of the boxes as well where they come second."""
        names = ("ap", "ap50", "ap75", "ar1", "ar10", "ar100", "ar", "ar50", "ar75")
        found = {f"{self.kind}_{name}": getattr(self, name) for name in names if getattr(self, name) is not None}
        return found if self.boxes is None else {**found, **self.boxes.metrics()}


class Detection(Task):
    """The sum of the losses that the model gives in training mode; `flip` is the only augmentation.

    The model takes a list of images (3, H, W) and, in training mode, a list of targets; it returns a dict of 0-d losses
    there, and elsewhere a list of dicts of boxes, labels, scores and, where it has them, masks or keypoints.
    """

    name = "detection"

    def check(self, config: TrainConfig, train: Dataset[Any], test: Dataset[Any] | None) -> None:
        """Refuse settings of classification, and test data that is no `CocoSet` of the same categories."""
        for setting in ("label_smoothing", "shift"):
            if getattr(config, setting):
                raise _checks.fail(setting, "0 where task is 'detection'", getattr(config, setting))
        if test is None:
            return
        if not isinstance(test, CocoSet):
            raise _checks.fail_type("test_data", "a fastrank.data.CocoSet where task is 'detection'", test)
        if isinstance(train, CocoSet) and (train.task, train.category_of) != (test.task, test.category_of):
            raise _checks.fail("test_data", "of the task and the categories of train_data", f"those of {test.folder}")

    def ready(self, name: str, data: Dataset[Any], device: torch.device) -> Dataset[Any]:
        """A data set of images and targets; it stays where it is."""
        if isinstance(data, ImageSet):
            raise _checks.fail_type(name, "a data set of images and targets, such as fastrank.data.CocoSet,", data)
        return ready(name, data, device)

    def batches(
        self,
        data: Dataset[Any],
        config: TrainConfig,
        device: torch.device,
        epoch: int,
        start: int,
        drop_last: bool,
        parallel: Parallel = ALONE,
    ) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Lists of images and of targets, shuffled and mirrored."""
        source = detection_batches(
            data,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            start=start,
            shuffle=True,
            flip=config.flip,
            drop_last=drop_last,
            workers=config.workers,
            part=parallel.part,
        )
        for images, targets in source:
            there = [{key: value.to(device, non_blocking=True) for key, value in t.items()} for t in targets]
            yield [image.to(device, non_blocking=True) for image in images], there

    def outcome(
        self,
        model: nn.Module,
        batch: tuple[list[Tensor], list[dict[str, Tensor]]],
        data: Dataset[Any],
        config: TrainConfig,
        autocast: AbstractContextManager[Any],
    ) -> Outcome:
        """The sum of the losses; there is no count of right answers."""
        _require_classes(model, data)
        images, targets = batch
        with autocast:
            losses = model(images, targets)
        if not isinstance(losses, Mapping) or not losses or not all(isinstance(v, Tensor) for v in losses.values()):
            raise _checks.fail_type("output of the model in training mode", "a dict of losses", losses)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        return Outcome(loss, torch.zeros_like(loss.detach()), len(images))

    def test(
        self, model: nn.Module, data: Dataset[Any], config: TrainConfig, parallel: Parallel = ALONE
    ) -> Mapping[str, Any]:
        """The columns of the published tables, as the row's metrics; every rank looks at all images."""
        found = evaluate_detection(model, data, config.batch_size, workers=config.workers)
        return {"metrics": found.metrics()}


def evaluate_detection(
    model: nn.Module, data: Dataset[Any], batch_size: int = 4, device: str | None = None, *, workers: int = 0
) -> DetectionResult:
    """What a detector finds in a `CocoSet`, in evaluation mode and without gradients, judged by pycocotools.

    Masks are judged for data of the task "instances", keypoints for "keypoints", boxes always. Every training flag is
    restored. device: by default the model's; otherwise the model is moved there.
    Raises ImportError without pycocotools, ValueError or TypeError where model and data do not belong together.
    """
    where = resolve_device(device, model)
    if not isinstance(data, CocoSet):
        raise _checks.fail_type("data", "a fastrank.data.CocoSet", data)
    ready("data", data, where)
    _require_classes(model, data)
    kinds = KINDS[data.task]
    if "keypoints" in kinds and len(data.annotations.keypoint_names) != _COCO_KEYPOINTS:
        found = f"{len(data.annotations.keypoint_names)} keypoints"
        raise _checks.fail("data", f"of COCO's {_COCO_KEYPOINTS} keypoints, whose tolerances are known", found)
    truth = _coco(data.ground_truth())
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    model.to(where)
    with flags_restored(model), torch.no_grad():
        model.eval()
        for images, targets in detection_batches(data, batch_size, workers=workers):
            outputs = model([image.to(where) for image in images])
            _require_outputs(outputs, len(images), kinds)
            for target, output in zip(targets, outputs, strict=True):
                known = _known(output, data)
                for kind in kinds:
                    results[kind] += _entries(kind, known, int(target["image_id"]), data)
    boxes = _judge("bbox", truth, results["bbox"], len(data), None)
    return boxes if kinds[0] == "bbox" else _judge(kinds[0], truth, results[kinds[0]], len(data), boxes)


def _require_classes(model: nn.Module, data: Dataset[Any]) -> None:
    """Refuse a two-stage detector of torchvision whose labels would mean something else than the data's."""
    scores: Any = getattr(getattr(getattr(model, "roi_heads", None), "box_predictor", None), "cls_score", None)
    if not isinstance(scores, nn.Linear) or not isinstance(data, CocoSet):
        return
    fits = scores.out_features == data.classes if data.contiguous else scores.out_features >= data.classes
    if not fits:
        expected = f"a detector of {data.classes} classes, background included, as the data"
        hint = "" if not data.contiguous else "; contiguous=False keeps the category ids of the file as labels"
        raise _checks.fail("model", expected, f"{scores.out_features}{hint}")


def _require_outputs(outputs: Any, images: int, kinds: tuple[str, ...]) -> None:
    wanted = ["boxes", "labels", "scores", *(_OUTPUTS[kind] for kind in kinds if kind != "bbox")]
    if not isinstance(outputs, list | tuple) or len(outputs) != images:
        raise _checks.fail_type("output of the model", f"a list of {images} dicts, one an image", outputs)
    for output in outputs:
        absent = [key for key in wanted if not isinstance(output, Mapping) or not isinstance(output.get(key), Tensor)]
        if absent:
            raise _checks.fail("output of the model", f"dicts of tensors with the keys {wanted}", f"no {absent[0]!r}")


def _known(output: Mapping[str, Tensor], data: CocoSet) -> Mapping[str, Tensor]:
    """The detections of categories of the data. Ids have gaps, and pycocotools passes over what is found of those."""
    labels = output["labels"].tolist()
    known = [label in data.category_of for label in labels]
    if all(known):
        return output
    if data.contiguous:
        raise _checks.fail("labels of the model", f"between 1 and {data.classes - 1}", labels[known.index(False)])
    kept = torch.tensor(known, device=output["labels"].device)
    return {key: value[kept] for key, value in output.items()}


def _entries(kind: str, output: Mapping[str, Tensor], image_id: int, data: CocoSet) -> list[dict[str, Any]]:
    """What was found in one image, as pycocotools wants it."""
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    if kind == "bbox":
        corners = output["boxes"].double().cpu()
        values: list[Any] = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    elif kind == "segm":
        values = [_encoded(mask) for mask in output["masks"]]
    else:
        points = output["keypoints"].double().cpu()
        values = points.flatten(1).tolist()
    key = "segmentation" if kind == "segm" else kind
    return [
        {"image_id": image_id, "category_id": data.category_of[label], key: value, "score": score}
        for label, value, score in zip(labels, values, scores, strict=True)
    ]


def _encoded(mask: Tensor) -> Any:
    """Run lengths of a mask (1, H, W) of probabilities, inside where above one half."""
    from pycocotools import mask as coco_mask

    return coco_mask.encode(numpy.asfortranarray((mask[0] > 0.5).to(torch.uint8).cpu().numpy()))


def _coco(content: dict[str, Any]) -> Any:
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ImportError(
            "average precision needs pycocotools, which is absent: pip install 'fastrank[detection]'"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = content
        index.createIndex()
    return index


def _judge(
    kind: str, truth: Any, results: list[dict[str, Any]], images: int, boxes: DetectionResult | None
) -> DetectionResult:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes looks at the first entry.
        found = truth.loadRes(results) if results else _coco({**truth.dataset, "annotations": []})
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = _KEYPOINT_STATS if kind == "keypoints" else _BOX_STATS
    stats = {name: float(value) for name, value in zip(names, judge.stats, strict=False)}
    defined = {name: value for name, value in stats.items() if value >= 0}  # −1 stands for no object at all
    if "ap" not in defined:
        raise _checks.fail("data", f"a set with objects to measure {kind} on", "none")
    return DetectionResult(kind=kind, count=images, boxes=boxes, **defined)
