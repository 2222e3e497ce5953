"""What people look at: tables for the terminal, plots as PNG, the summary of a run, class activation maps."""

from fastrank.report._cam import Activation, activation_map, plot_activations
from fastrank.report._html import FILE as PAGE
from fastrank.report._html import write_html
from fastrank.report._plan import plot_plan
from fastrank.report._plots import COLOURS, plot_ranks, plot_spectra
from fastrank.report._runs import Run, plot_gates, plot_history, published, read_run, stage_table, stages_of
from fastrank.report._text import by, ranks_text, short, table, thousands
from fastrank.report._trajectory import ENERGY, Recorder, Trajectory, gates_of, is_number, read_trajectory, spectra
from fastrank.report._trajectory import FILE as TRAJECTORY_FILE

__all__ = [
    "COLOURS",
    "ENERGY",
    "PAGE",
    "TRAJECTORY_FILE",
    "Activation",
    "Recorder",
    "Run",
    "Trajectory",
    "activation_map",
    "by",
    "gates_of",
    "is_number",
    "plot_activations",
    "plot_gates",
    "plot_history",
    "plot_plan",
    "plot_ranks",
    "plot_spectra",
    "published",
    "ranks_text",
    "read_run",
    "read_trajectory",
    "short",
    "spectra",
    "stage_table",
    "stages_of",
    "table",
    "thousands",
    "write_html",
]
