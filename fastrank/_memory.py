"""Work on a list in smaller parts, where the memory of a GPU does not hold the workspace for all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parts(
    act: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], what: Callable[[Item], str]
) -> list[Result]:
    """`act` of all items; where that runs out of memory, of one half of them and then of the other, and so on.

    Raises torch.OutOfMemoryError, which says `what` an item is, where one alone is too much.
    """
    try:
        return act(items)
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise too_much(what(items[0]), error) from error
    # Here, and not above: the error holds on to the memory of every call that it passed through.
    half = len(items) // 2
    return in_parts(act, items[:half], what) + in_parts(act, items[half:], what)


def too_much(what: str, error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    """The error for something that does not fit by itself."""
    return torch.OutOfMemoryError(f"{what} must fit into the memory of its device by itself, got: {error}")
