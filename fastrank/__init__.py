"""fastrank: low-rank compression of CNNs that is fast where it is slow."""

from fastrank import ops
from fastrank._version import __version__

__all__ = ["__version__", "ops"]
