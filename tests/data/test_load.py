"""Data sets by name: digits from scikit-learn, CIFAR and ImageNet from small files in those formats."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastrank import data

RECORDS = 4


def _pixels(seed: int) -> numpy.ndarray[Any, Any]:
    return numpy.random.RandomState(seed).randint(0, 256, (RECORDS, 3072)).astype(numpy.uint8)


def _write_binary(root: Path, name: str, labels: list[list[int]]) -> None:
    """One folder of binary records; `labels` holds the label bytes of each record."""
    folders = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
    files = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
    (root / folders[name]).mkdir(parents=True)
    for seed, file in enumerate(files[name]):
        records = [bytes(label) + row.tobytes() for label, row in zip(labels, _pixels(seed), strict=True)]
        (root / folders[name] / f"{file}.bin").write_bytes(b"".join(records))


def _write_python(root: Path, name: str, labels: list[int], protocol: int, as_bytes: bool = True) -> None:
    folders = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    files = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    (root / folders[name]).mkdir(parents=True)
    for seed, file in enumerate(files[name]):
        content: dict[Any, Any] = {"data": _pixels(seed), key: labels, "batch_label": "a batch", "filenames": ["a"]}
        if as_bytes:
            content = {text.encode(): value for text, value in content.items()}
        (root / folders[name] / file).write_bytes(pickle.dumps(content, protocol))


# What Python 2 wrote, as in the published files: text opcodes are its bytes, numpy.core its module.
PYTHON2_ARRAY = (
    b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89T\x00\x18\x00\x00" + bytes(range(256)) * 24 + b"tbU\x06labels](K\x03K\x07eu."
)


def test_names_and_wrong_arguments() -> None:
    assert set(data.NAMES) >= {"digits", "mnist", "cifar10", "cifar100", "imagenet"}
    with pytest.raises(ValueError, match=r"name must be one of .* got 'cifar' \(did you mean 'cifar10'\?\)"):
        data.load("cifar")
    with pytest.raises(ValueError, match="split must be one of"):
        data.load("digits", split="val")
    with pytest.raises(TypeError, match=r"options of digits must be among \['size', .* got 'width'"):
        data.load("digits", width=3)
    for name in ("mnist", "cifar10", "imagenet"):
        with pytest.raises(ValueError, match=r"root must be the folder that .*, got None"):
            data.load(name)


def test_digits() -> None:
    train, test = data.load("digits"), data.load("digits", split="test")
    assert isinstance(train, data.ImageSet)
    assert isinstance(test, data.ImageSet)
    assert (train.classes, train.shape) == (10, (1, 8, 8))
    assert len(train) + len(test) == 1797
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert float((share - 0.3).abs().max()) < 0.004, "stratified: half an image of about 180 a class"
    assert abs(float(train.images.mean())) < 1e-5
    assert abs(float(train.images.std()) - 1) < 1e-5
    assert torch.equal(test.mean, train.mean), "the held-out images do not enter the statistics"
    image, label = test[5]
    assert torch.equal(image, test.images[5])
    assert label == int(test.labels[5])
    seen = {tuple(image.flatten().tolist()) for image in train.pixels}
    assert not any(tuple(image.flatten().tolist()) in seen for image in test.pixels)


def test_digits_options() -> None:
    plain = data.load("digits", split="test")
    large = data.load("digits", split="test", size=28, channels=3, held_out=0.3)
    assert isinstance(plain, data.ImageSet)
    assert isinstance(large, data.ImageSet)
    assert large.shape == (3, 28, 28)
    assert torch.equal(large.labels, plain.labels)
    assert torch.equal(large.pixels[:, 0], large.pixels[:, 2])
    assert len(data.load("digits", split="test", held_out=0.5)) in range(890, 910)
    for option, value in (("size", 0), ("channels", 2), ("held_out", 0.0), ("held_out", 1.0), ("held_out", 1e-4)):
        with pytest.raises(ValueError, match=option):
            data.load("digits", split="test", **{option: value})


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrank\[demo\]'"):
        data.load("digits")


def test_cifar_binary(tmp_path: Path) -> None:
    _write_binary(tmp_path, "cifar10", [[0], [9], [3], [3]])
    _write_binary(tmp_path, "cifar100", [[19, 99], [0, 0], [1, 50], [2, 7]])
    for root in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        train, test = data.load("cifar10", root=root), data.load("cifar10", root=root, split="test")
        assert isinstance(train, data.ImageSet)
        assert isinstance(test, data.ImageSet)
        assert (len(train), len(test), train.classes, train.shape) == (20, 4, 10, (3, 32, 32))
        assert train.labels.tolist() == [0, 9, 3, 3] * 5
        assert torch.equal(test.pixels, torch.from_numpy(_pixels(5)).view(-1, 3, 32, 32))
    fine = data.load("cifar100", root=tmp_path)
    assert isinstance(fine, data.ImageSet)
    assert (fine.classes, fine.labels.tolist()) == (100, [99, 0, 50, 7])
    assert torch.equal(fine.pixels, torch.from_numpy(_pixels(0)).view(-1, 3, 32, 32))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_cifar_python_equals_binary(tmp_path: Path, protocol: int, as_bytes: bool) -> None:
    for name, labels in (("cifar10", [0, 9, 3, 3]), ("cifar100", [99, 0, 50, 7])):
        width = {"cifar10": 1, "cifar100": 2}[name]
        _write_binary(tmp_path / "binary", name, [[label] * width for label in labels])
        _write_python(tmp_path / "python", name, labels, protocol, as_bytes)
        for split in ("train", "test"):
            want, got = (data.load(name, root=tmp_path / form, split=split) for form in ("binary", "python"))
            assert isinstance(want, data.ImageSet)
            assert isinstance(got, data.ImageSet)
            assert torch.equal(got.pixels, want.pixels)
            assert torch.equal(got.labels, want.labels)


def test_cifar_python_as_python_2_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(PYTHON2_ARRAY)
    got = data.load("cifar10", root=tmp_path, split="test")
    assert isinstance(got, data.ImageSet)
    assert got.labels.tolist() == [3, 7]
    assert torch.equal(got.pixels.flatten(), torch.arange(6144).to(torch.uint8))


def test_cifar_python_in_column_order(tmp_path: Path) -> None:
    content = {"data": numpy.asfortranarray(_pixels(0)), "labels": [0] * RECORDS}
    for protocol in (2, 5):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
        got = data.load("cifar10", root=tmp_path, split="test")
        assert isinstance(got, data.ImageSet)
        assert torch.equal(got.pixels, torch.from_numpy(_pixels(0)).view(-1, 3, 32, 32))


def test_cifar_normalisation(tmp_path: Path) -> None:
    _write_binary(tmp_path, "cifar10", [[0]] * RECORDS)
    own = data.load("cifar10", root=tmp_path, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    assert isinstance(own, data.ImageSet)
    want = (own.pixels / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(own.images, want)
    large = data.load("cifar10", root=tmp_path, size=224)
    assert (large.shape, large[0][0].shape) == ((3, 224, 224), (3, 224, 224))
    with pytest.raises(ValueError, match="mean must be of length 3"):
        data.load("cifar10", root=tmp_path, mean=(0.5,))
    with pytest.raises(ValueError, match="std must be above 0"):
        data.load("cifar10", root=tmp_path, std=(0.5, 0.0, 1.0))


def test_cifar_absent_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin or cifar-10-batches-py, got .* neither"):
        data.load("cifar10", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        data.load("cifar10", root=tmp_path / "none")
    _write_binary(tmp_path, "cifar10", [[0], [9], [3], [10]])
    folder = tmp_path / "cifar-10-batches-bin"
    with pytest.raises(ValueError, match=r"labels in .*data_batch_1\.bin must be between 0 and 9, got 10 among 4"):
        data.load("cifar10", root=tmp_path)
    for content in (b"", (folder / "test_batch.bin").read_bytes()[:-1]):
        (folder / "test_batch.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"size of .*test_batch\.bin must be a positive multiple of 3073 bytes"):
            data.load("cifar10", root=tmp_path, split="test")
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"root must hold .*test_batch\.bin, which does not exist"):
        data.load("cifar10", root=tmp_path, split="test")


class _Hostile:
    """Pickles into a call that leaves a trace."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    good = pickle.dumps({"data": _pixels(0), "labels": [0] * RECORDS}, 2)
    hostile = {
        "names pathlib.*touch|names .*": pickle.dumps({"data": _Hostile(Path.touch, trace), "labels": []}),
        r"names builtins\.exec|names __builtin__\.exec": pickle.dumps(_Hostile(exec, f"open({str(trace)!r}, 'w')"), 2),
        "names numpy.*load": pickle.dumps(_Hostile(numpy.load, str(trace), None, True)),
        "dtype 'O8'": pickle.dumps({"data": numpy.array([{}], dtype=object)}),
        "dtype 'V4'": pickle.dumps({"data": numpy.zeros(2, dtype="V4")}),
        "dtype 'i8'": pickle.dumps({"data": numpy.zeros(2, dtype="i8")}),
        "do not fill its shape": good.replace(b"M\x00\x0c", b"M\x00\x0d"),
        "not a dictionary": pickle.dumps([1, 2]),
        "it encodes text": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
        "it alters a constructor": b"\x80\x02cnumpy\ndtype\n}X\x04\x00\x00\x00makeK\x01sb.",
        "it numbers 4294967295 parts": b"\x80\x02}r\xff\xff\xff\xff.",
        "not text": pickle.dumps({1: 2}),
        "persistent": b"\x80\x02K\x01Q.",
        "extension|registered": b"\x80\x02\x82\x01.",
    }
    for reason, content in hostile.items():
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=r"test_batch must be a plain pickle of byte arrays") as caught:
            data.load("cifar10", root=tmp_path, split="test")
        assert caught.match(reason)
        assert not trace.exists()


