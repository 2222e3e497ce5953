"""Argument validation: one wording for every error.

Every message reads ``<argument> must be <what was expected>, got <what came>``. Wrong types raise `TypeError`,
everything else raises `ValueError`; nothing is computed before the checks have passed.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_DIGITS = 400


def fail(name: str, expected: str, got: object) -> ValueError:
    """The error for a wrong value (raise it: ``raise fail(...)``)."""
    return ValueError(f"{name} must be {expected}, got {got}")


def fail_type(name: str, expected: str, value: object) -> TypeError:
    """The error for a wrong type (raise it: ``raise fail_type(...)``)."""
    return TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def tensor(name: str, value: Any, shape: Sequence[int | None] | None = None, letters: str = "") -> Tensor:
    """`value` as a floating-point strided tensor of the given shape; None in `shape` leaves that size free."""
    if not isinstance(value, Tensor):
        raise fail_type(name, "a torch.Tensor", value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if shape is not None:
        wrong = value.dim() != len(shape) or any(
            want is not None and have != want for have, want in zip(value.shape, shape, strict=False)
        )
        if wrong:
            wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
            raise fail(name, f"of shape {wanted}{' = ' + letters if letters else ''}", tuple(value.shape))
    return value


def filled(name: str, value: Tensor, letters: str) -> Tensor:
    """`value`, with no size of 0."""
    if value.numel() == 0:
        raise fail(name, f"of sizes {letters} of at least 1", tuple(value.shape))
    return value


def same_kind(**tensors: Tensor | None) -> None:
    """All tensors given (None is left out) share one device and one dtype."""
    first_name, first = next((name, value) for name, value in tensors.items() if value is not None)
    for name, value in tensors.items():
        if value is None:
            continue
        if value.device != first.device:
            raise fail(name, f"on the device of {first_name}, {first.device}", value.device)
        if value.dtype != first.dtype:
            raise TypeError(f"{name} must be of the dtype of {first_name}, {first.dtype}, got {value.dtype}")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail_type(name, "an int", value)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise fail(name, f"an int {bounds}", shown(value))
    return value


def number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """`value` as a finite float in [low, high], or in (low, high] where `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail_type(name, "a number", value)
    inside = (low < value if open_low else low <= value) and value <= high and finite_number(value)
    if not inside:
        left = "(" if open_low else "["
        interval = (
            f"in {left}{low:g}, {high:g}]" if math.isfinite(high) else f"{'above' if open_low else 'at least'} {low:g}"
        )
        raise fail(name, f"a finite number {interval}", shown(value))
    return float(value)


def finite_number(value: Any) -> bool:
    """Whether `value` is an int or a float, no bool, that a float can hold."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def shown(value: Any) -> str:
    """`value` for a message: Python refuses to write out the digits of a huge int."""
    huge = isinstance(value, int) and abs(value) >= 10**MAX_DIGITS
    return f"an int of more than {MAX_DIGITS} digits" if huge else str(value)


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """An int or two ints, each at least `low`, as (vertical, horizontal)."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise fail_type(name, "an int or a pair of ints", value)
    return integer(f"{name}[0]", value[0], low), integer(f"{name}[1]", value[1], low)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value` as one of the allowed strings; the error names the nearest one."""
    allowed = list(allowed)
    if not isinstance(value, str):
        raise fail_type(name, f"one of {allowed}", value)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{near(value, allowed)}")
    return value


def near(word: str, known: Iterable[str]) -> str:
    """A hint at the known word nearest to an unknown one, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def finite(name: str, value: Tensor) -> Tensor:
    """`value`, with no NaN and no infinity. Reads the values: never call it on a path that must not synchronise."""
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise fail(name, "finite", f"{bad} NaN or infinite values out of {value.numel()}")
    return value


def conv_output_size(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Spatial size of a convolution's output; refuses empty maps, and kernels larger than the padded map."""
    if min(size) < 1:
        raise fail("x", "a map of at least 1×1", f"{size[0]}×{size[1]}")
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        if n + 2 * p < reach:
            raise fail(
                "x", f"at least as large as the dilated kernel after padding ({reach})", f"a padded size of {n + 2 * p}"
            )
        out.append((n + 2 * p - reach) // s + 1)
    return out[0], out[1]
