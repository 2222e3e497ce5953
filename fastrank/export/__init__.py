"""Compressed networks for other runtimes: ONNX, `torch.export` programs and AOTInductor packages.

Each writes one file, whole or not at all, after its outputs were compared with the model's.
"""

from fastrank.export._lower import PlainConvolutions, lowered
from fastrank.export._onnx import OPSETS, onnx
from fastrank.export._program import package, program

__all__ = ["OPSETS", "PlainConvolutions", "lowered", "onnx", "package", "program"]
