"""Everything in fastrank that reads a file from elsewhere: how it is called, valid files to start from, its refusals.

A target takes the bytes that a fuzzer made. `wrap` puts them behind what would stop them at once, a checksum or a
compression, so that the code behind that is reached too.
"""

from __future__ import annotations

import atexit
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from torch import Tensor, nn

import fastrank
from fastrank import LayerPlan, Plan, _backends, _files, _tables, data, hub, models, recipe
from fastrank import io as model_io
from fastrank.data import ImageSet, TarSet
from fastrank.data._annotations import read_annotations
from fastrank.models.rates import parse_rates
from fastrank.regularize import LowRankProjection, NuclearNorm
from fastrank.train import TrainConfig, _checkpoint, fit

REFUSALS = (ValueError, TypeError, FileNotFoundError)


@dataclass(frozen=True)
class Target:
    """file: the name it is read under. read: takes the folder. seeds: valid payloads. says: what refusals begin with.

    pickles: whether the format is a pickle, of which a reader with a list of names is part.
    prepare: writes what else has to lie in the folder.
    """

    file: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    says: str
    wrap: Callable[[bytes], bytes] = bytes
    pickles: bool = False
    prepare: Callable[[Path], object] | None = None


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.b(self.a(x).relu()).mean((2, 3)))
        return out


@cache
def _model() -> _Small:
    torch.manual_seed(0)
    return _Small()


# Plans, rates, recipes


def _read_plan(folder: Path) -> object:
    plan = Plan.load(folder / "plan.json")
    assert Plan.from_json(plan.to_json()) == plan
    state = {name: tensor.clone() for name, tensor in _model().state_dict().items()}
    try:
        return fastrank.compress(_model(), plan)
    finally:
        assert all(torch.equal(state[name], tensor) for name, tensor in _model().state_dict().items())


def _plans() -> list[bytes]:
    layers = {"a": LayerPlan("tucker2", (2, 3), "so", (6, 3, 3, 3), {"error": 0.5}), "b": LayerPlan("cp", (2,))}
    more = {"a": LayerPlan("svd-spatial", (2,)), "b": LayerPlan("svd-decoupled", (1,))}
    rest = {"a": LayerPlan("dense"), "b": LayerPlan("cp-layer", (3,))}
    plans = (Plan(layers, "norton", {"rank": 3, "guard": "macs"}), Plan(more, "x", {"calibrated": False}), Plan(rest))
    return [plan.to_json().encode() for plan in plans]


def _read_rates(folder: Path) -> object:
    text = (folder / "rates.txt").read_bytes().decode("utf-8", "surrogateescape")
    return parse_rates(text)


RATES = [b"[0.]+[0.1]*2+[0.4]*5+[0.75]*12", b"[0.2,0.3, .5]*3*2+[]+[1e-1]", b"[ 0 ]+[0.99]"]


def _read_recipe(folder: Path) -> object:
    return recipe.load(folder / "recipe.yaml").quick()


@cache
def _recipes() -> list[bytes]:
    folder = Path(__file__).parents[2] / "recipes"
    names = ("nrmf_lenet5_digits", "funnel_lenet5_digits", "norton_resnet20_digits", "musco_lenet5_digits")
    found = [yaml.safe_load((folder / f"{n}.yaml").read_bytes()) for n in names if (folder / f"{n}.yaml").is_file()]
    return [yaml.safe_dump(document, sort_keys=False).encode() for document in found]


# Tensors, models, checkpoints


def _safetensors() -> list[bytes]:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1]), "e": torch.empty(0, 3)}
    return [_saved(tensors, {"k": "v"}), _saved({}, {})]


