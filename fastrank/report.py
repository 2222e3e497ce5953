"""What people look at: tables for the terminal, plots as PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None, left: int = 1
) -> Table:
    """A terminal table; the first `left` columns are text, the others numbers, aligned right."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=_box(),
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


def plot_spectra(
    path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Sequence[float]]], *, title: str
) -> None:
    """Singular values, each panel's curves by label, relative to the largest of each curve; written as PNG."""
    figure, axes = _figure(1, len(panels), width=5.2 * len(panels), height=3.8)
    for ax, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, values) in zip(COLOURS, curves.items(), strict=False):
            share = [value / (values[0] or 1.0) for value in values]  # a dead layer has no scale
            ax.plot(range(1, len(share) + 1), share, color=colour, linewidth=2, label=label)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_xlabel("index i")
        ax.set_ylim(0, 1.03)
        ax.set_xlim(0, None)
        _tidy(ax)
    axes[0][0].set_ylabel("singular value σᵢ / σ₁")
    axes[0][-1].legend(frameon=False, loc="upper right")
    _write(figure, path, title)


def plot_ranks(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Sequence[int]]],
    groups: Sequence[str],
    limits: Mapping[str, int],
    *,
    title: str,
) -> None:
    """Grouped bars of chosen ranks: a panel a factor, a group a rule, a bar a model; dashed at the full rank."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _figure(lines, columns, width=max(3.4 * columns, 6.4), height=2.7 * lines + 0.7)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, series) in zip(axes.flat, panels.items(), strict=False):
        width = 0.8 / max(len(series), 1)
        for index, (colour, (label, values)) in enumerate(zip(COLOURS, series.items(), strict=False)):
            places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
            bars = ax.bar(places, values, width * 0.94, color=colour, label=label)
            ax.bar_label(bars, fontsize=7, padding=1)
        ax.axhline(limits[name], color="#888888", linewidth=1, linestyle="--")
        ax.set_ylim(0, limits[name] * 1.15)
        ax.set_xticks(range(len(groups)), groups)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_ylabel("rank")
        _tidy(ax)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    _write(figure, path, title)


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is absent: pip install 'fastrank[demo]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _tidy(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)


def _write(figure: Figure, path: str | os.PathLike[str], title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, format="png")
