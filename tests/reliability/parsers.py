"""One file handed to one reader, under watch. What the fuzzer (`fuzz_parser.py`) and the tests both call."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import guards
from parser_targets import REFUSALS, TARGETS, Target

CORPUS = Path(__file__).parent / "corpus"
LITTLE = 256 << 20
"""Bytes, for files of at most a few megabytes."""
COUNTED = "files read: "
"""What a fuzzer without atheris prints before its count."""


class Undocumented(AssertionError):
    """A refusal that does not say what it should."""


def attempt(target: Target, payload: bytes, folder: Path, *, seconds: float = guards.SECONDS) -> str:
    """What reading `payload` came to: "" where it was read, or what the refusal says.

    A refusal is one of the documented exceptions with one line that says what was expected. Everything else is raised:
    another exception, a hang, a file touched outside `folder`, a process, a connection, a class named by a pickle.
    """
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if target.prepare is not None:
        target.prepare(folder)
    (folder / target.file).write_bytes(target.wrap(payload))
    try:
        with guards.watched(folder, pickles=target.pickles, seconds=seconds):
            target.read(folder)
    except REFUSALS as error:
        said = str(error)
        begins = re.match(rf"({target.says})", said)
        if "\n" in said or begins is None or not re.search(r" must |: it is ignored", said):
            raise Undocumented(f"{type(error).__name__}: {said[:300]}") from error
        return said
    return ""


def refused(name: str, payload: bytes, folder: Path, room: int = LITTLE) -> str:
    """What the target of that name says to a payload that it has to refuse, with so little memory."""
    target = TARGETS[name]
    warm(target, folder)
    with guards.little_memory(room):
        said = attempt(target, payload, folder)
    assert said, "it was read"
    return said


def warm(target: Target, folder: Path) -> None:
    """Every seed is read once: what is imported on first use is, and a valid file is no refusal."""
    for payload in target.seeds():
        said = attempt(target, payload, folder)
        assert not said, f"a valid file was refused: {said}"


def corpus(name: str) -> list[bytes]:
    """Inputs that failed once."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
