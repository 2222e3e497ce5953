"""Plots as PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_spectra(
    path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Sequence[float]]], *, title: str
) -> None:
    """Singular values, each panel's curves by label, relative to the largest of each curve; written as PNG."""
    figure, axes = figure_of(1, len(panels), width=5.2 * len(panels), height=3.8)
    for ax, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for colour, (label, values) in zip(COLOURS, curves.items(), strict=False):
            share = [value / (values[0] or 1.0) for value in values]  # a dead layer has no scale
            ax.plot(range(1, len(share) + 1), share, color=colour, linewidth=2, label=label)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_xlabel("index i")
        ax.set_ylim(0, 1.03)
        ax.set_xlim(0, None)
        tidy(ax)
    axes[0][0].set_ylabel("singular value σᵢ / σ₁")
    axes[0][-1].legend(frameon=False, loc="upper right")
    write(figure, path, title)


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
    figure, axes = figure_of(lines, columns, width=max(3.4 * columns, 6.4), height=2.7 * lines + 0.7)
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
        tidy(ax)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    write(figure, path, title)


def figure_of(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of inches `width` × `height`, which no screen is needed for, and its (rows, columns) of axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is absent: pip install 'fastrank[demo]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(ax: Axes) -> None:
    """No frame at the top and on the right, and a faint grid behind."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)


def write(figure: Figure, path: str | os.PathLike[str], title: str) -> None:
    """Put the title on top and write the figure as PNG."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, format="png")
