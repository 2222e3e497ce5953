"""Measuring what `backend="auto"` chooses between, on the user's own device, for the tables that it reads."""

from fastrank.tune._calibrate import Regret, Setup, calibrate, setups
from fastrank.tune._measure import (
    BUSY,
    Case,
    Explanation,
    Timing,
    add_rows,
    cases,
    cases_as_if,
    empty_table,
    environment,
    explain,
    measure,
    save,
    table_of,
)

__all__ = [
    "BUSY",
    "Case",
    "Explanation",
    "Regret",
    "Setup",
    "Timing",
    "add_rows",
    "calibrate",
    "cases",
    "cases_as_if",
    "empty_table",
    "environment",
    "explain",
    "measure",
    "save",
    "setups",
    "table_of",
]
