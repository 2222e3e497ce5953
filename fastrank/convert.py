"""A plan applied to a model: every named convolution becomes the factored layer that its plan says.

All new layers are built before the first one is put in place, so that an error leaves the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank._stages import ConvStage
from fastrank.calibration import Calibration, evaluating
from fastrank.decompose.tucker import max_ranks
from fastrank.nn import FusedCPConv, FusedTucker2Conv, LayerCPConv, SVDConv
from fastrank.nn import layer_cp as _layer_cp
from fastrank.nn import svd as _svd
from fastrank.nn._conv import FactoredConv2d, geometry_of, why_not_factorable
from fastrank.plan import LayerPlan, Plan

Pair = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A convolution in a model: its first name, the module, and why it cannot be factored (empty if it can)."""

    name: str
    conv: nn.Conv2d
    reason: str


def sites(model: nn.Module) -> list[Site]:
    """Every convolution of `model` (subclasses of nn.Conv2d too), shared ones once, in the order of the modules."""
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name or "the model itself")
    result = []
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        reason = why_not_factorable(conv)
        for kind in ("weight", "bias"):
            others = [] if reason or getattr(conv, kind) is None else owners[id(getattr(conv, kind))]
            if len(others) > 1:
                reason = f"it shares its {kind} with {next(other for other in others if other != name)}"
        if not reason and not bool(torch.isfinite(conv.weight.detach()).all()):
            reason = "its weight holds NaN or infinite values"
        result.append(Site(name, conv, reason))
    return result


@dataclass(frozen=True)
class Call:
    """One call of a convolution: x has this shape (N, I, H, W), and lies as torch.channels_last or not."""

    shape: tuple[int, ...]
    channels_last: bool

    @property
    def size(self) -> Pair:
        """(H, W) of the map."""
        return self.shape[-2], self.shape[-1]


def input_sizes(model: nn.Module, example_input: Tensor) -> dict[str, Pair]:
    """(H, W) of the map that each convolution, dense or factored, sees first when `model` runs on `example_input`.

    See `calls`.
    """
    return {name: found[0].size for name, found in calls(model, example_input).items()}


