"""Networks made ready for inference: batch normalisation folded into the convolutions, epilogues into their kernels."""

from fastrank.fuse._fuse import FusedModel, fuse_for_inference
from fastrank.fuse._rewrite import FusedLayer

__all__ = ["FusedLayer", "FusedModel", "fuse_for_inference"]
