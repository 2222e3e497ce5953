"""Several processes that train one model: joining them, what each does and sends, and ending together."""

from fastrank.distributed._cost import Cost, Traffic, cost, table
from fastrank.distributed._group import joined, leave, rank, started_as_rank, watched
from fastrank.distributed._parallel import ALONE, Parallel

__all__ = [
    "ALONE",
    "Cost",
    "Parallel",
    "Traffic",
    "cost",
    "joined",
    "leave",
    "rank",
    "started_as_rank",
    "table",
    "watched",
]