def calls(model: nn.Module, example_input: Tensor) -> dict[str, list[Call]]:
    """Every call of each convolution, dense or factored, when `model` runs on `example_input`, in their order.

    The model runs once in eval mode without gradients and is left as it was. Raises ValueError where it
    refuses the input.
    """
    if not isinstance(example_input, Tensor):
        raise _checks.fail_type("example_input", "a torch.Tensor", example_input)
    found: dict[str, list[Call]] = {}
    handles = []

    def record(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = next(iter((*args, *kwargs.values())))
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            found.setdefault(name, []).append(Call(tuple(x.shape), last))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | FactoredConv2d):
                record(name)
        with evaluating(model):
            model(example_input)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason, shape = str(error).partition("\n")[0], tuple(example_input.shape)
        raise _checks.fail("example_input", "a batch that the model accepts", f"shape {shape}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def factored_stages(conv: nn.Conv2d, layer: LayerPlan, in_size: Pair) -> list[ConvStage]:
    """The plain convolutions that `layer` would make of `conv` on an (H, W) map; no weight is touched."""
    if layer.method == "dense":
        out = skeleton(conv, LayerPlan("tucker2", (1, 1)))._out_size(in_size)
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        return [ConvStage("dense", conv.in_channels, conv.out_channels, kernel, 1, conv.bias is not None, out)]
    return skeleton(conv, layer).conv_stages(in_size)


def skeleton(conv: nn.Conv2d, layer: LayerPlan, device: torch.device | str = "meta") -> FactoredConv2d:
    """The factored layer that `layer` would make of `conv`, with factors drawn at random (none on "meta")."""
    _check_ranks(layer, tuple(conv.weight.shape))
    sizes: tuple[int, int, Pair] = (
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
    )
    geometry = {**geometry_of(conv), "device": device}
    if layer.method == "tucker2":
        return FusedTucker2Conv(*sizes, (layer.ranks[0], layer.ranks[1]), **geometry)
    if layer.method == "cp":
        return FusedCPConv(*sizes, layer.ranks[0], **geometry)
    if layer.method == "cp-layer":
        return LayerCPConv(*sizes, layer.ranks[0], **geometry)
    return SVDConv(*sizes, layer.ranks[0], scheme=layer.method.removeprefix("svd-"), **geometry)


def compress(
    model: nn.Module,
    plan: Plan,
    *,
    inplace: bool = False,
    guard: bool = True,
    calibration: Calibration | None = None,
) -> nn.Module:
    """`model` with every layer of `plan` factored; a copy unless `inplace`.

    calibration: what `fastrank.calibrate` found for this model; Tucker-2 and the SVD forms "channel" and "spatial" then
    keep the layers' outputs on that data, the others are as without. Plans that were made with one need one.

    guard: leave a layer dense where its factored form would hold more parameters than it does now; plans of `make_plan`
    are taken as they are, since they were guarded by the count that their maker asked for. The result bears
    `fastrank_plan`, the plan as applied, with a reason for every layer that stays dense.
    Raises ValueError where the plan names a layer that the model lacks, one of another shape, one that cannot be
    factored, or ranks above its maximum; the model is then unchanged.
    """
    if not isinstance(plan, Plan):
        raise _checks.fail_type("plan", "a fastrank.Plan", plan)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise _checks.fail_type("calibration", "what fastrank.calibrate gives, or None", calibration)
    if calibration is None and plan.options.get("calibrated") is True:
        expected = "given for a plan that was made with one (fastrank.calibrate(model, data))"
        raise _checks.fail("calibration", expected, "None")
    known = {site.name: site for site in sites(model)}
    if inplace and "" in known and plan.compressed:
        raise _checks.fail("inplace", "False for a model that is itself a convolution", "True")
    applied = _applied(plan, known, guard and "guard" not in plan.options)
    replacements: dict[nn.Module, nn.Module] = {
        known[name].conv: build(known[name].conv, layer, None if calibration is None else calibration.moment(name))
        for name, layer in applied.items()
        if layer.method != "dense"
    }
    if inplace:
        result = model
        for parent, attribute, child in list(_children(model)):
            if child in replacements:
                setattr(parent, attribute, replacements[child])
    else:
        result = copy_with(model, replacements)
    earlier = getattr(model, "fastrank_plan", None)
    before = earlier.layers if isinstance(earlier, Plan) else {}  # layers that are factored already keep their record
    result.fastrank_plan = Plan({**before, **applied}, plan.method, plan.options)  # type: ignore[assignment]
    return result


def decompress(model: nn.Module) -> nn.Module:
    """A copy of `model` with every factored layer merged into one plain `nn.Conv2d`: the same function to rounding.

    It bears no plan, and the origin of the dense network where it bears one.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    factored = [module for module in model.modules() if isinstance(module, FactoredConv2d)]
    result = copy_with(model, {module: module.to_dense() for module in factored})
    if hasattr(result, "fastrank_plan"):
        del result.fastrank_plan
    if isinstance(getattr(result, "fastrank_origin", None), dict):
        result.fastrank_origin = {**result.fastrank_origin, "rank": 0}  # type: ignore[assignment,dict-item]
    return result


def _applied(plan: Plan, known: dict[str, Site], guard: bool) -> dict[str, LayerPlan]:
    """What becomes of every convolution under `plan`; ValueError for a layer or a rank that cannot be."""
    applied: dict[str, LayerPlan] = {}
    for name, layer in plan.layers.items():
        if name not in known:
            found = f"{name!r}{_checks.near(name, known)}"
            raise _checks.fail("plan.layers", "names of convolutions of the model", found)
        site, where = known[name], f"plan.layers[{name!r}]"
        if layer.shape and layer.shape != tuple(site.conv.weight.shape):
            mine, its = ("×".join(map(str, shape)) for shape in (site.conv.weight.shape, layer.shape))
            raise _checks.fail(where, f"for a kernel of {mine}, as the model has", f"one for {its}")
        applied[name] = layer
        if layer.method != "dense":
            if site.reason:
                raise ValueError(f"{where} must be dense for a layer that cannot be factored: {site.reason}")
            _check_ranks(layer, tuple(site.conv.weight.shape), f"{where}: ")
            if guard:
                applied[name] = guarded(site.conv, layer, "params")
    for name, site in known.items():
        applied.setdefault(name, LayerPlan("dense", (), site.reason or "not in the plan"))
    return applied


def guarded(conv: nn.Conv2d, layer: LayerPlan, cost: str, in_size: Pair = (1, 1)) -> LayerPlan:
    """`layer`, or dense with a reason where the factored form is not cheaper; cost: "params" or "macs" on `in_size`."""
    if cost == "params":
        dense = conv.weight.numel()
        factored = sum(stage.weights for stage in factored_stages(conv, layer, any_size(conv)))
    else:
        dense = sum(stage.macs for stage in factored_stages(conv, LayerPlan("dense"), in_size))
        factored = sum(stage.macs for stage in factored_stages(conv, layer, in_size))
    if factored < dense:
        return layer
    ranks = "×".join(map(str, layer.ranks))
    unit = "weights" if cost == "params" else "multiply-adds"
    return LayerPlan(
        "dense", (), f"{layer.method} at rank {ranks} takes {factored:,} {unit}, the dense layer {dense:,}"
    )


def build(conv: nn.Conv2d, layer: LayerPlan, moment: Tensor | None = None) -> FactoredConv2d:
    """The factored layer that `layer` makes of `conv`; moment: of its patches, see `decompose.channel_svd`."""
    if layer.method == "tucker2":
        return FusedTucker2Conv.from_conv(conv, (layer.ranks[0], layer.ranks[1]), moment=moment)
    if layer.method == "cp":
        return FusedCPConv.from_conv(conv, layer.ranks[0])
    if layer.method == "cp-layer":
        return LayerCPConv.from_conv(conv, layer.ranks[0])
    return SVDConv.from_conv(conv, layer.ranks[0], layer.method.removeprefix("svd-"), moment=moment)


def _check_ranks(layer: LayerPlan, shape: tuple[int, ...], where: str = "") -> None:
    limits: tuple[int, ...]
    if layer.method == "tucker2":
        limits = max_ranks(shape)
    elif layer.method == "cp":
        limits = (shape[2] * shape[3],)
    elif layer.method == "cp-layer":
        limits = (_layer_cp.max_rank(shape),)
    elif layer.method == "dense":
        limits = ()
    else:
        limits = (_svd.max_rank(layer.method.removeprefix("svd-"), shape),)
    for index, (rank, limit) in enumerate(zip(layer.ranks, limits, strict=True)):
        _checks.integer(f"{where}ranks[{index}]", rank, 1, limit)


def any_size(conv: nn.Conv2d) -> Pair:
    """A map that the kernel fits into, for counts that do not depend on the size."""
    kernel, dilation = conv.kernel_size, conv.dilation
    return dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1


def copy_with(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy of `model` in which the replacements stand for their convolutions (which are not copied)."""
    memo: dict[int, object] = {id(old): new for old, new in replacements.items()}
    for module in model.modules():
        for value in vars(module).values():
            # Weights that weight_norm or a pruning mask computed: deepcopy refuses them, forward computes them anew.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, child) for every place a module stands at, shared ones at each."""
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                yield parent, attribute, child
