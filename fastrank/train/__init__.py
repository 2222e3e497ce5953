"""One training loop: SGD with rank regularisers, mixed precision, progress, and checkpoints that resume bit for bit."""

from fastrank.train._config import TrainConfig
from fastrank.train._detection import DetectionResult, evaluate_detection
from fastrank.train._evaluate import Evaluation, evaluate
from fastrank.train._fit import History, fit
from fastrank.train._progress import EpochRow
from fastrank.train._task import Outcome, Task

__all__ = [
    "DetectionResult",
    "EpochRow",
    "Evaluation",
    "History",
    "Outcome",
    "Task",
    "TrainConfig",
    "evaluate",
    "evaluate_detection",
    "fit",
]
