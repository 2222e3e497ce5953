"""Funnel: factor at full rank, close gates by a regulariser while the network trains, cut what closed.

Source: "Low-rank tensor decomposition for compression of convolutional neural networks using funnel regularization".
The steps: `factorize`; train; train with `regularizer`; `prune`; fine-tune. `compress` runs them up to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastrank import _checks, convert
from fastrank.methods._spectra import dense
from fastrank.methods.planner import check_skip, skipped
from fastrank.nn import FusedTucker2Conv, GatedConv2d, GatedCPConv, GatedSVDConv, GatedTucker2Conv, gates_together
from fastrank.nn._conv import FactoredConv2d
from fastrank.plan import LayerPlan, Plan
from fastrank.regularize import Funnel, Regularizer, Schedule
from fastrank.regularize.funnel import PUBLISHED

FORMS = ("tucker2", "svd", "cp")
# The layer method that each gated layer becomes.
METHODS: dict[type[GatedConv2d], str] = {
    GatedTucker2Conv: "tucker2",
    GatedSVDConv: "svd-channel",
    GatedCPConv: "cp-layer",
}


def factorize(
    model: nn.Module,
    *,
    form: str = "tucker2",
    example_input: Tensor | None = None,
    skip: tuple[str, ...] | list[str] = (),
) -> nn.Module:
    """A copy of `model` with gated layers: step 1, at full rank, where the network computes the same to rounding.

    form: what kernels larger than 1×1 become, "tucker2", "svd" (channel scheme) or "cp" (not exact: see
    `nn.gated_cp.default_rank`); 1×1 kernels (projection shortcuts too) become `GatedSVDConv` in every form. The first
    convolution, linear layers and convolutions that cannot be factored stay dense.
    example_input: a batch for the model; with it the first convolution is the first that runs, and those that do not
    run stay dense. skip: names of convolutions, or patterns such as "layer1.*", to leave dense; each has to match one.
    Raises ValueError or TypeError, naming the argument, also for a model that leaves nothing to factor.
    """
    _checks.choice("form", form, FORMS)
    found = convert.sites(model)
    check_skip(skip, [site.name for site in found])
    order = [site.name for site in found]
    run = order if example_input is None else list(convert.input_sizes(model, example_input))
    stem = next((name for name in run if name in order), None)
    replacements: dict[nn.Module, nn.Module] = {}
    layers: dict[str, LayerPlan] = {}
    for site in found:
        reason = site.reason or skipped(site.name, skip)
        if site.name == stem:
            reason = "Funnel leaves the first convolution alone"
        elif not reason and site.name not in run:
            reason = "the model does not run it on the example input"
        if reason:
            layers[site.name] = dense(reason)
        else:
            replacements[site.conv] = gated = _gated(site.conv, form)
            layers[site.name] = LayerPlan(METHODS[type(gated)], _ranks(gated), "gated, before pruning")
    if not replacements:
        raise _checks.fail("model", "a network with a convolution to factor besides its first", type(model).__name__)
    return _recorded(convert.copy_with(model, replacements), model, layers, {"form": form})


def regularizer(
    model: nn.Module,
    weight: float = 0.002,
    *,
    penalty: str = "funnel",
    schedule: Schedule = PUBLISHED,
    step: str = "proximal",
) -> Funnel:
    """λ Σ F_C(g) over the penalised gates of a factorised model: what step 3 adds to the loss."""
    return Funnel(model, weight, schedule=schedule, penalty=penalty, step=step)


def gates(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> copy of every penalised gate vector (R,) of a factorised model.

    Raises ValueError where there is none.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    found = {
        f"{name}.{gate}" if name else gate: getattr(module, gate).detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, GatedConv2d)
        for gate in module.PENALIZED
    }
    if not found:
        raise _checks.fail("model", "a network with gated layers (see funnel.factorize)", type(model).__name__)
    return found


def prune(model: nn.Module, threshold: float, *, example_input: Tensor | None = None) -> nn.Module:
    """A copy of a factorised `model` without the gates below `threshold`: step 4, before fine-tuning.

    Of every layer the largest gates stay, so that no rank falls below 1. A layer becomes its pruned form with the gates
    folded in, or, where that is not cheaper, a dense convolution rebuilt from all its gates. Cheaper is fewer
    multiply-adds on the map that the layer sees in `example_input`, without it fewer weights. The published thresholds
    are 0.02 for ResNet-18 and DenseNet-121, 0.01 for ResNet-50.
    The result bears `fastrank_plan` with the ranks that remain and a reason for every layer.
    Raises ValueError or TypeError, naming the argument; ValueError too for gates that are not finite.
    """
    threshold = _checks.number("threshold", threshold, 0.0)
    for name, gate in gates(model).items():
        _checks.finite(name, gate)
    sizes = {} if example_input is None else convert.input_sizes(model, example_input)
    before = getattr(model, "fastrank_plan", None)
    known = before.layers if isinstance(before, Plan) else {}
    replacements: dict[nn.Module, nn.Module] = {}
    layers: dict[str, LayerPlan] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedConv2d):
            pruned, whole = module.pruned(threshold), module.to_dense()
            kept, had = _ranks(pruned), _ranks(module)
            counts = " and ".join(f"{k} of {n}" for k, n in zip(kept, had, strict=True))
            layer = LayerPlan(METHODS[type(module)], kept, f"{counts} gates are at least {threshold:g}")
            cost = "macs" if name in sizes else "params"
            layers[name] = convert.guarded(whole, layer, cost, sizes.get(name, (1, 1)))
            replacements[module] = whole if layers[name].method == "dense" else pruned
        elif isinstance(module, nn.Conv2d):
            layers[name] = known.get(name, dense("it has no gates"))
    options = {"threshold": threshold, "guard": "params" if example_input is None else "macs"}
    return _recorded(convert.copy_with(model, replacements), model, layers, options)


def compress(
    model: nn.Module,
    *,
    warm: Callable[[nn.Module], None] | None,
    close: Callable[[nn.Module, Sequence[Regularizer]], None],
    form: str = "tucker2",
    threshold: float = 0.02,
    weight: float = 0.002,
    penalty: str = "funnel",
    schedule: Schedule = PUBLISHED,
    step: str = "proximal",
    example_input: Tensor | None = None,
    skip: tuple[str, ...] | list[str] = (),
) -> nn.Module:
    """The published steps but the last, fine-tuning: a compressed copy of `model`.

    warm: trains the factorised network in place with the plain loss (None: not at all; published: lr 1e-4). close:
    trains it in place with the given regularisers (published: gates, "*.gate_*", at lr 0.01, the rest at 0.001). Both
    find it with `nn.gates_together` on.
    The other arguments are those of `factorize`, `regularizer` and `prune`.
    """
    _checks.number("threshold", threshold, 0.0)
    network = factorize(model, form=form, example_input=example_input, skip=skip)
    penalties = [regularizer(network, weight, penalty=penalty, schedule=schedule, step=step)]
    with gates_together(network):
        if warm is not None:
            warm(network)
        close(network, penalties)
    return prune(network, threshold, example_input=example_input)


def _gated(conv: nn.Conv2d, form: str) -> GatedConv2d:
    if conv.kernel_size == (1, 1) or form == "svd":
        return GatedSVDConv.from_conv(conv)
    return GatedTucker2Conv.from_conv(conv) if form == "tucker2" else GatedCPConv.from_conv(conv)


def _ranks(layer: FactoredConv2d) -> tuple[int, ...]:
    if isinstance(layer, GatedConv2d):
        return tuple(gate.numel() for gate in layer.penalized())
    return layer.ranks if isinstance(layer, FusedTucker2Conv) else (layer.config()["rank"],)


def _recorded(
    result: nn.Module, model: nn.Module, layers: dict[str, LayerPlan], options: dict[str, str | float]
) -> nn.Module:
    """`result` with its plan; layers that an earlier compression factored keep their record."""
    before = getattr(model, "fastrank_plan", None)
    earlier = before.layers if isinstance(before, Plan) else {}
    result.fastrank_plan = Plan({**earlier, **layers}, "funnel", options)  # type: ignore[assignment]
    return result
