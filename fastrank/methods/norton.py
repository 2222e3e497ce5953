"""NORTON: every filter of the 3×3 convolutions as a sum of rank-1 terms, then similar filters removed.

`compress` is the whole system for the networks of the zoo; `METHOD` is its decomposition alone as a plan for any model.
Source: Pham, Zniyed and Nguyen, "Enhanced network compression through tensor decompositions and pruning", IEEE TNNLS
2024, its README and its code (for what of it is not followed: `fastrank.prune`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastrank import _checks, models, prune
from fastrank.methods._spectra import Candidate, Method, dense
from fastrank.models.identify import identify
from fastrank.nn import FusedCPConv
from fastrank.nn._conv import FactoredConv2d
from fastrank.plan import LayerPlan


def propose(layer: Candidate, options: dict[str, Any]) -> LayerPlan:
    """CP filters of the asked rank for a 3×3 kernel."""
    if layer.conv.kernel_size != (3, 3):
        return dense("NORTON factors 3×3 kernels only")
    rank = _checks.integer("rank", options["rank"], 1, 9)
    return LayerPlan("cp", (rank,), f"{rank} rank-1 terms a filter")


METHOD = Method(propose, {"rank": 4})


def compress(
    model: nn.Module,
    *,
    rank: int,
    compress_rate: Sequence[float] | str | None = None,
    criterion: str = "pabs",
    seed: int = 0,
) -> nn.Module:
    """A compressed copy of a plain network of the zoo: `decompose`, then `prune.channels` where rates are given.

    The result is ``models.build(name, rank=rank, compress_rate=compress_rate)`` with the weights of `model`, and bears
    that as `fastrank_origin`. criterion: see `fastrank.prune.similarity`.
    """
    _checks.choice("criterion", criterion, prune.CRITERIA)
    _blueprint(model, rank=rank, compress_rate=compress_rate)  # wrong rates are refused before the work begins
    decomposed = decompose(model, rank, seed=seed)
    return decomposed if compress_rate is None else prune.channels(decomposed, compress_rate, criterion=criterion)


def decompose(model: nn.Module, rank: int, *, seed: int = 0) -> nn.Module:
    """A copy of `model` in which every 3×3 convolution is a `FusedCPConv`, the first and the strided ones too.

    model: a plain network (rank 0) from `models.build`; rank: 1–9, where 9 is exact; seed: see `decompose.cp_filters`.
    The result bears the `fastrank_origin` of its architecture. Raises ValueError or TypeError, naming the argument.
    """
    twin = _blueprint(model, rank=rank)
    # deepcopy puts the new layers where the memo says, and so never copies the convolutions that they stand for.
    memo: dict[int, Any] = {}
    for name, layer in twin.named_modules():
        if isinstance(layer, FusedCPConv):
            conv: Any = model.get_submodule(name)
            memo[id(conv)] = FusedCPConv.from_conv(conv, rank, seed=seed)
    result = copy.deepcopy(model, memo)
    result.fastrank_origin = twin.fastrank_origin
    return result


def nmse(dense_model: nn.Module, compressed_model: nn.Module) -> float:
    """Mean over the factored convolutions of the mean over their filters of ‖W − Ŵ‖² / ‖W‖², 0 where both are zero.

    The approximation error of the README's ablation of the rank. dense_model: has the convolution that each factored
    one of `compressed_model` stands for, under the same name and of the same shape (so before any pruning). Raises
    ValueError where it has not, and where nothing is factored.
    """
    errors = []
    for name, layer in compressed_model.named_modules():
        if not isinstance(layer, FactoredConv2d):
            continue
        merged: Any = layer
        found = merged.to_dense().weight.detach().double()
        wanted = dict(dense_model.named_modules()).get(name)
        if not isinstance(wanted, nn.Conv2d) or wanted.weight.shape != found.shape:
            expected = f"with an nn.Conv2d {name!r} of shape {tuple(found.shape)}"
            got: object = tuple(wanted.weight.shape) if isinstance(wanted, nn.Conv2d) else type(wanted).__name__
            raise _checks.fail("dense_model", expected, got)
        weight = wanted.weight.detach().to(found)
        error, size = (tensor.square().flatten(1).sum(1) for tensor in (weight - found, weight))
        errors.append(torch.where(error > 0, error / size, 0.0).mean())
    if not errors:
        raise _checks.fail("compressed_model", "a model with factored convolutions", "none")
    return float(torch.stack(errors).mean())


def _blueprint(model: Any, **changes: Any) -> nn.Module:
    """What `models.build` makes of the origin of `model` with `changes`, on the meta device; refuses other models."""
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    origin = getattr(model, "fastrank_origin", None)
    if not isinstance(origin, dict) or origin["name"] not in models.NAMES:
        raise _checks.fail("model", "a network of the zoo (models.build)", type(model).__name__)
    _checks.integer("rank", changes["rank"], 1, 9)
    if origin["rank"] != 0 or any(isinstance(module, FactoredConv2d) for module in model.modules()):
        raise _checks.fail("model", "a network of plain convolutions", f"{origin['name']}, which is factored already")
    if identify(model) is None:
        raise _checks.fail("model", f"the {origin['name']} that its fastrank_origin names", "one of other modules")
    with torch.device("meta"):
        return models.build(**{**origin, **changes})