def test_cut_and_flipped_pickles_raise_one_kind_of_error(tmp_path: Path) -> None:
    good = pickle.dumps({"data": _pixels(0)[:1], "labels": [1]}, 2)
    numbers = numpy.random.RandomState(0)
    outside = [position for position in range(len(good)) if not 300 < position < len(good) - 100]
    for _ in range(1000):
        content = bytearray(good)
        content[numbers.choice(outside)] ^= 1 << numbers.randint(8)
        (tmp_path / "test_batch").write_bytes(content[: numbers.choice([len(good), *outside])])
        try:
            assert len(data.load("cifar10", root=tmp_path, split="test")) == 1
        except ValueError as error:
            assert "test_batch" in str(error)  # noqa: PT017  (some flips change a number and nothing else)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"labels": [0]}, r"'data' in .* must be a uint8 array of shape \(N, 3072\), got NoneType"),
        ({"data": numpy.zeros((2, 9), "u1"), "labels": [0, 0]}, r"got one of shape \(2, 9\)"),
        ({"data": numpy.zeros((0, 3072), "u1"), "labels": []}, r"got one of shape \(0,\)"),
        ({"data": numpy.zeros((2, 3072), "u1"), "labels": [0]}, "'labels' in .* must be a list of 2 ints, got 1 items"),
        ({"data": numpy.zeros((1, 3072), "u1"), "labels": ["0"]}, "must be a list of 1 ints"),
        ({"data": numpy.zeros((1, 3072), "u1")}, "must be a list of 1 ints, got NoneType"),
        ({"data": numpy.zeros((1, 3072), "u1"), "labels": [10]}, r"labels in .* between 0 and 9, got \[10, 10\]"),
    ],
)
def test_pickles_of_another_content(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=expected):
        data.load("cifar10", root=tmp_path, split="test")


