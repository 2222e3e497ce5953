"""The state of a training run as a folder of safetensors files, one a rank, by torch.distributed.checkpoint.

A run may be resumed with another number of ranks. No pickle is read: of the forms that torch.distributed.checkpoint
knows, this is the one whose description of the shards lies in the headers of the safetensors files. What is no tensor
is in ``header.json``, with the SHA-256 of every file. A folder counts once ``checkpoint.json`` beside it names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastrank import _atomic, _checks
from fastrank.distributed import Parallel
from fastrank.regularize._kernels import is_sharded
from fastrank.regularize._spectral import SpectralRegularizer
from fastrank.train import _checkpoint
from fastrank.train._checkpoint import MODEL, Run

HEADER = "header.json"
FOLDER = re.compile(r"checkpoint-\d{9,}-[0-9a-f]{8}")
Found = TypeVar("Found")


def save(pointer: Path, run: Run) -> None:
    """Write `run` beside `pointer`, all ranks together, and have `pointer` name it; then remove the one before.

    Where one rank cannot write, all raise OSError; the one before then counts, and nothing is left of the new one.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    parallel = run.parallel
    for regularizer in run.regularizers:
        if isinstance(regularizer, SpectralRegularizer):
            regularizer.gather_state()
    tensors, header = _checkpoint.contents(run)
    folder = pointer.with_name(parallel.decide(f"checkpoint-{run.step:09d}-{secrets.token_hex(4)}"))
    own = f"shard-{parallel.rank + 1:05d}-*.safetensors"
    try:
        with _failures(folder):
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            save_shards(dict(_separate(tensors)), storage_writer=writer)
        sums = _together(parallel, folder, lambda: {path.name: _digest(path) for path in sorted(folder.glob(own))})
        header["files"] = {name: digest for found in sums for name, digest in found.items()}
        header["world"] = parallel.world
        _together(parallel, folder, lambda: _publish(pointer, folder, header) if parallel.main else None)
    except OSError:
        if parallel.main:
            clean(pointer)
        raise


def _publish(pointer: Path, folder: Path, header: dict[str, Any]) -> None:
    _atomic.write_atomically(folder / HEADER, json.dumps(header).encode())
    _atomic.write_atomically(pointer, json.dumps({"folder": folder.name, "step": header["step"]}).encode())
    clean(pointer)


def _together(parallel: Parallel, folder: Path, act: Callable[[], Found]) -> list[Found]:
    """What `act` gives on each rank; OSError on all of them where it fails on one."""
    found: list[Any] = []
    failure: OSError | None = None
    try:
        found.append(act())
    except OSError as error:
        failure = error
    told = parallel.gather((found, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for rank, (_, what) in enumerate(told):
        if what is not None:
            raise OSError(f"the checkpoint {folder} could not be written on rank {rank}: {what}")
    return [value for (value,), _ in told]


def restore(pointer: Path, run: Run) -> None:
    """Bring `run`, on however many ranks, to where the checkpoint that `pointer` names left it.

    Raises ValueError, on all ranks and changing nothing, where it is damaged or belongs to another run.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    folder = _folder(pointer)
    try:
        header = _checkpoint.parsed(folder, (folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _checkpoint.broken(folder, HEADER) from error
    _require_undamaged(folder, header.get("files"), run.parallel)
    reader = HuggingFaceStorageReader(str(folder))
    with _failures(folder), _damage(folder):
        found: dict[str, Any] = {**reader.read_metadata().state_dict_metadata}
    described = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in found.items()
    }
    _checkpoint.require(folder, header, described, run)
    wanted = _room(described, run)
    with _failures(folder), _damage(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_shards(wanted, storage_reader=reader, no_dist=run.parallel.world == 1)
    _checkpoint.take(folder, header, wanted, run)


def clean(pointer: Path) -> None:
    """Remove the folders of checkpoints beside `pointer` that it does not name."""
    try:
        kept = _folder(pointer).name if pointer.exists() else ""
    except ValueError:
        return  # what it should have named may be one of them
    for entry in list(os.scandir(pointer.parent)):
        if entry.is_dir(follow_symlinks=False) and FOLDER.fullmatch(entry.name) and entry.name != kept:
            shutil.rmtree(entry.path)


def _folder(pointer: Path) -> Path:
    try:
        name = json.loads(pointer.read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _checkpoint.broken(pointer, "folder") from error
    if not isinstance(name, str) or not FOLDER.fullmatch(name):
        raise _checkpoint.broken(pointer, "folder")
    return pointer.with_name(name)


def _room(described: Mapping[str, Tensor], run: Run) -> dict[str, Any]:
    """Memory for what this rank needs of a checkpoint: its shards of what is sharded in this run, the rest whole."""
    like = {MODEL + name: tensor for name, tensor in _checkpoint.model_state(run.model).items()}
    trained = run.trained()
    for key, found in _checkpoint.moments_in(described, run).items():
        like |= {_checkpoint.STATE[key] + name: trained[name] for name in found if key != "step"}
    own = {_checkpoint.random_key(device, run) for device in ("cpu", "cuda")}
    return {
        name: torch.empty_like(like[name]) if name in like and is_sharded(like[name]) else _blank(tensor)
        for name, tensor in described.items()
        if not name.startswith("random/") or name in own
    }


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _separate(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as the format takes them: contiguous, and none in the memory of another."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            yield name, tensor
            continue
        plain = tensor.detach().contiguous()
        where = plain.untyped_storage().data_ptr()
        yield name, plain.clone() if where in seen else plain
        seen.add(where)


def _require_undamaged(folder: Path, files: Any, parallel: Parallel) -> None:
    """Check every file against its SHA-256, each rank some of them; all raise, or none."""
    names = sorted(files) if isinstance(files, dict) and files else None
    if names is None:
        raise _checkpoint.broken(folder, "files")
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if there != names:
        odd = sorted({*there} ^ {*names})[0]
        raise _checks.fail("run_dir", "a folder whose checkpoint is whole", f"{folder}, where {odd} is amiss")
    bad = [name for name in names[parallel.rank :: parallel.world] if _digest(folder / name) != files[name]]
    for name in sorted(name for found in parallel.gather(bad) for name in found):
        got = f"{folder}, where {name} does not match its checksum"
        raise _checks.fail("run_dir", "a folder whose checkpoint is undamaged", got)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """What headers of shards make torch.distributed.checkpoint raise where they are not its own."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
        raise _checks.fail("run_dir", "a folder whose checkpoint is whole", f"{folder}: {reason}") from error


@contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint raises on all ranks where one failed, as an error of ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"the checkpoint {folder} could not be written or read on rank {rank}: {cause}") from error
    except SafetensorError as error:
        raise _checks.fail("run_dir", "a folder whose checkpoint is whole", f"{folder}: {error}") from error
