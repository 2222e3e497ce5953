"""The truth of every operator, one file an op family: plain PyTorch, imports torch alone."""

from fastrank.reference import conv, gates, linalg, svd_conv

__all__ = ["conv", "gates", "linalg", "svd_conv"]
