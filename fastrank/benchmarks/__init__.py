"""Benchmarks: families of operations against what users would call instead, checked before they are timed.

`fastrank bench --family tucker2 --compare dense,tltorch` prints them; `pytest bench --benchmark-only` keeps them.
"""

from fastrank.benchmarks._check import Prepared, prepare
from fastrank.benchmarks._environment import environment
from fastrank.benchmarks._registry import FAMILIES, PEERS, Case, Contender, Work, cases, compared, names
from fastrank.benchmarks._run import family, geometric_mean, measured, run
from fastrank.benchmarks._show import columns, left_out, lines

__all__ = [
    "FAMILIES",
    "PEERS",
    "Case",
    "Contender",
    "Prepared",
    "Work",
    "cases",
    "columns",
    "compared",
    "environment",
    "family",
    "geometric_mean",
    "left_out",
    "lines",
    "measured",
    "names",
    "prepare",
    "run",
]
