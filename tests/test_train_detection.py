"""Detection: the loop's losses, bit-exact resuming, average precisions that are known beforehand, and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import KEYPOINTS, Tiny, lighten, write_coco
from torch import Tensor, nn

from fastrank import _files, data, models
from fastrank.data import CocoSet, ImageSet, detection_batches
from fastrank.regularize.base import Regularizer
from fastrank.train import DetectionResult, History, TrainConfig, evaluate_detection, fit
from fastrank.train._checkpoint import KEY

Target = dict[str, Tensor]
# Of pycocotools itself, under recent versions of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Results depend on the thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts of the tiny set: objects for training and testing, persons for testing."""
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    write_coco(folder, "val2017", count=4)
    write_coco(folder, "val2017", count=4, kind="keypoints")
    return folder


def loaded(root: Path, split: str = "train", **options: Any) -> CocoSet:
    found = data.load("coco", root=root, split=split, **options)
    assert isinstance(found, CocoSet)
    return found


def detector(classes: int = 4, **options: Any) -> nn.Module:
    """A Faster R-CNN of 3 million parameters."""
    tv = pytest.importorskip("torchvision.models.detection.faster_rcnn")
    torch.manual_seed(1)
    model: Any = models.build(
        "fasterrcnn", backbone=Tiny(), num_classes=classes, **{"min_size": [64, 80], "max_size": 96, **options}
    )
    model.roi_heads.box_head = tv.TwoMLPHead(256 * 7 * 7, 16)
    model.roi_heads.box_predictor = tv.FastRCNNPredictor(16, classes)
    found: nn.Module = lighten(model)
    return found


def config(**options: Any) -> TrainConfig:
    settings = {"epochs": 2, "batch_size": 3, "lr": 0.01, "weight_decay": 1e-4, "schedule": "constant", "flip": True}
    return TrainConfig(**{**settings, **options})


class Stop(Regularizer):
    """An interruption before step number `at`, counted from 0 over this process."""

    def __init__(self, at: int | None) -> None:
        self._at, self._steps = at, 0

    def add_gradients(self) -> None:
        if self._steps == self._at:
            raise KeyboardInterrupt
        self._steps += 1

    def value(self) -> Tensor:
        return torch.zeros(())


