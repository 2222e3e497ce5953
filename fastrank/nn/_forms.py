"""The factored forms of a convolution as plain convolutions: what the library runs for each of its backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank import reference
from fastrank.reference.conv import Geometry, along_h, along_w

Pair = tuple[int, int]
PLAIN: Geometry = ((1, 1), (0, 0), (1, 1))


class Stage(NamedTuple):
    """One convolution of the library; arguments behind the bias as `torch.conv2d` takes them."""

    weight: Tensor
    biased: bool
    arguments: tuple[Pair, Pair, Pair, int]


# Convolutions in a row; the results of several such rows are added up. The bias is in the first one's last.
Branches = tuple[tuple[Stage, ...], ...]
Staging = Callable[[Sequence[Tensor], Geometry], Branches]


class Form(NamedTuple):
    """A kind of factored kernel: its parameters' names, their dense kernel, the stages of each other library backend.

    sums: whether the stages of "sequence" end in R·O channels, to be summed over R.
    """

    op: str
    factors: tuple[str, ...]
    merge: Callable[..., Tensor]
    sums: bool
    stages: Mapping[str, Staging]


def _tucker2_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    w_in, core, w_out = factors
    return (
        (
            Stage(w_in[:, :, None, None], False, (*PLAIN, 1)),
            Stage(core, False, (*geometry, 1)),
            Stage(w_out[:, :, None, None], True, (*PLAIN, 1)),
        ),
    )


def _cp_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    pointwise, vertical, horizontal = (factor.flatten(0, 1) for factor in factors)
    groups = len(pointwise)
    return (
        (
            Stage(pointwise[:, :, None, None], False, (*PLAIN, 1)),
            Stage(vertical[:, None, :, None], False, (*along_h(*geometry), groups)),
            Stage(horizontal[:, None, None, :], False, (*along_w(*geometry), groups)),
        ),
    )


def _channel_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    first, second = factors
    return ((Stage(first, False, (*geometry, 1)), Stage(second, True, (*PLAIN, 1))),)


def _spatial_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    first, second = factors
    return ((Stage(first, False, (*along_h(*geometry), 1)), Stage(second, True, (*along_w(*geometry), 1))),)


def _decoupled_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    pointwise, depthwise = (factor.flatten(0, 1) for factor in factors)
    return (
        (
            Stage(pointwise[:, :, None, None], False, (*PLAIN, 1)),
            Stage(depthwise[:, None], False, (*geometry, len(depthwise))),
        ),
    )


def _by_rank_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    return tuple(
        (
            Stage(point[:, :, None, None], False, (*PLAIN, 1)),
            Stage(depth[:, None], r == 0, (*geometry, len(depth))),
        )
        for r, (point, depth) in enumerate(zip(*factors, strict=True))
    )


def _cp_by_rank_stages(factors: Sequence[Tensor], geometry: Geometry) -> Branches:
    pointwise, *passes = factors
    return _by_rank_stages((pointwise, _once_rounded(reference.conv.cp_depthwise, passes)), geometry)


TUCKER2 = Form(
    "tucker2_conv2d",
    ("w_in", "core", "w_out"),
    reference.conv.tucker2_weight,
    False,
    {"sequence": _tucker2_stages},
)
CP = Form(
    "cp_conv2d",
    ("pointwise", "vertical", "horizontal"),
    reference.conv.cp_weight,
    True,
    {"sequence": _cp_stages, "depthwise": _cp_by_rank_stages},
)
SVD = {
    "channel": Form(
        "channel_svd_conv2d",
        ("first", "second"),
        reference.svd_conv.channel_weight,
        False,
        {"sequence": _channel_stages},
    ),
    "spatial": Form(
        "spatial_svd_conv2d",
        ("first", "second"),
        reference.svd_conv.spatial_weight,
        False,
        {"sequence": _spatial_stages},
    ),
    "decoupled": Form(
        "decoupled_svd_conv2d",
        ("first", "second"),
        reference.svd_conv.decoupled_weight,
        True,
        {"sequence": _decoupled_stages, "depthwise": _by_rank_stages},
    ),
}


def merged(form: Form, factors: Sequence[Tensor]) -> Tensor:
    """The dense kernel (O, I, kh, kw) in the factors' dtype, computed in full precision, at least float32."""
    return _once_rounded(form.merge, factors)


def _once_rounded(function: Callable[..., Tensor], factors: Sequence[Tensor]) -> Tensor:
    with reference.linalg.full_precision(factors[0].device):
        return function(*map(reference.linalg.working, factors)).to(factors[0].dtype)


def stages_of(
    form: Form, factors: Sequence[Tensor], backend: str, geometry: Geometry, memory_format: torch.memory_format
) -> Branches:
    """The stages of "dense" or another library backend, with weights in the layout of their inputs."""
    if backend == "dense":
        branches: Branches = ((Stage(merged(form, factors), True, (*geometry, 1)),),)
    else:
        branches = form.stages[backend](factors, geometry)
    return tuple(
        tuple(stage._replace(weight=stage.weight.contiguous(memory_format=memory_format)) for stage in branch)
        for branch in branches
    )


def chain(branches: Branches, x: Tensor, bias: Tensor | None, summed: int) -> Tensor:
    """x (N, I, H, W) through the branches, added up, and the sum over R = `summed` maps of each channel, unless 0."""
    out = x
    for r, branch in enumerate(branches):
        part = x
        for weight, biased, arguments in branch:
            part = torch.conv2d(part, weight, bias if biased else None, *arguments)
        out = out.add_(part) if r else part
    if not summed:
        return out
    out = torch.unflatten(out, 1, (summed, -1)).sum(1)
    return out if bias is None else out.add_(bias[:, None, None])
