"""Measured times of the convolution backends, and what follows from them for sizes that were not measured."""

from fastrank._tables._estimate import UNKNOWN, Estimate, estimate
from fastrank._tables._model import Model, fit, group_of
from fastrank._tables._store import (
    Key,
    Table,
    cache_file,
    cache_folder,
    cached,
    cpu_name,
    device_name,
    forget,
    remembered,
    save,
    shipped,
)
from fastrank._tables._work import LIBRARY, ConvWork, Step, steps

__all__ = [
    "LIBRARY",
    "UNKNOWN",
    "ConvWork",
    "Estimate",
    "Key",
    "Model",
    "Step",
    "Table",
    "cache_file",
    "cache_folder",
    "cached",
    "cpu_name",
    "device_name",
    "estimate",
    "fit",
    "forget",
    "group_of",
    "remembered",
    "save",
    "shipped",
    "steps",
]
