"""Drop-in layers: a convolution in factored form, with `from_conv`, `to_dense` and `to_sequential`."""

from fastrank.nn.cp import FusedCPConv
from fastrank.nn.svd import SVDConv
from fastrank.nn.tucker2 import FusedTucker2Conv

__all__ = ["FusedCPConv", "FusedTucker2Conv", "SVDConv"]