def _saved(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    path = scratch() / "saved"
    _files.save_tensors(path, tensors, metadata)
    return path.read_bytes()


@cache
def scratch() -> Path:
    """A folder of this process, removed at its end."""
    folder = tempfile.mkdtemp(prefix="fastrank-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _saved_model() -> tuple[dict[str, Tensor], str]:
    torch.manual_seed(0)
    model = fastrank.compress(models.build("lenet5_nrmf", num_classes=4), Plan({"conv3": LayerPlan("tucker2", (2, 3))}))
    path = scratch() / "model"
    fastrank.save(model, path, input_size=(1, 8, 8))
    tensors, metadata = _files.load_tensors(path)
    return tensors, metadata[model_io.KEY]


def _model_headers() -> list[bytes]:
    header = json.loads(_saved_model()[1])
    return [json.dumps(header).encode(), json.dumps({**header, "plan": None, "training": False}).encode()]


def _model_file(text: bytes) -> bytes:
    return _saved(_saved_model()[0], {model_io.KEY: text.decode("utf-8", "replace")})


def train(folder: Path) -> object:
    """A run of one step, kept in `folder` and resumed from what is there; refused, it leaves the model as it was."""
    torch.manual_seed(0)
    model = _Small()
    pixels = torch.linspace(-1, 1, 4 * 3 * 16).view(4, 3, 4, 4)
    images = ImageSet(pixels, torch.arange(4) % 3, classes=3)
    penalties = [NuclearNorm(model, 1e-3), LowRankProjection(model, every=1, energy=0.9, warm=True)]
    config = TrainConfig(1, 4, 0.01, momentum=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return fit(model, images, None, config, regularizers=penalties, run_dir=folder, progress=False)
    except REFUSALS:
        changed = [n for n, tensor in model.state_dict().items() if not torch.equal(before[n], tensor)]
        assert not changed, f"refused, and yet {changed} are not as they were"
        raise


@cache
def _checkpoint_of_run() -> tuple[dict[str, Tensor], str]:
    folder = scratch() / "run"
    train(folder)
    tensors, metadata = _files.load_tensors(folder / "checkpoint.safetensors")
    return tensors, metadata[_checkpoint.KEY]


def _checkpoint_file(text: bytes) -> bytes:
    return _saved(_checkpoint_of_run()[0], {_checkpoint.KEY: text.decode("utf-8", "replace")})


def _put_weights(folder: Path) -> None:
    (folder / hub.WEIGHTS).write_bytes(_whole_model())


@cache
def _whole_model() -> bytes:
    return _model_file(_model_headers()[0])


@cache
def _hub_configs() -> list[bytes]:
    hub.save_pretrained(models.build("lenet5_nrmf", num_classes=2), scratch() / "hub", input_size=(1, 8, 8))
    return [(scratch() / "hub" / hub.CONFIG).read_bytes()]


# Tables of measurements


WORK = _tables.ConvWork(2, 16, 32, (9, 7), (3, 3), (4, 8), (1, 1), (1, 1), (1, 1), False, "inference")
_HERE = ("tucker2_conv2d", "cpu", torch.float32, False, "no triton", "no cuda", "no host")


def _read_table(folder: Path) -> object:
    before = os.environ.get("FASTRANK_CACHE")
    os.environ["FASTRANK_CACHE"] = str(folder)
    _tables.forget()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # The whole choice, of a call that is a row of the seeds and of one that only their model knows.
            for work in (WORK, replace(WORK, ranks=(5, 8))):
                _backends.fastest(_backends.Facts(*_HERE, work, "cpu-x", 2))
        ours = [str(warning.message) for warning in caught if "the table " in str(warning.message)]
        if ours:
            raise ValueError(ours[0])
        return None
    finally:
        _tables.forget()
        os.environ.pop("FASTRANK_CACHE")
        if before is not None:
            os.environ["FASTRANK_CACHE"] = before


def _table_seeds() -> list[bytes]:
    times = {"dense": 1.0, "sequence": 2.0}
    group = _tables._model.Group(
        (1.0, 0.0, 2.5e-7, 0.0, 0.0, 0.0), ((1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0),), (0.25,)
    )
    scale = {"tucker2_conv2d dense inference": 1.5, "tucker2_conv2d sequence inference": 1.0}
    model = _tables.Model({"convolution": group, "convolution 1x1": group, "merge": group}, scale)
    row = _tables.Key("tucker2_conv2d", "float32", 2, WORK)
    table = _tables.Table("cpu-x", {"torch": "2"}, {row: times}, {("float32", False, 2): model})
    return [table.dumps().encode(), _tables.Table("cpu-x", rows={row: times}).dumps().encode()]


# Data sets


def _idx(count: int, dims: int) -> bytes:
    body = bytes(range(256)) * 4
    head = bytes([0, 0, 8, dims]) + count.to_bytes(4, "big")
    return head + (28).to_bytes(4, "big") * (dims - 1) + (body * count)[: count * 28 ** (2 * (dims == 3))]


def _images() -> list[bytes]:
    return [_idx(1, 3)]


def _zipped() -> list[bytes]:
    return [gzip.compress(_idx(1, 3))]


def _put_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(_idx(1, 1))


def _read_mnist(folder: Path) -> object:
    return data.load("mnist", root=folder, split="test")[0]


def _read_cifar(folder: Path) -> object:
    return data.load("cifar10", root=folder, split="test")[0]


def _cifar_pickles() -> list[bytes]:
    pixels = numpy.zeros((1, 3072), "u1")
    content = {"data": pixels, "labels": [3], "batch_label": b"x"}
    named = [{key.encode(): value for key, value in content.items()}, {**content, "data": numpy.asfortranarray(pixels)}]
    return [pickle.dumps(content, protocol) for protocol in (0, 2, 4, 5)] + [pickle.dumps(c, 2) for c in named]


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()


def _read_shard(folder: Path) -> object:
    found = TarSet([folder / "x.tar"], _pixels, (3, 4, 4), index=folder / "kept")
    return [found[position] for position in range(min(len(found), 3))]


def _tars() -> list[bytes]:
    picture = b"P6 4 4 255\n" + bytes(48)
    members = [("0.ppm", picture), ("0.cls", b"3"), (f"{'long' * 40}.cls", b"1"), (f"{'long' * 40}.ppm", picture)]
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, content in members[: 2 if form == tarfile.USTAR_FORMAT else 4]:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        found.append(file.getvalue().rstrip(b"\0") + bytes(1024 + 512))
    return found


def tar_checksums(content: bytes) -> bytes:
    """`content` with true checksums in every block that looks like a header of a tar file."""
    found = bytearray(content)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


@cache
def _shard_for_index() -> tuple[bytes, bytes, str]:
    """A shard, the entries of its index, and what the index says of the file."""
    folder = scratch() / "shard"
    folder.mkdir()
    (folder / "x.tar").write_bytes(_tars()[0])
    os.utime(folder / "x.tar", (1, 1))
    TarSet([folder / "x.tar"], _pixels, (3, 4, 4), index=folder / "kept")
    tensors, metadata = _files.load_tensors(folder / "kept")
    return _tars()[0], bytes(tensors["entries"].numpy().tobytes()), json.dumps(metadata)


def _put_shard(folder: Path) -> None:
    (folder / "x.tar").write_bytes(_shard_for_index()[0])
    os.utime(folder / "x.tar", (1, 1))


def _index_file(entries: bytes) -> bytes:
    tensor = torch.frombuffer(bytearray(entries or b"\0"), dtype=torch.uint8)
    return _saved({"entries": tensor}, json.loads(_shard_for_index()[2]))


def _read_annotations(folder: Path) -> object:
    found = [read_annotations(folder / "a.json", shapes=True, keypoints=kind) for kind in (False, True)]
    return [part.rows(0) for part in found]


def _annotation_seeds() -> list[bytes]:
    images = [{"id": 3, "file_name": "a.png", "width": 4, "height": 4}, {"id": 1, "file_name": "b/c.png"}]
    images[1].update(width=2, height=2)
    box = {"image_id": 3, "category_id": 7, "bbox": [0, 0.5, 2, 2], "area": 4.0, "iscrowd": 0, "keypoints": [1, 1, 2]}
    shapes = ([[0, 0, 2, 0, 2, 2]], {"size": [4, 4], "counts": [0, 8, 8]}, {"size": [4, 4], "counts": "0`0"})
    entries = [{**box, "id": i, "segmentation": shape} for i, shape in enumerate(shapes)]
    categories = [{"id": 7, "name": "red", "keypoints": ["nose"]}]
    return [json.dumps({"images": images, "categories": categories, "annotations": entries}).encode()]


TARGETS: dict[str, Target] = {
    "plan": Target("plan.json", _read_plan, _plans, ""),
    "rates": Target("rates.txt", _read_rates, lambda: RATES, "compress_rate"),
    "recipe": Target("recipe.yaml", _read_recipe, _recipes, ""),
    "safetensors": Target("t", lambda f: _files.load_tensors(f / "t"), _safetensors, "path"),
    "model": Target("model", lambda f: fastrank.load(f / "model"), _model_headers, "path|.*: plan", _model_file),
    "checkpoint": Target(
        "checkpoint.safetensors",
        train,
        lambda: [_checkpoint_of_run()[1].encode()],
        "path|run_dir",
        _checkpoint_file,
    ),
    "hub": Target(hub.CONFIG, hub.from_pretrained, _hub_configs, "folder", prepare=_put_weights),
    "table": Target("cpu-x.json", _read_table, _table_seeds, "the table"),
    "mnist": Target("t10k-images-idx3-ubyte", _read_mnist, _images, "", prepare=_put_labels),
    "mnist-gzip": Target("t10k-images-idx3-ubyte.gz", _read_mnist, _images, "", gzip.compress, prepare=_put_labels),
    "gzip": Target("t10k-images-idx3-ubyte.gz", _read_mnist, _zipped, "", prepare=_put_labels),
    "cifar-binary": Target("test_batch.bin", _read_cifar, lambda: [bytes(3073) * 2], ""),
    "cifar-pickle": Target("test_batch", _read_cifar, _cifar_pickles, "", pickles=True),
    "shard": Target("x.tar", _read_shard, _tars, "shards", tar_checksums),
    "shard-index": Target(
        "kept", _read_shard, lambda: [_shard_for_index()[1]], "index|shards", _index_file, prepare=_put_shard
    ),
    "annotations": Target("a.json", _read_annotations, _annotation_seeds, ""),
}
