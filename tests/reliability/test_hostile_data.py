"""Data sets and tables of measurements made to harm: refused in one line, before they cost memory or time."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guards
import pytest
import torch
from parser_targets import TARGETS, WORK
from parsers import refused

from fastrank.data import CocoSet, TarSet


def member(name: bytes, size: bytes, kind: bytes) -> bytes:
    """The header of a tar member, its checksum left to the target."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157], block[257:263] = name, size, kind, b"ustar\0"
    return bytes(block)


LARGE = b"\x80" + (2**40).to_bytes(11, "big")  # a size in GNU's binary form
BELOW = b"\xff" + (2**88 - 4096).to_bytes(11, "big")
SHARDS = {
    "a name of a terabyte": member(b"././@LongLink", LARGE, b"L") + bytes(1024),
    "notes of a terabyte": member(b"x", LARGE, b"x") + bytes(1024),
    "an image of a terabyte": member(b"0.cls", b"1", b"0") + b"3".ljust(512, b"\0") + member(b"0.ppm", LARGE, b"0"),
    "a label of a terabyte": member(b"0.cls", LARGE, b"0") + bytes(1024),
    "an image of a negative size": member(b"0.ppm", BELOW, b"0") + bytes(1024),
    "a folder that leads back": member(b"0", BELOW, b"7") + bytes(1024),
    "a sparse image": member(b"0.cls", b"1", b"0")
    + b"3".ljust(512, b"\0")
    + member(b"0.ppm", b"1", b"S")
    + bytes(1024),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_hostile_shards(kind: str, tmp_path: Path) -> None:
    assert refused("shard", SHARDS[kind], tmp_path, room=64 << 20).startswith("shards must be")


def test_names_in_shards_are_never_paths(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in (("../../0.ppm", b"P6 4 4 255\n" + bytes(48)), ("../../0.cls", b"3")):
            (tmp_path / "part").write_bytes(content)
            tar.add(tmp_path / "part", name)
        link = tarfile.TarInfo("1.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with guards.watched(folder):
        found = TarSet([folder / "x.tar"], lambda image: torch.zeros(3, 4, 4), (3, 4, 4))
        assert [label for _, label in (found[i] for i in range(len(found)))] == [3]


def test_images_of_more_pixels_than_pillow_unpacks(tmp_path: Path) -> None:
    picture = b"P6 40000 40000 255\n" + bytes(100)
    content = member(b"0.cls", b"1", b"0") + b"3".ljust(512, b"\0") + member(b"0.ppm", b"170", b"0")
    said = refused("shard", content + picture.ljust(512, b"\0") + bytes(1024), tmp_path)
    assert "decompression bomb" in said
    images = [{"id": 1, "file_name": "a.ppm", "width": 4, "height": 4}]
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4}
    content = {"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": [box]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    for header in (b"P6 40000 40000 255\n", b"P6 9000 9000 255\n"):
        (tmp_path / "a.ppm").write_bytes(header + bytes(100))
        found = CocoSet(tmp_path, tmp_path / "a.json")
        with guards.little_memory(64 << 20), pytest.raises(ValueError, match="^images must be"):
            found[0]


def test_sets_that_claim_more_than_their_file_holds(tmp_path: Path) -> None:
    claimed = bytes.fromhex("00000803") + (10**6).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    for name in ("mnist", "mnist-gzip"):
        assert "784000000 bytes long" in refused(name, claimed + bytes(100), tmp_path, room=64 << 20)


def test_a_pickle_whose_text_never_ends(tmp_path: Path) -> None:
    """Lists within lists, each twice: 80 levels in 300 bytes, of which a message would be 2**80 long."""
    doubled = b"".join(b"](h%ch%ceq%c0" % (n, n, n + 1) for n in range(80))
    start = b"\x80\x02](K\x01K\x01eq\x000" + doubled
    content = start + b"cnumpy\ndtype\nh\x50\x85R."
    assert "an array of dtype list" in refused("cifar-pickle", content, tmp_path)
    content = start + b"c_codecs\nencode\nX\x01\x00\x00\x00ah\x50\x86R."
    assert "encodes text in another way" in refused("cifar-pickle", content, tmp_path)


ANNOTATIONS: dict[str, tuple[str, Any, str]] = {
    "an image that is a list": ("annotations/image_id", [3], "must be an object of an image in the file"),
    "a category that is an object": ("annotations/category_id", {"a": 1}, "must be an object of a category"),
    "an id beyond 64 bits": ("images/id", 2**64, "must be an entry with an id of its own"),
    "a category beyond 64 bits": ("categories/id", 10**30, "must be an entry with an id of its own"),
    "a width beyond 64 bits": ("images/width", 10**30, "must be at most"),
    "a width beyond printing": ("images/width", 10**4000, "must be at most"),
    "a box beyond floats": ("annotations/bbox", [0, 0, 10**400, 1], "must be four finite numbers"),
    "an area beyond floats": ("annotations/area", 10**400, "must be an object with a finite area"),
    "a folder above": ("images/file_name", "x/../../y", "file_name lies inside its folder"),
    "a drive": ("images/file_name", "c:\\x", "file_name lies inside its folder"),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_hostile_annotations(kind: str, tmp_path: Path) -> None:
    place, value, expected = ANNOTATIONS[kind]
    content = json.loads(TARGETS["annotations"].seeds()[0])
    section, key = place.split("/")
    content[section][0][key] = value
    assert expected in refused("annotations", json.dumps(content).encode(), tmp_path)


# Tables of measurements: a bad one costs a warning, never a call


TABLES: dict[str, Callable[[dict[str, Any]], object]] = {
    "infinite threads": lambda t: t["models"][0].update(threads=float("inf")),
    "no thread": lambda t: t["models"][0].update(threads=0),
    "threads beyond floats": lambda t: t["models"][0].update(threads=10**400),
    "points of another space": lambda t: t["models"][0]["groups"]["convolution"].update(points=[[1.0, 2.0]]),
    "weights beyond floats": lambda t: t["models"][0]["groups"]["convolution"].update(weights=[10**400]),
    "no coefficients": lambda t: t["models"][0]["groups"]["convolution"].update(coefficients=[]),
    "a stride of 0": lambda t: t["rows"][0]["work"].update(stride=[0, 0]),
    "a size that is text": lambda t: t["rows"][0]["work"].update(size=["9", "9"]),
    "a name that is a list": lambda t: t["rows"][0].update(op=["tucker2_conv2d"]),
    "a time beyond floats": lambda t: t["rows"][0]["us"].update(dense=10**400),
    "an environment that is a list": lambda t: t.update(environment=[1]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_hostile_tables(kind: str, tmp_path: Path) -> None:
    content = json.loads(TARGETS["table"].seeds()[0])
    assert content["rows"][0]["work"]["batch"] == WORK.batch
    TABLES[kind](content)
    assert "is damaged: it is ignored" in refused("table", json.dumps(content).encode(), tmp_path)
