"""What a training step costs a rank: flops, and bytes by collective, as a formula; and a counter to check it with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrank import _checks, complexity
from fastrank.distributed import _batchnorm
from fastrank.distributed._parallel import KINDS, kept_whole
from fastrank.ops._parallel import cost as decomposition
from fastrank.regularize import LowRankProjection
from fastrank.regularize._share import owners
from fastrank.regularize._spectral import SpectralRegularizer
from fastrank.regularize.base import Regularizer

STATUS = 40
"""Bytes of the loop's own reduction: loss, right answers, images, and two that find a loss that is not finite."""
SETTLE = 48
"""Bytes by which the ranks agree before they exchange decompositions."""
SENT = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}
"""Bytes that a rank sends in a ring of p, a byte of payload, in units of (p − 1)/p; a broadcast is passed on."""


@dataclass(frozen=True)
class Cost:
    """One training step, of one rank out of `world`.

    training_flops: forward and backward of its images, 2 a multiply-add and 3 passes; None without an input size.
    regularizer_flops: the decompositions of the rank with the largest share; one process would do
    `regularizer_flops_alone`. payload: bytes by (collective, purpose); a reduction's are those of its tensor, those of
    a gather or a scatter of the whole. What does not happen in every step counts for its share of it.
    """

    world: int
    parallel: str
    training_flops: float | None
    regularizer_flops: float
    regularizer_flops_alone: float
    payload: Mapping[tuple[str, str], float]

    def by_collective(self) -> dict[str, float]:
        """The payload by collective."""
        found: Counter[str] = Counter()
        for (collective, _), size in self.payload.items():
            found[collective] += size  # type: ignore[assignment]
        return dict(found)

    @property
    def bytes_sent(self) -> float:
        """What a rank sends a step where collectives go round a ring, on the mean of the ranks."""
        ring = (self.world - 1) / self.world
        return sum(SENT[collective] * ring * size for collective, size in self.by_collective().items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        payload = {f"{collective}: {purpose}": size for (collective, purpose), size in self.payload.items()}
        fields = ("world", "parallel", "training_flops", "regularizer_flops", "regularizer_flops_alone", "bytes_sent")
        return {**{name: getattr(self, name) for name in fields}, "payload": payload}


def cost(
    model: nn.Module,
    regularizers: Sequence[Regularizer] = (),
    *,
    world: int,
    parallel: str = "ddp",
    sync_batchnorm: bool = True,
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
) -> Cost:
    """What a step of `fastrank.train.fit` on a batch of `batch_size` images costs each of `world` ranks.

    input_size: (C, H, W), for the flops of the network. The model is whole, on any device; nothing is computed.
    Raises ValueError or TypeError for a wrong argument.
    """
    _checks.integer("world", world, 1)
    _checks.integer("batch_size", batch_size, 1)
    _checks.choice("parallel", parallel, KINDS)
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    flops = None
    if input_size is not None:
        flops = 6.0 * complexity.count(model, input_size).macs * -(-batch_size // world)
    payload: Counter[tuple[str, str]] = Counter()
    largest, alone = 0.0, 0.0
    for regularizer in regularizers:
        if isinstance(regularizer, SpectralRegularizer):
            own, all_of_it, traffic = _decompositions(regularizer, world, parallel)
            largest, alone = largest + own, alone + all_of_it
            payload.update(traffic)
    if world > 1:
        payload["all_reduce", "status"] += STATUS
        payload.update(_gradients(model, regularizers, world, parallel))
        if sync_batchnorm:
            payload.update(_statistics(model, world))
    return Cost(world, parallel, flops, largest, alone, dict(payload) if world > 1 else {})


def _gradients(
    model: nn.Module, regularizers: Sequence[Regularizer], world: int, parallel: str
) -> Mapping[tuple[str, str], int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if parallel == "ddp":
        return Counter({("all_reduce", "gradients"): sum(_bytes(p) for p in trained)})
    whole = kept_whole(model, regularizers)
    found: Counter[tuple[str, str]] = Counter()
    found["all_reduce", "gradients"] = sum(_bytes(p) for p in trained if id(p) in whole)
    sharded = [p for p in model.parameters() if id(p) not in whole]
    # Once before the forward of its block, once before the backward.
    found["all_gather", "weights"] = 2 * sum(_padded(p.shape, world) * p.element_size() for p in sharded)
    found["reduce_scatter", "gradients"] = sum(
        _padded(p.shape, world) * p.element_size() for p in sharded if p.requires_grad
    )
    return found


def _statistics(model: nn.Module, world: int) -> Mapping[tuple[str, str], int]:
    """Of every batch normalisation, 2·C + 1 numbers a rank forward and 2·C backward."""
    widths = [layer.num_features for layer in _batchnorm.layers(model).values()]
    found: Counter[tuple[str, str]] = Counter()
    found["all_gather", "batch statistics"] = sum(4 * world * (2 * width + 1) for width in widths)
    found["all_reduce", "batch statistics"] = sum(4 * 2 * width for width in widths)
    return found


def _decompositions(
    regularizer: SpectralRegularizer, world: int, parallel: str
) -> tuple[float, float, Mapping[tuple[str, str], float]]:
    """Flops of the rank that has most to do, and of one process; payload. All of them a step, on the mean."""
    kernels = regularizer.kernels
    values = {name: torch.empty(kernel.shape, device="meta") for name, kernel in kernels.items()}
    shapes = [tuple(matrix.shape) for group in regularizer._matrices(values) for part in group for matrix in part]
    shared = world if regularizer._share.enabled else 1
    loads = [0.0] * shared
    for shape, owner in zip(shapes, owners(shapes, shared, regularizer._state is not None), strict=True):
        loads[owner] += decomposition(shape)
    traffic: Counter[tuple[str, str]] = Counter()
    if shared > 1:
        traffic["all_reduce", "regularizers"] = SETTLE
        size = next(iter(kernels.values())).element_size()
        traffic["broadcast", "regularizers"] = size * sum(math.prod(shape) for shape in shapes)
        if isinstance(regularizer, LowRankProjection):
            traffic["all_reduce", "regularizers"] += 8 * len(shapes)
    if parallel == "fsdp" and world > 1:
        sizes = [_padded(kernel.shape, world) * kernel.element_size() for kernel in kernels.values()]
        traffic["all_gather", "regularizers"] = sum(sizes)
    share = 1 / regularizer.every if isinstance(regularizer, LowRankProjection) else 1.0
    return share * max(loads), share * sum(loads), {key: share * size for key, size in traffic.items()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(shape: Sequence[int], world: int) -> int:
    """Entries of a tensor cut along its first dimension into equal parts, of which the last may be partly empty."""
    return world * -(-shape[0] // world) * math.prod(shape[1:])


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of torch.distributed in its block, by kind: `calls`, and `payload` in bytes.

    The payload is that of `Cost`. Broadcasts, reductions, gathers and scatters of tensors count, those of Python
    objects (at a checkpoint) do as well; point-to-point messages do not.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count it where it is a collective."""
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")):
            kind = next((known for word, known in _NAMES.items() if word in name), None)
            if kind is not None:
                sizes = [sum(_bytes(t) for t in _tensors(argument)) for argument in args]
                gathered = len(args) > 0 and name.startswith("_c10d_functional::all_gather")
                self.calls[kind] += 1
                self.payload[kind] += sizes[0] * int(args[1]) if gathered else max(sizes)
        return func(*args, **(kwargs or {}))


_NAMES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def table(costs: Sequence[Cost]) -> str:
    """Costs as a Markdown table, one row a number of ranks."""
    head = "| ranks | parallel | network, GFLOP | decompositions, GFLOP | of one process | MB sent | by |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for found in costs:
        network = "" if found.training_flops is None else f"{found.training_flops / 1e9:.3g}"
        purposes: Counter[str] = Counter()
        for (collective, purpose), size in found.payload.items():
            ring = (found.world - 1) / found.world
            purposes[purpose] += SENT[collective] * ring * size  # type: ignore[assignment]
        parts = ", ".join(f"{purpose} {size / 1e6:.3g}" for purpose, size in sorted(purposes.items()))
        alone = found.regularizer_flops_alone
        share = f"{100 * found.regularizer_flops / alone:.0f} %" if alone else ""
        cells = [str(found.world), found.parallel, network, f"{found.regularizer_flops / 1e9:.3g}", share]
        rows.append("| " + " | ".join([*cells, f"{found.bytes_sent / 1e6:.3g}", parts or "none"]) + " |")
    return "\n".join(rows)
