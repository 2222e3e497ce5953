"""Files made to harm: each is refused in one line, before it costs memory or time, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guards
import parsers
import pytest
import torch
from parser_targets import TARGETS, train
from parsers import refused
from torch import nn

import fastrank
from fastrank import LayerPlan, Plan, _files, hub
from fastrank.train import TrainConfig, _checkpoint, _sharded, fit

# YAML and JSON


def bomb(lines: int, key: str) -> str:
    """YAML whose values double with every line."""
    text = "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(lines))
    return f"a0: &a0 [x, x]\n{text}model: {{name: *a{lines}}}\n{key}"


GOOD = "model: {name: lenet5_nrmf}\ndata: {name: digits}\ntrain: {epochs: 1, batch_size: 4, lr: 0.1}\n"
RECIPES = {
    "aliases that double": (bomb(60, "data: {name: digits}\n"), r"holds an alias"),
    "merges that double": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}\n" for n in range(40)),
        "holds an alias",
    ),
    "a document within itself": ("&a\nmodel: *a\n", "holds an alias"),
    "a number to the base of 60": (GOOD.replace("0.1", ":".join(["1"] * 200_000)), "a value that is no text has"),
    "a number of half a million digits": (GOOD.replace("0.1", "9" * 500_000), "a value that is no text has"),
    "a number too large for a float": (GOOD.replace("0.1", "9" * 64), ""),
    "a key twice": (GOOD + "train: {epochs: 2, batch_size: 4, lr: 0.1}\n", "the key 'train' stands twice"),
    "a key twice inside": (GOOD.replace("epochs: 1", "epochs: 1, epochs: 2"), "the key 'epochs' stands twice"),
    "bool that is none": (GOOD.replace("0.1", "!!bool x"), "recipe must be YAML"),
    "int that is none": (GOOD.replace("0.1", "!!int ''"), "recipe must be YAML"),
    "float that is none": (GOOD.replace("0.1", "!!float ''"), "recipe must be YAML"),
    "time that is none": (GOOD.replace("0.1", "!!timestamp x"), "recipe must be YAML"),
    "a day that is none": (GOOD.replace("0.1", "2001-13-41"), "recipe must be YAML"),
    "a character that is none": (GOOD.replace("digits", '"\\UFFFFFFFF"'), "recipe must be YAML"),
    "a call": (GOOD.replace("0.1", "!!python/object/apply:os.mkdir [x]"), "recipe must be YAML"),
    "a surrogate": (GOOD.replace("digits", '"\\uD800"'), "data.name must be one of"),
    "not a number": (GOOD.replace("0.1", ".nan"), "train.lr must be a finite number"),
    "infinite": (GOOD.replace("0.1", ".inf"), "train.lr must be a finite number"),
    "another folder": ("extends: ../secret.yaml\n", "extends must be the name of a file in the same folder"),
    "the folder above": ("extends: ..\n", "recipe must be an existing YAML file"),
    "deep": ("model: " + "[" * 50_000, "recipe must be YAML"),
    "deep and whole": ("model: " + "{a: " * 3000 + "1" + "}" * 3000, "recipe must be YAML"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_hostile_recipes(kind: str, tmp_path: Path) -> None:
    text, expected = RECIPES[kind]
    if kind == "a number too large for a float":
        assert parsers.attempt(TARGETS["recipe"], text.encode(), tmp_path) == ""  # 1e64 is a learning rate
    else:
        assert expected in refused("recipe", text.encode(), tmp_path)


def test_line_ends_and_byte_order_marks_are_no_matter(tmp_path: Path) -> None:
    plan = TARGETS["plan"].seeds()[0]
    for name, payload in (("recipe", GOOD.encode()), ("plan", plan)):
        for same in (payload.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + payload):
            assert parsers.attempt(TARGETS[name], same, tmp_path) == ""


NESTED = {
    "plan": '{"format": "fastrank-plan", "version": 1, "layers": {}, "options": {"a": %s}}',
    "model": None,
    "checkpoint": None,
    "hub": '{"format": %s}',
    "table": '{"format": %s}',
    "annotations": '{"images": [{"id": %s}], "categories": [], "annotations": []}',
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_documents_around_the_limit_of_recursion(name: str, tmp_path: Path) -> None:
    """A depth that one step still takes may be too much for the next; whatever it is, it is one refusal."""
    target = TARGETS[name]
    frame = NESTED[name]
    if frame is None:
        header = json.loads(target.seeds()[0])
        holder = header["plan"]["options"] if name == "model" else header["identity"]
        holder["deep"] = "DEEP"
        frame = json.dumps(header).replace("%", "%%").replace('"DEEP"', "%s")
    for depth in (*range(904, 1000, 12), 2_000, 100_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            nested = opening * depth + "1" + closing * depth
            parsers.attempt(target, (frame % nested).encode(), tmp_path)


PLANS = {
    "a huge rank": ({"a": {"method": "cp", "ranks": [2**62]}}, "ranks must be between 1 and 1048576"),
    "ranks beyond the layer": (
        {"a": {"method": "tucker2", "ranks": [2**20, 2**20]}},
        "ranks[0] must be an int between",
    ),
    "a huge shape": ({"a": {"method": "cp", "ranks": [2], "shape": [2**62] * 4}}, "must be for a kernel of 6×3×3×3"),
    "a number of a thousand digits": ({"a": {"method": "cp", "ranks": [10**1000]}}, "ranks must be between"),
    "an estimate beyond floats": ({"a": {"method": "dense", "estimate": {"x": 10**400}}}, "must be a finite number"),
    "a path": ({"../../etc/passwd": {"method": "dense"}}, "plan.layers must be names of convolutions"),
    "twenty thousand layers": (
        {f"l{n}": {"method": "dense"} for n in range(20_000)},
        "plan.layers must be names of convolutions",
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_hostile_plans(kind: str, tmp_path: Path) -> None:
    layers, expected = PLANS[kind]
    document = {"format": "fastrank-plan", "version": 1, "layers": layers}
    assert expected in refused("plan", json.dumps(document).encode(), tmp_path)


@pytest.mark.parametrize(
    "text", ["[" + "0.1," * 90_000, "[0.1]*9999999999*9999999999", "[0.1]" + "*9" * 100_000, "[1e999]"]
)
def test_hostile_rates(text: str, tmp_path: Path) -> None:
    refused("rates", text.encode(), tmp_path, room=64 << 20)


# Tensors and models


def test_no_flipped_bit_and_no_cut_of_a_model_loads_as_something_else(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))

    path = tmp_path / "model"
    torch.manual_seed(0)
    model = fastrank.compress(network(), Plan({"0": LayerPlan("tucker2", (1, 2))}), guard=False)
    fastrank.save(model, path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    wanted, plan = model.state_dict(), model.fastrank_plan
    read = 0
    for at in range(len(data)):
        # Every bit of the length, one of every other byte: which of the eight goes round.
        for bit in range(8) if at < 8 else [at % 8]:
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                found = fastrank.load(path, network())
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017  (white space in the header may change unnoticed)
                continue
            read += 1
            assert at < header
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
            assert found.fastrank_plan == plan
    assert read < 8
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^path must be a"):
            fastrank.load(path, network())


def raw(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A safetensors file with a header of one's own, padded to whole words."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def summed(tensors: dict[str, dict[str, Any]], dtypes: list[str]) -> bytes:
    """One with the checksum that these empty tensors would have."""
    outline = [[name, dtype, tensors[name]["shape"]] for name, dtype in zip(sorted(tensors), dtypes, strict=True)]
    return raw({"__metadata__": {"sha256": hashlib.sha256(json.dumps([[], outline]).encode()).hexdigest()}, **tensors})


def test_shapes_that_no_memory_holds(tmp_path: Path) -> None:
    for shape in ([2**62], [2**31, 2**31], [2**20, 2**20]):
        for offsets in ([0, 0], [0, 2**40]):
            header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
            said = refused("safetensors", raw(header), tmp_path, room=64 << 20)
            assert said.startswith("path must be a whole safetensors file")
    for shape in ([0, 2**63], [0, 2**64 - 1], [0, 2**62, 2**62]):  # of no elements, but of what strides
        empty = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        refused("safetensors", summed(empty, ["torch.float32"]), tmp_path)
    refused("safetensors", (2**63).to_bytes(8, "little") + b"{}", tmp_path, room=64 << 20)
    refused("safetensors", (2**40).to_bytes(8, "little") + b"{}", tmp_path, room=64 << 20)


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_pickles_are_not_opened_by_any_reader_of_tensors(tmp_path: Path) -> None:
    folder, trace = tmp_path / "here", tmp_path / "trace"
    folder.mkdir()
    TARGETS["checkpoint"].seeds()  # what a first training imports is there
    torch.save({"a": Bomb(trace)}, tmp_path / "zip")
    torch.save({"a": Bomb(trace)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    zipped, old = (tmp_path / "zip").read_bytes(), (tmp_path / "old").read_bytes()
    images = fastrank.data.load("digits", split="test")
    readers: dict[str, Callable[[], object]] = {
        "t": lambda: _files.load_tensors(folder / "t"),
        "model": lambda: fastrank.load(folder / "model"),
        hub.WEIGHTS: lambda: hub.from_pretrained(folder),
        "checkpoint.safetensors": lambda: fit(
            fastrank.models.build("lenet5_nrmf"), images, None, TrainConfig(1, 64, 0.1), run_dir=folder, progress=False
        ),
    }
    (folder / hub.CONFIG).write_bytes(TARGETS["hub"].seeds()[0])
    for content in (zipped, old, pickle.dumps(Bomb(trace))):
        for name, read in readers.items():
            (folder / name).write_bytes(content)
            with guards.watched(folder), pytest.raises(ValueError, match=r"a pickle by its first bytes: not opened"):
                read()
            (folder / name).unlink()
    assert not trace.exists()


@pytest.mark.parametrize(
    "part", ["{", "{}", "[]", '{"model/a.bias": {}}', '{"model/a.bias": {"saved_offsets": 3}}', "[" * 100_000]
)
def test_a_shard_that_describes_itself_wrongly(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a true checksum, so that torch.distributed.checkpoint reads the description."""
    runs: list[_checkpoint.Run] = []
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "save", lambda _, run: runs.append(run))
        train(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is not initialised
        _sharded.save(tmp_path / "checkpoint.json", runs[0])
    (shard,) = tmp_path.glob("*/*.safetensors")
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["DCP_SHARDING_INFO"] = part
    shard.write_bytes(raw(header, data[start:]))
    said = json.loads((shard.parent / "header.json").read_text())
    said["files"] = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()}
    (shard.parent / "header.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"^run_dir must be a folder whose checkpoint is whole") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)


def test_hub_names_are_neither_downloaded_nor_paths_out(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with guards.watched(tmp_path):
        for name in ("someone/model", "https://example.org/model", "hf-hub:someone/model", ""):
            with pytest.raises(FileNotFoundError, match=r"^folder must be a local folder"):
                hub.from_pretrained(Path("/nowhere") / name if name == "" else name)
    secret = tmp_path / "secret"
    secret.write_bytes(b"{}")
    (tmp_path / "here" / hub.CONFIG).symlink_to(secret)
    with pytest.raises(FileNotFoundError, match=r"without model\.safetensors"):
        hub.from_pretrained(tmp_path / "here")


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "checkpoint-000000001-0123456z", "checkpoint-000000001-01234567/..", 3]
)
def test_the_pointer_of_a_sharded_checkpoint_stays_in_its_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(json.dumps({"folder": name, "step": 1}))
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), fastrank.data.load("digits", split="test")
    config = TrainConfig(1, 64, 0.1)
    with guards.watched(tmp_path), pytest.raises(ValueError, match=r"^run_dir must be .* in its part 'folder'"):
        fit(model, images, None, config, run_dir=tmp_path, progress=False)