def test_the_compressed_backbone_learns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    rates = "[0.]+[0.1]*2+[0.4]*5+[0.75]*12"
    model = lighten(models.build("fasterrcnn", rank=1, compress_rate=rates, num_classes=4, min_size=64, max_size=96))
    before = model.get_parameter("backbone.body.layer1.0.conv2.pointwise").detach().clone()
    history = fit(model, loaded(root), loaded(root, "test"), config(epochs=3, batch_size=4, lr=0.002), task="detection")
    assert all(0 < row.loss < 10 for row in history)
    assert history[-1].loss < history[0].loss
    assert not torch.equal(model.get_parameter("backbone.body.layer1.0.conv2.pointwise"), before)
    columns = ["ap", "ap50", "ap75", "ar1", "ar10", "ar100"]
    assert list(history[0].metrics) == [f"bbox_{name}" for name in columns]
    assert (history[0].train_top1, history[0].test_top1, history[0].test_top5) == (None, None, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "bbox_ap 0." in err.splitlines()[0]
    assert "train:" in err
    assert "%" not in err
    assert model.training


def test_equals_a_loop_written_out(root: Path) -> None:
    found, settings = loaded(root), config(batch_size=7, seed=4)  # the last batch is of one image
    model, twin = detector(), detector()
    history = fit(model, found, None, settings, task="detection", progress=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    totals = [0.0, 0.0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for epoch in range(2):
            for images, targets in detection_batches(found, 7, seed=4, epoch=epoch, shuffle=True, flip=True):
                optimizer.zero_grad()
                loss = sum(twin.train()(images, targets).values())
                loss.backward()
                optimizer.step()
                totals[epoch] += loss.item() * len(images)
    assert [row.loss for row in history] == pytest.approx([total / 8 for total in totals])
    assert history[0].metrics == {}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-6, atol=1e-7)


def run(folder: Path, root: Path, stop_at: int | None = None, **options: Any) -> History:
    """Two epochs of three steps with all that is random: the order, mirrors, resizing, and the samples of boxes."""
    model = detector()
    return fit(
        *(model, loaded(root), loaded(root, "test"), config(**options)),
        regularizers=[Stop(stop_at)],
        run_dir=folder,
        task="detection",
        progress=False,
    )


def kept(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = _files.load_tensors(folder / "checkpoint.safetensors")
    header = json.loads(metadata[KEY])
    for row in [header, *header["history"]]:
        del row["seconds"]
    return tensors, header


def test_interrupted_and_resumed_bit_for_bit(root: Path, tmp_path: Path) -> None:
    wanted = run(tmp_path / "whole", root)
    tensors, header = kept(tmp_path / "whole")
    for stop_at in (2, 5):
        folder = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(folder, root, stop_at, checkpoint_steps=2)
        torch.rand(3)
        again = run(folder, root, checkpoint_steps=4)
        found, told = kept(folder)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert told == header
        assert [row.metrics for row in again] == [row.metrics for row in wanted]
    assert run(tmp_path / "whole", root, 0) == wanted, "a finished run is restored at once"
    with pytest.raises(ValueError, match="with task detection where this run has classification"):
        fit(detector(), loaded(root), None, config(), run_dir=tmp_path / "whole", regularizers=[Stop(None)])


def test_mixed_precision(root: Path) -> None:
    (row,) = fit(detector(), loaded(root), None, config(epochs=1, amp="bf16"), task="detection", progress=False)
    (plain,) = fit(detector(), loaded(root), None, config(epochs=1), task="detection", progress=False)
    assert row.loss != plain.loss
    assert row.loss == pytest.approx(plain.loss, rel=0.2)


class Oracle(nn.Module):
    """Answers with the targets of the data in their order, changed."""

    def __init__(self, known: CocoSet, change: Callable[[Target], object] = lambda answer: None) -> None:
        super().__init__()
        self.known, self.change, self.next = known, change, 0
        self.norm = nn.BatchNorm1d(1)

    def forward(self, images: list[Tensor]) -> list[Target]:
        assert not self.training
        assert not torch.is_grad_enabled()
        answers = []
        for image in images:
            wanted, target = self.known[self.next]
            assert torch.equal(image, wanted)
            answer = {key: target[key] for key in ("boxes", "labels", "masks", "keypoints") if key in target}
            answer["scores"] = torch.ones(len(target["labels"]))
            if "masks" in answer:
                answer["masks"] = answer["masks"][:, None].float() * 0.6
            self.change(answer)
            answers.append(answer)
            self.next += 1
        return answers


def judged(known: CocoSet, change: Callable[[Target], object] = lambda answer: None) -> DetectionResult:
    return evaluate_detection(Oracle(known, change), known, 3)


def empty(answer: Target) -> None:
    answer.update({key: value[:0] for key, value in answer.items()})


@pytest.mark.parametrize("task", ["detection", "instances", "keypoints"])
def test_everything_found_and_nothing_found(root: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = loaded(root, "test", task=task)
    kind = {"detection": "bbox", "instances": "segm", "keypoints": "keypoints"}[task]
    for change, share in ((lambda answer: None, 1.0), (empty, 0.0)):
        found = judged(known, change)
        assert (found.kind, found.count) == (kind, 4)
        assert (found.ap, found.ap50, found.ap75) == pytest.approx((share,) * 3, abs=1e-9)
        boxes = found if task == "detection" else found.boxes
        assert boxes is not None
        assert (boxes.kind, boxes.boxes) == ("bbox", None)
        assert (boxes.ap, boxes.ar10, boxes.ar100) == pytest.approx((share,) * 3, abs=1e-9)
        if task == "keypoints":
            assert (found.ar, found.ar50, found.ar75) == pytest.approx((share,) * 3, abs=1e-9)
            assert found.ar1 is None
        else:
            assert (found.ar, found.ap_large) == (None, None), "there are no large objects"
        assert next(iter(found.metrics())) == f"{kind}_ap"
        assert "bbox_ap" in found.metrics()
    assert capsys.readouterr().out == ""


def test_precision_and_recall_of_known_errors(root: Path) -> None:
    known = loaded(root, "test")

    def narrower(answer: Target) -> None:  # overlaps of 0.62 pass at 0.50, 0.55 and 0.60
        boxes = answer["boxes"].clone()
        boxes[:, 2] = boxes[:, 0] + 0.62 * (boxes[:, 2] - boxes[:, 0])
        answer["boxes"] = boxes

    found = judged(known, narrower)
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((0.3, 1, 0), abs=1e-9)
    assert found.ar100 == pytest.approx(0.3)

    def other_class(answer: Target) -> None:
        answer["labels"] = answer["labels"] % 3 + 1

    assert judged(known, other_class).ap == 0


def test_crowds_and_what_lies_in_them_do_not_count(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == 11)

    write_coco(tmp_path, "val2017", count=4, change=change)
    known = loaded(tmp_path, "test")
    assert len(known[1][1]["labels"]) == 0
    whole = {int(entry["image_id"]): entry for entry in known.ground_truth()["annotations"]}
    box = torch.tensor(whole[11]["bbox"])

    def in_the_crowd(answer: Target) -> None:
        if len(answer["labels"]) == 0:
            label = {number: label for label, number in known.category_of.items()}[whole[11]["category_id"]]
            answer |= {"labels": torch.tensor([label]), "scores": torch.ones(1)}
            answer["boxes"] = torch.cat([box[:2], box[:2] + box[2:]])[None].float()

    assert judged(known, in_the_crowd).ap == pytest.approx(1)


def test_original_ids_and_answers_in_their_gaps(root: Path) -> None:
    known = loaded(root, "test", contiguous=False)

    def gap(answer: Target) -> None:
        answer["labels"] = torch.cat([torch.tensor([5]), answer["labels"]])
        answer["scores"] = torch.cat([torch.tensor([1.0]), answer["scores"]])
        answer["boxes"] = torch.cat([answer["boxes"][:1], answer["boxes"]])

    assert judged(known, gap).ap == pytest.approx(1)
    with pytest.raises(ValueError, match="labels of the model must be between 1 and 3, got 5"):
        judged(loaded(root, "test"), gap)


def test_evaluation_leaves_no_trace(root: Path) -> None:
    model, known = detector(), loaded(root, "test")
    model.rpn.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    assert evaluate_detection(model, known, 1) == evaluate_detection(model, known, workers=1)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Wrong(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return self.answer


def test_wrong_arguments_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, tested = loaded(root), loaded(root, "test")
    images = ImageSet(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), classes=1)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((detector(), known, None, config(label_smoothing=0.1)), ValueError, "label_smoothing must be 0 where task is"),
        ((detector(), known, None, config(shift=1)), ValueError, "shift must be 0 where task is 'detection', got 1"),
        ((detector(), images, None, config()), TypeError, "train_data must be a data set of images and targets"),
        ((detector(), known, [1], config()), TypeError, "test_data must be a fastrank.data.CocoSet where task"),
        ((detector(), known, loaded(root, "test", task="keypoints"), config()), ValueError, "test_data must be of the"),
        ((detector(3), known, None, config()), ValueError, "a detector of 4 classes, background included, .* got 3;"),
        ((detector(5), known, None, config()), ValueError, "got 5; contiguous=False keeps the category ids"),
        ((Wrong([]), known, None, config()), TypeError, "output of the model in training mode must be a dict of loss"),
        ((detector(), known, None, "config"), TypeError, "config must be a TrainConfig"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(*arguments, task="detection", progress=False)
    with pytest.raises(ValueError, match=r"task must be one of \['classification', 'detection'\], got 'detect'"):
        fit(detector(), known, None, config(), task="detect")
    with pytest.raises(TypeError, match=r"data must be a fastrank.data.CocoSet, got ImageSet"):
        evaluate_detection(detector(), images)
    with pytest.raises(TypeError, match="output of the model must be a list of 4 dicts"):
        evaluate_detection(Wrong({}), tested)
    with pytest.raises(ValueError, match=r"output of the model must be dicts of tensors .* got no 'masks'"):
        judged(loaded(root, "test", task="instances"), lambda answer: answer.pop("masks"))

    def few(content: dict[str, Any]) -> None:
        content["categories"][0]["keypoints"] = list(KEYPOINTS[:3])
        for entry in content["annotations"]:
            del entry["keypoints"][9:]

    write_coco(tmp_path, "val2017", kind="keypoints", change=few)
    with pytest.raises(ValueError, match="data must be of COCO's 17 keypoints, .* got 3 keypoints"):
        judged(loaded(tmp_path, "test", task="keypoints"))

    def unlabelled(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["keypoints"] = [0] * 51

    write_coco(tmp_path, "val2017", kind="keypoints", change=unlabelled)
    with pytest.raises(ValueError, match="data must be a set with objects to measure keypoints on, got none"):
        judged(loaded(tmp_path, "test", task="keypoints"))
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"average precision needs pycocotools.*fastrank\[detection\]"):
        judged(tested)


def test_losses_that_are_not_finite_name_their_step(root: Path) -> None:
    model = detector()
    nn.init.constant_(model.get_parameter("rpn.head.cls_logits.bias"), float("nan"))
    with pytest.raises(RuntimeError, match="diverged: loss or gradients were not finite at step 1 of epoch 1"):
        fit(model, loaded(root), None, config(), task="detection", progress=False)
