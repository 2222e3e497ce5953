"""What people look at: tables for the terminal, plots as PNG, the summary of a run, class activation maps."""

from fastrank.report._cam import Activation, activation_map, plot_activations
from fastrank.report._plots import COLOURS, plot_ranks, plot_spectra
from fastrank.report._runs import Run, plot_gates, plot_history, published, read_run, stage_table, stages_of
from fastrank.report._text import by, ranks_text, short, table, thousands

__all__ = [
    "COLOURS",
    "Activation",
    "Run",
    "activation_map",
    "by",
    "plot_activations",
    "plot_gates",
    "plot_history",
    "plot_ranks",
    "plot_spectra",
    "published",
    "ranks_text",
    "read_run",
    "short",
    "stage_table",
    "stages_of",
    "table",
    "thousands",
]
