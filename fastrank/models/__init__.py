"""Networks by name: `build` and the architectures of the published experiments."""

from fastrank.models._build import NAMES, build, default_input_size
from fastrank.models.identify import identify
from fastrank.models.rates import parse_rates

__all__ = ["NAMES", "build", "default_input_size", "identify", "parse_rates"]
