"""Networks by name: `build` and the architectures of the published experiments."""

from fastrank.models._build import NAMES, build, default_input_size
from fastrank.models.checkpoints import load_weights
from fastrank.models.detection import DETECTORS
from fastrank.models.detection import OPTIONS as DETECTOR_OPTIONS
from fastrank.models.identify import identify
from fastrank.models.rates import parse_rates

__all__ = [
    "DETECTORS",
    "DETECTOR_OPTIONS",
    "NAMES",
    "build",
    "default_input_size",
    "identify",
    "load_weights",
    "parse_rates",
]
