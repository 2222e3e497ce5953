"""Files that are whole or absent: writing by a temporary file that takes the name at the end. Standard library only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without locks of this kind
    fcntl = None  # type: ignore[assignment]


def require_place(path: str | os.PathLike[str], suffix: str = "") -> Path:
    """`path`, links followed, as a file that may be written: the name ends in `suffix`, the folder is there.

    For asking ahead of long work. Raises ValueError or OSError.
    """
    path = Path(path)
    if not path.name.endswith(suffix):
        raise ValueError(f"path must end in {suffix}, got {path}")
    if path.is_symlink():
        path = path.resolve()  # the link stays, what it points at is replaced
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {path}")
    special = path.exists() and not path.is_file()  # a device or a pipe is written in place
    if not special and not os.access(path.parent, os.W_OK):
        raise PermissionError(f"path must lie in a folder that may be written to, got {path}")
    return path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at `path` by `data`: whoever reads, or crashes, at any moment finds the old file or the new one.

    The bytes go to a hidden temporary file beside `path`, reach the disk, and take its name. A failure removes the
    temporary file; a killed process may leave one behind, see `remove_leftovers`. Raises OSError, which names `path`.
    """
    path = require_place(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a device or a pipe: replacing it would turn it into a file
        return
    with naming(path):
        _replace(path, data)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have the system's errors, which of a full disk name no file, say which one was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete the temporary files that killed writers of `path` left; only where no one else is writing to it."""
    path = Path(path)
    leading = f".{path.name}."
    for entry in os.scandir(path.parent):  # not glob: a name may hold brackets
        if entry.name.startswith(leading) and entry.name.endswith(".tmp"):
            Path(entry.path).unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have one process at a time read the file at `path` and write it anew; the others wait.

    What is locked is ``.NAME.lock`` beside it, which stays. A process that ends, however it does, gives its lock up.
    Systems and file systems without such locks let everybody in.
    """
    path = Path(path)
    if fcntl is None:
        yield
        return
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
