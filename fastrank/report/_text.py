"""Tables for the terminal, and numbers as a reader expects them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None, left: int = 1
) -> Table:
    """A terminal table; the first `left` columns are text, the others numbers, aligned right."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left, overflow="fold")
    for row in rows:
        result.add_row(*("" if cell is None else str(cell) for cell in row))
    return result


def thousands(value: int) -> str:
    """12345678 -> "12,345,678"."""
    return f"{value:,}"


def short(value: float) -> str:
    """A count in three digits with its unit: 1234567 -> "1.23M"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def by(sizes: Sequence[int]) -> str:
    """(3, 224, 224) -> "3×224×224"."""
    return "×".join(map(str, sizes))


def ranks_text(ranks: Sequence[int]) -> str:
    """(144, 141) -> "144×141"; no ranks -> "dense"."""
    return by(ranks) if ranks else "dense"
