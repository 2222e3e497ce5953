"""Atomic files: old or new, never half; damaged or foreign files are refused in one sentence."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastrank import _atomic, _files


def _sample() -> dict[str, Tensor]:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return {
        "weight": weight,
        "same storage": weight,
        "transposed": weight[:, :, 0, 0].t(),
        "channels_last": weight.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "half": weight.bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), -0.0]),
        "needs grad": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1], dtype=torch.int64)}
    _files.save_tensors(path, tensors, {"k": "v"})
    return path


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"", b"new" * 10_000):
        _atomic.write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else f"{os.fstat(number).st_size} bytes")
        fsync(number)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    _atomic.write_atomically(tmp_path / "file", b"12345")
    assert calls == ["5 bytes", "name", "folder"]


def test_failed_write_keeps_the_old_file_and_removes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    _atomic.write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _atomic.write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_remove_leftovers_takes_only_this_files_temporaries(tmp_path: Path) -> None:
    for name in (".a[1].0123.tmp", ".b.0123.tmp", "a[1]", ".a[1].keep"):
        (tmp_path / name).touch()
    _atomic.remove_leftovers(tmp_path / "a[1]")
    assert sorted(os.listdir(tmp_path)) == [".a[1].keep", ".b.0123.tmp", "a[1]"]


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    _files.save_tensors(path, _sample(), {"config": '{"lr": 0.1}', "näme": "σ"})
    tensors, metadata = _files.load_tensors(path)
    assert metadata == {"config": '{"lr": 0.1}', "näme": "σ"}
    assert tensors.keys() == _sample().keys()
    for name, want in _sample().items():
        got = tensors[name]
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert got.is_contiguous()
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0, equal_nan=True)
    assert safetensors.torch.load_file(path).keys() == tensors.keys(), "any safetensors reader opens the file"


def test_header_lengths_that_begin_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first_bytes = set()
    for length in (*range(0, 300, 8), *range(19280 - 128, 19280 - 64, 8)):
        _files.save_tensors(path, {}, {"k": "v" * length})
        first_bytes.add(path.read_bytes()[:2])
        assert _files.load_tensors(path)[1] == {"k": "v" * length}
    assert {b"\x80\x01", b"PK"} <= first_bytes


def test_no_tensors_at_all(tmp_path: Path) -> None:
    _files.save_tensors(tmp_path / "file", {})
    assert _files.load_tensors(tmp_path / "file") == ({}, {})


def test_every_flipped_bit_and_every_cut_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    want, metadata = _files.load_tensors(saved)
    harmless = 0
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        saved.write_bytes(flipped)
        try:
            got, text = _files.load_tensors(saved)
        except ValueError as error:
            assert str(saved) in str(error)  # noqa: PT017  (a few flips change nothing that is read, see below)
            continue
        harmless += 1
        assert text == metadata
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert harmless < 64, "only white space in the header's padding may change unnoticed"
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^path must be .*file\.safetensors"):
            _files.load_tensors(saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"shape":[2,3]', b'"shape":[3,2]'), (b'"I64"', b'"F64"'), (b'"a":', b'"c":'), (b'"k":"v"', b'"k":"w"')],
)
def test_a_header_that_says_something_else_of_the_same_bytes_is_noticed(saved: Path, old: bytes, new: bytes) -> None:
    data = saved.read_bytes()
    assert data.count(old) == 1
    saved.write_bytes(data.replace(old, new))
    safetensors.torch.load(saved.read_bytes())  # a file as good as any, but for its checksum
    with pytest.raises(ValueError, match=r"do not match their checksum$"):
        _files.load_tensors(saved)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=r"path must be a safetensors file, got .*file, which does not exist"):
        _files.load_tensors(path)
    with pytest.raises(ValueError, match="which is not a file"):
        _files.load_tensors(tmp_path)
    for content in (pickle.dumps({"a": 1}), b"PK\x03\x04zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a pickle by its first bytes: not opened"):
            _files.load_tensors(path)
    for content in (b"", b"hello, this is no tensor file", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path must be a whole safetensors file"):
            _files.load_tensors(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no sha256 checksum"):
        _files.load_tensors(path)


def test_torch_pickles_are_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="a pickle by its first bytes"):
            _files.load_tensors(tmp_path / "file.pt")


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(TypeError, match="metadata"):
        _files.save_tensors(path, {}, {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="without the key 'sha256'"):
        _files.save_tensors(path, {}, {"sha256": "0"})
    with pytest.raises(TypeError, match=r"tensors\['a'\] must be a torch.Tensor, got list"):
        _files.save_tensors(path, {"a": [1.0]})  # type: ignore[dict-item]
    for tensor in (torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match="dense tensor with values"):
            _files.save_tensors(path, {"a": tensor})
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        _files.save_tensors(tmp_path / "no folder" / "file", {})


def test_links_and_devices_are_written_through_not_replaced(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    link.symlink_to(target)
    _atomic.write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _atomic.write_atomically(pipe, b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
