"""What keeps ranks low while a network trains; each attaches to any optimizer, or to `fastrank.train`."""

from fastrank.regularize.base import Regularizer
from fastrank.regularize.nuclear import GramTrace, NuclearNorm
from fastrank.regularize.projection import LowRankProjection

__all__ = ["GramTrace", "LowRankProjection", "NuclearNorm", "Regularizer"]
