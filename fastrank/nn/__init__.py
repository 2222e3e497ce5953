"""Drop-in layers: a convolution in factored form, with `from_conv`, `to_dense` and `to_sequential`.

The gated ones hold a gate a slice of each factor, for training that finds the ranks.
"""

from fastrank.nn._gated import GatedConv2d
from fastrank.nn._together import gates_together
from fastrank.nn.cp import FusedCPConv
from fastrank.nn.gated_cp import GatedCPConv
from fastrank.nn.gated_svd import GatedSVDConv
from fastrank.nn.gated_tucker2 import GatedTucker2Conv
from fastrank.nn.layer_cp import LayerCPConv
from fastrank.nn.svd import SVDConv
from fastrank.nn.tucker2 import FusedTucker2Conv

__all__ = [
    "FusedCPConv",
    "FusedTucker2Conv",
    "GatedCPConv",
    "GatedConv2d",
    "GatedSVDConv",
    "GatedTucker2Conv",
    "LayerCPConv",
    "SVDConv",
    "gates_together",
]