def _write_folders(root: Path, classes: dict[str, list[str]]) -> None:
    image = pytest.importorskip("PIL.Image", reason="ImageNet folders need torchvision and Pillow")
    for split, names in classes.items():
        for position, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for count in range(2):
                picture = image.new("RGB", (40 + 8 * count, 32), (40 * position, 100, 20 * count))
                picture.save(root / split / name / f"{count}.png")


def test_imagenet_folders(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="ImageNet folders need torchvision")
    _write_folders(tmp_path, {"train": ["cat", "dog", "emu"], "val": ["cat", "dog", "emu"]})
    train = data.load("imagenet", root=tmp_path, size=16)
    test = data.load("imagenet", root=tmp_path, split="test", size=16)
    assert (len(train), train.classes, train.shape) == (6, 3, (3, 16, 16))
    image, label = test[4]
    assert (tuple(image.shape), label) == ((3, 16, 16), 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (torch.tensor([80, 100, 0]) / 255 - mean) / std
    torch.testing.assert_close(image.mean((1, 2)), want)


def test_imagenet_absent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="ImageNet folders need torchvision")
    with pytest.raises(FileNotFoundError, match=r"root must hold the folder .*train with one folder of images a class"):
        data.load("imagenet", root=tmp_path)
    _write_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "emu"]})
    with pytest.raises(ValueError, match=r"one set of classes in train/ and val/, got .*, dog in one only"):
        data.load("imagenet", root=tmp_path)
    (tmp_path / "val" / "emu").rename(tmp_path / "val" / "dog")
    for file in (tmp_path / "val" / "dog").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"images in every class folder: .*dog"):
        data.load("imagenet", root=tmp_path, split="test")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrank\[vision\]'"):
        data.load("imagenet", root=tmp_path)
