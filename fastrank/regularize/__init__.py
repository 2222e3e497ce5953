"""What keeps ranks low while a network trains; each attaches to any optimizer, or to `fastrank.train`."""

from fastrank.regularize.base import Attachment, Regularizer
from fastrank.regularize.funnel import Funnel
from fastrank.regularize.nuclear import GramTrace, NuclearNorm
from fastrank.regularize.overhead import Overhead, overhead
from fastrank.regularize.projection import LowRankProjection
from fastrank.regularize.schedules import Constant, Exponential, Linear, Schedule

__all__ = [
    "Attachment",
    "Constant",
    "Exponential",
    "Funnel",
    "GramTrace",
    "Linear",
    "LowRankProjection",
    "NuclearNorm",
    "Overhead",
    "Regularizer",
    "Schedule",
    "overhead",
]
