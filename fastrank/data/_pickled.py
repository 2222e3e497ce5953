"""Byte arrays out of a pickle without running anything that the pickle names."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

# What a damaged or hostile pickle makes the unpickler raise; the standard library promises no fixed list.
_ERRORS = (
    *(pickle.UnpicklingError, EOFError, ImportError, AttributeError, IndexError, KeyError, TypeError, ValueError),
    *(OverflowError, MemoryError, RecursionError),
)


def read_arrays(path: Path) -> dict[str, Any]:
    """The dictionary pickled in the file at `path`, with its keys as str and its NumPy uint8 arrays as tensors.

    Only plain containers, text, numbers and arrays of bytes are understood. NumPy is not called: its constructors are
    replaced by stand-ins that check what they get, because a pickled array can lie about its dtype. Every other name in
    the pickle, and every damage, raises one ValueError.
    """
    data = path.read_bytes()
    try:
        _refuse_wide_memo(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"its content is {type(content).__name__}, not a dictionary")
        named = {key.decode("ascii") if isinstance(key, bytes) else key: value for key, value in content.items()}
        if any(not isinstance(key, str) for key in named):
            raise pickle.UnpicklingError("a key of its dictionary is not text")
        return {key: value.tensor() if isinstance(value, _Array) else value for key, value in named.items()}
    except _ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} must be a plain pickle of byte arrays, got one refused because {reason}") from error


def _refuse_wide_memo(data: bytes) -> None:
    """The unpickler allocates its memo up to the highest index that is named, 32 GB for a damaged one of four bytes."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"it numbers {argument} parts in {len(data)} bytes")


class _Allowed:
    """A callable that a pickle may call and not alter (assigning to attributes is what BUILD does to a function)."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it alters a constructor")


class _Bytes:
    """Stands in for numpy.dtype; uint8 is the only one there is."""

    __slots__ = ()

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            shown = repr(code)[:40] if isinstance(code, str | bytes) else type(code).__name__  # a list may be endless
            raise pickle.UnpicklingError(f"it holds an array of dtype {shown}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """A byte has no order, alignment or fields to restore."""


class _Array:
    """Stands in for numpy.ndarray: a shape and its bytes, checked against each other."""

    __slots__ = ("data", "fortran", "shape")

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.data: bytes | bytearray = b""
        self.fortran = False

    def __setstate__(self, state: object) -> None:
        _, self.shape, dtype, self.fortran, self.data = cast("tuple[Any, ...]", state)
        sizes_fit = isinstance(self.shape, tuple) and len(self.shape) <= 8
        sizes_fit = sizes_fit and all(type(size) is int and size >= 0 for size in self.shape)
        whole = isinstance(self.data, bytes | bytearray) and isinstance(dtype, _Bytes) and sizes_fit
        if not whole or len(self.data) != math.prod(self.shape):
            raise pickle.UnpicklingError("it holds an array whose bytes do not fill its shape")

    def tensor(self) -> Tensor:
        if not self.data:
            return torch.empty(0, dtype=torch.uint8)
        flat = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        if self.fortran:
            return flat.view(self.shape[::-1]).permute(*reversed(range(len(self.shape)))).contiguous()
        return flat.view(self.shape)


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as protocol 2 spells them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text in another way than latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _Allowed(_Bytes),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _Allowed(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Allowed(_Array),
    ("numpy.core.numeric", "_frombuffer"): _Allowed(_from_buffer),
    ("numpy._core.numeric", "_frombuffer"): _Allowed(_from_buffer),
    ("_codecs", "encode"): _Allowed(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]
