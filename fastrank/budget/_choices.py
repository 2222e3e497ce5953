"""What may become of one layer: forms and ranks worth considering, and what of the kernel's energy each would lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastrank import decompose, ranks
from fastrank.convert import Call, build, factored_stages
from fastrank.decompose.tucker import max_ranks
from fastrank.decompose.unfold import unfold
from fastrank.plan import LAYER_METHODS, LayerPlan

STEPS = 12
"""Ranks that are tried between the smallest and the full one, in equal ratios."""
KEPT = 8
"""Choices of one form that remain of them: enough for a budget to be met closely, few enough to be timed."""
CP_RANKS = (1, 2, 3, 4)
DENSE = LayerPlan("dense")


@dataclass
class Place:
    """A convolution that may be factored, and how it is called: `calls` of the example input, of `images` images."""

    name: str
    conv: nn.Conv2d
    calls: Sequence[Call]
    images: int


@dataclass(frozen=True)
class Choice:
    """One thing that may become of a layer.

    error: share of the kernel's energy, or of the outputs', that is lost; or what the sensitivity says. costs: by kind,
    of the whole layer.
    """

    layer: LayerPlan
    error: float
    costs: Mapping[str, float] = field(default_factory=dict)


def multiple(size: int) -> int:
    """What the ranks of a side of `size` channels are multiples of: the widths that vector units and tensor cores
    take, where that leaves enough ranks to choose from."""
    return next((step for step, least in ((16, 256), (8, 64), (4, 16)) if size >= least), 1)


def grid(limit: int) -> list[int]:
    """Ranks from 1/32 of `limit` up to it, in equal ratios, rounded to `multiple`."""
    step = multiple(limit)
    wanted = (limit * 32 ** (place / STEPS - 1) for place in range(STEPS + 1))
    return sorted({min(limit, max(step, round(rank / step) * step)) for rank in wanted})


def counted(place: Place, layer: LayerPlan) -> dict[str, float]:
    """Multiply-adds for one image, weights, and bytes of weights, with those of the bias nowhere counted."""
    return _Count(place, layer.method)(layer.ranks)


class _Count:
    """What a form costs at any ranks: every stage grows in proportion to the ranks at its two ends."""

    def __init__(self, place: Place, form: str) -> None:
        one = LayerPlan(form, (1,) * LAYER_METHODS[form])
        self.bytes = place.conv.weight.element_size()
        self.form, self.macs, self.weights = form, list[float](), list[float]()
        for call, often in Counter(place.calls).items():
            stages = factored_stages(place.conv, one, call.size)
            images = often * call.shape[0] / place.images
            mine = [images * stage.macs for stage in stages]
            self.macs = [a + b for a, b in zip(self.macs or [0.0] * len(mine), mine, strict=True)]
            self.weights = [stage.weights for stage in stages]

    def __call__(self, ranks: tuple[int, ...]) -> dict[str, float]:
        if self.form == "tucker2":
            growth = [ranks[0], ranks[0] * ranks[1], ranks[1]]
        else:
            growth = [ranks[0] if ranks else 1] * len(self.macs)
        macs, weights = (sum(a * b for a, b in zip(growth, each, strict=True)) for each in (self.macs, self.weights))
        return {"macs": macs, "params": weights, "bytes": weights * self.bytes}


def choices(place: Place, forms: Sequence[str]) -> list[Choice]:
    """The candidates of each form that no other candidate of it beats in both error and multiply-adds."""
    dense = counted(place, DENSE)
    found: list[Choice] = []
    for form in forms:
        mine, count = list[Choice](), _Count(place, form)
        for layer, error in FORMS[form](place.conv):
            costs = count(layer.ranks)
            # One that costs more by every count is slower too; the time of the others is for the clock to tell.
            if any(costs[kind] < dense[kind] for kind in costs):
                mine.append(Choice(layer, error, costs))
        found += thin(mine)
    return found


def thin(candidates: Sequence[Choice]) -> list[Choice]:
    """Those on the front of error against multiply-adds, at most `KEPT`, spread evenly along it."""
    front: list[Choice] = []
    for choice in sorted(candidates, key=lambda c: (c.costs["macs"], c.error)):
        if not front or choice.error < front[-1].error:
            front.append(choice)
    if len(front) <= KEPT:
        return front
    return [front[round(place * (len(front) - 1) / (KEPT - 1))] for place in range(KEPT)]


def approximation(conv: nn.Conv2d, layer: LayerPlan, moment: Tensor | None = None) -> Tensor:
    """The dense kernel (O, I, kh, kw) that `layer` would leave of that of `conv`."""
    return build(conv, layer, moment).to_dense().weight.detach()


def _tails(values: Tensor) -> list[float]:
    """Shares of Σσ² that are lost at ranks 1, 2, ...: from the small end, so that small ones keep their digits."""
    squares = values.double().square()
    left = squares.flip(0).cumsum(0).flip(0)
    return [*(left[1:] / left[0].clamp(min=torch.finfo(left.dtype).tiny)).tolist(), 0.0]


def _tucker2(conv: nn.Conv2d) -> list[tuple[LayerPlan, float]]:
    if conv.kernel_size == (1, 1):
        return []  # three layers in place of one that could be two
    weight = conv.weight.detach()
    limits = max_ranks(tuple(weight.shape))
    energy = decompose.tucker2(weight, limits).core.double().square().sum((2, 3))
    kept = energy.cumsum(0).cumsum(1)
    lost = ((kept[-1, -1] - kept) / kept[-1, -1].clamp(min=torch.finfo(kept.dtype).tiny)).clamp(min=0)
    return [
        (LayerPlan("tucker2", (rank_in, rank_out)), float(lost[rank_out - 1, rank_in - 1]))
        for rank_in in grid(limits[0])
        for rank_out in grid(limits[1])
    ]


def _svd(scheme: str) -> Callable[[nn.Conv2d], list[tuple[LayerPlan, float]]]:
    def propose(conv: nn.Conv2d) -> list[tuple[LayerPlan, float]]:
        if scheme == "spatial" and 1 in conv.kernel_size:
            return []
        tails = _tails(ranks.singular_values(unfold(conv.weight.detach(), scheme)))
        return [(LayerPlan(f"svd-{scheme}", (rank,)), tails[rank - 1]) for rank in grid(len(tails))]

    return propose


def _decoupled(conv: nn.Conv2d) -> list[tuple[LayerPlan, float]]:
    if conv.kernel_size == (1, 1):
        return []
    squares = torch.linalg.svdvals(conv.weight.detach().flatten(2).double()).square().sum(0)
    tails = _tails(squares.sqrt())
    return [(LayerPlan("svd-decoupled", (rank,)), tails[rank - 1]) for rank in CP_RANKS if rank <= len(tails)]


def _cp(conv: nn.Conv2d) -> list[tuple[LayerPlan, float]]:
    if conv.kernel_size == (1, 1):
        return []
    weight = conv.weight.detach().double()
    whole = float(weight.square().sum())
    found = []
    for rank in CP_RANKS:
        if rank <= conv.kernel_size[0] * conv.kernel_size[1]:
            layer = LayerPlan("cp", (rank,))
            lost = float((weight - approximation(conv, layer).double()).square().sum())
            found.append((layer, lost / whole if whole else 0.0))
    return found


FORMS: dict[str, Callable[[nn.Conv2d], list[tuple[LayerPlan, float]]]] = {
    "tucker2": _tucker2,
    "svd-channel": _svd("channel"),
    "svd-spatial": _svd("spatial"),
    "svd-decoupled": _decoupled,
    "cp": _cp,
}
