"""One training loop: SGD with rank regularisers, mixed precision, progress, and checkpoints that resume bit for bit."""

from fastrank.train._config import TrainConfig
from fastrank.train._evaluate import Evaluation, evaluate
from fastrank.train._fit import History, fit
from fastrank.train._progress import EpochRow

__all__ = ["EpochRow", "Evaluation", "History", "TrainConfig", "evaluate", "fit"]
