"""The public functions. Each validates once, then calls one `fastrank::*` operator; nothing else touches a kernel."""

from fastrank.ops.tucker2 import tucker2_conv2d

__all__ = ["tucker2_conv2d"]
