"""Channel removal in any network: torch-pruning finds what hangs together, the similarity here chooses what goes.

torch-pruning (https://github.com/VainF/Torch-Pruning; Fang et al. 2023, DepGraph) is imported on first use.
"""

from __future__ import annotations

import copy
import importlib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank.nn import FusedCPConv
from fastrank.nn._conv import FactoredConv2d
from fastrank.prune._narrow import keep_inputs, keep_outputs
from fastrank.prune.selection import removal_order
from fastrank.prune.similarity import CRITERIA, distances

_SCORED = (nn.Conv2d, nn.Linear, FusedCPConv)


class Importance:
    """Scores for torch-pruning under which it removes what `select` removes: the place in `removal_order`, in (0, 1].

    Usable as the `importance` of any torch-pruning pruner (scores compare between layers too, for its global pruning);
    meanwhile a `FusedCPConv` needs a `backend` that is named, with which it is one node of autograd.
    A group of n channels gets the matrices of its `nn.Conv2d`, `nn.Linear` and `FusedCPConv` outputs, each divided by
    its mean, and of several for one pair of channels the average; a group without such a layer gets no scores, so that
    torch-pruning leaves it alone. criterion: see `fastrank.prune.similarity`.
    """

    def __init__(self, criterion: str = "l2") -> None:
        self.criterion = _checks.choice("criterion", criterion, CRITERIA)

    def __call__(self, group: Any) -> Tensor | None:
        """The scores (n,) of a torch-pruning group that holds all its n channels."""
        count = len(group[0].idxs)
        total, layers = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count)
        seen: set[nn.Module] = set()
        for item in group:
            layer = item.dep.layer
            writes = group._DG.is_out_channel_pruning_fn(item.dep.handler)
            if not writes or layer in seen or not isinstance(layer, _SCORED) or None in item.root_idxs:
                continue
            seen.add(layer)
            own, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            matrix = distances(layer, self.criterion).cpu()[own[:, None], own]
            total[roots[:, None], roots] += matrix / matrix.mean() if bool(matrix.any()) else matrix
            layers[roots[:, None], roots] += 1
        if not seen:
            return None
        scores = torch.empty(count)
        scores[removal_order(total / layers.clamp(min=1))] = torch.arange(1, count + 1) / count
        return scores


def with_torch_pruning(
    model: nn.Module,
    example_input: Tensor,
    ratio: float,
    *,
    criterion: str = "l2",
    skip: tuple[str, ...] | list[str] = (),
) -> nn.Module:
    """A copy of `model` in which every group of n coupled channels keeps int(n·(1−ratio)), at least one.

    model: any network that autograd can trace, with plain layers and `FusedCPConv` (so decompose first, prune then; the
    other factored layers are refused). The outputs of the network keep their channels. example_input: a batch for it.
    ratio: in [0, 1). criterion: for the `FusedCPConv`, see `fastrank.prune.similarity`; the others go by "l2".
    skip: names of layers, or patterns such as "layer4.*", whose outputs keep their channels.

    Kept weights and statistics are those of `model`, which is not changed. The copy has no name that `fastrank.load`
    could build it by: load its file with the pruned network as `model`. Raises ValueError or TypeError, naming the
    argument, and ImportError where torch-pruning is missing.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    _checks.tensor("example_input", example_input)
    _checks.number("ratio", ratio, 0.0)
    if ratio >= 1:
        raise _checks.fail("ratio", "below 1", ratio)
    importance = Importance(criterion)
    for name, module in model.named_modules():
        if isinstance(module, FactoredConv2d) and not isinstance(module, FusedCPConv):
            found = f"{type(module).__name__} {name!r} (prune first, and factor then)"
            raise _checks.fail("model", "of plain layers and FusedCPConv", found)
    tp = _import()
    result = copy.deepcopy(model)
    training = {name: module.training for name, module in result.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in result.named_parameters()}
    fixed = _skipped(result, skip)
    # A backend that is named is one node of autograd, whose graph torch-pruning follows.
    backends = {module: module.backend for module in result.modules() if isinstance(module, FusedCPConv)}
    for module in backends:
        module.backend = "sequence"
    try:
        with torch.enable_grad():
            before, heads = _trace(result.eval().requires_grad_(), example_input)
            pruner = tp.pruner.MagnitudePruner(
                result,
                example_input,
                importance,
                pruning_ratio=ratio,
                ignored_layers=[*heads, *fixed],
                customized_pruners={FusedCPConv: _cp_pruner(tp)},
                root_module_types=[nn.Conv2d, nn.Linear, FusedCPConv],
                in_channel_groups={},  # the library's defaults are dicts that it shares between pruners and writes to
                out_channel_groups={},
                num_heads={},
            )
            pruner.step()
            after, _ = _trace(result, example_input)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise _checks.fail("model", "a network that torch-pruning can follow on example_input", reason) from error
    if after != before:
        raise _checks.fail("skip", "the layers that make the outputs of the network", f"outputs {after} for {before}")
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(needs[name])
    for name, module in result.named_modules():
        module.training = training[name]
    for module, backend in backends.items():
        module.backend = backend
    if hasattr(result, "fastrank_origin"):
        del result.fastrank_origin
    return result


def _import() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        message = "with_torch_pruning needs torch-pruning: install it with `pip install 'fastrank[prune]'`"
        raise ImportError(message) from error


def _skipped(model: nn.Module, skip: Any) -> list[nn.Module]:
    if not isinstance(skip, tuple | list) or not all(isinstance(pattern, str) for pattern in skip):
        raise _checks.fail_type("skip", "a list of layer names or patterns", skip)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _SCORED)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            found = f"{pattern!r}{_checks.near(pattern, layers)}"
            raise _checks.fail("skip", "names or patterns of convolutions and linear layers of the model", found)
    return [layer for name, layer in layers.items() if any(fnmatchcase(name, pattern) for pattern in skip)]


def _trace(model: nn.Module, example_input: Tensor) -> tuple[list[tuple[int, ...]], list[nn.Module]]:
    """Shapes of the outputs, and the layers with weights whose outputs reach them with no such layer between."""
    made_by: dict[Any, nn.Module] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        made_by[output.grad_fn] = module

    handles = [layer.register_forward_hook(record) for layer in model.modules() if isinstance(layer, _SCORED)]
    try:
        outputs = _tensors(model(example_input))
    finally:
        for handle in handles:
            handle.remove()
    heads, seen, waiting = dict[nn.Module, None](), set[Any](), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made_by:
            heads[made_by[node]] = None
        else:
            waiting += [step for step, _ in node.next_functions]
    return [tuple(output.shape) for output in outputs], list(heads)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, list | tuple) else []


def _cp_pruner(tp: Any) -> Any:
    """How torch-pruning removes channels of a `FusedCPConv`: it names the indices that go."""

    class CPPruner(tp.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: FusedCPConv, idxs: Any) -> FusedCPConv:
            keep_outputs(layer, _others(layer.out_channels, idxs))
            return layer

        def prune_in_channels(self, layer: FusedCPConv, idxs: Any) -> FusedCPConv:
            keep_inputs(layer, _others(layer.in_channels, idxs))
            return layer

        def get_out_channels(self, layer: FusedCPConv) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: FusedCPConv) -> int:
            return layer.in_channels

    return CPPruner()


def _others(count: int, gone: Any) -> Tensor:
    return torch.tensor(sorted(set(range(count)) - set(gone)))
