"""Files that are whole or absent: writing by a temporary file that takes the name at the end. Standard library only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


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
    temporary file; a killed process may leave one behind, see `remove_leftovers`. Raises OSError.
    """
    path = require_place(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a device or a pipe: replacing it would turn it into a file
        return
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
