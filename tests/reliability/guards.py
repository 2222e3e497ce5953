"""What a reader of untrusted files may not do, watched while it reads: leave its folder, run something, never end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fastrank

SECONDS = 20.0
ROOM = 1 << 30
"""Bytes beyond what the process holds already: an allocation that a file of a few hundred bytes asked for."""

# Where Python, its packages and this one come from: modules that are imported, and tables that ship.
_HOMES = (sys.prefix, sys.base_prefix, *sys.path, str(Path(fastrank.__file__).parent))
_CODE = tuple(os.path.realpath(path) + os.sep for path in _HOMES if os.path.isdir(path))
_RUN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "os.kill")
_RUN = (*_RUN, "subprocess.Popen", "pty.spawn", "socket.", "urllib.Request", "ftplib.", "http.", "ctypes.dlopen")
_CHANGE = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_CHANGE = (*_CHANGE, "os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.")
_LIST = ("os.listdir", "os.scandir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_folders: list[str] = []
_pickles: list[bool] = []


class Forbidden(BaseException):
    """What no reader may do; not an Exception, so that none swallows it."""


class Hang(BaseException):
    """It took longer than it may."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _folders:
        return
    if event == "pickle.find_class" and not _pickles[-1]:
        raise Forbidden(f"{event} {args[1:]}")
    if event.startswith(_RUN) and not (event == "ctypes.dlopen" and _is_code(args[0])):
        raise Forbidden(f"{event} {args!r}")
    if event.startswith(_CHANGE) and not _inside(args[0]):
        raise Forbidden(f"{event} {args!r}")
    if event in _LIST and not (_inside(args[0]) or _is_code(args[0])):
        raise Forbidden(f"{event} {args!r}")
    if event == "open":
        path, mode, flags = args
        writes = bool(flags & _WRITES) if isinstance(flags, int) else any(sign in str(mode) for sign in "wax+")
        if not (_inside(path) or (not writes and _is_code(path))):
            raise Forbidden(f"open {path!r} to {'write' if writes else 'read'}")


def _inside(path: Any) -> bool:
    return isinstance(path, int) or _real(path).startswith(_folders[-1])


def _is_code(path: Any) -> bool:
    return path is None or isinstance(path, int) or _real(path).startswith((*_CODE, "/proc/", "/dev/null"))


def _real(path: Any) -> str:
    return os.path.realpath(os.fsdecode(path)) + os.sep


sys.addaudithook(_hook)  # for good: an audit hook cannot be taken off, but does nothing outside `watched`


@contextlib.contextmanager
def watched(folder: Path, *, pickles: bool = False, seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Forbidden` on a file touched outside `folder`, on a process or a connection, on a class named by a pickle
    (but where `pickles`, for readers with a list of their own), and `Hang` after so many seconds."""

    def late(_: int, __: FrameType | None) -> None:
        raise Hang(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _folders.append(os.path.realpath(folder) + os.sep)
    _pickles.append(pickles)
    try:
        yield
    finally:
        _folders.pop()
        _pickles.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Allocations fail beyond `room` bytes more than the process has mapped now: refused means refused beforehand."""
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
