"""A cost model of the CPU this runs on: the library's calls at sizes from everywhere, timed one by one."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank import _tables, reference
from fastrank._backends import ConvWork
from fastrank._tables import Step
from fastrank.tune._measure import Case, Timing, in_turns, measure

CPU = torch.device("cpu")
Times = dict[str, float]
LIMIT_MACS = 1.2e9  # of one call: some 20 ms on a core
LIMIT_ELEMENTS = 2**24
# Kind of step -> how many of each group are measured.
POINTS = {
    "convolution": 100,
    "depthwise": 40,
    "sum": 16,
    "merge": 40,
    "convolution-backward": 48,
    "depthwise-backward": 24,
    "merge-backward": 32,
}
# Operator, call -> how many whole layers are measured, half of them to scale the sums, half to judge the choice.
LAYERS = {
    ("tucker2_conv2d", "inference"): 120,
    ("tucker2_conv2d", "forward"): 32,
    ("tucker2_conv2d", "backward"): 32,
    ("cp_conv2d", "inference"): 48,
    ("cp_conv2d", "forward"): 16,
    ("cp_conv2d", "backward"): 16,
    ("channel_svd_conv2d", "inference"): 40,
    ("channel_svd_conv2d", "forward"): 12,
    ("channel_svd_conv2d", "backward"): 12,
    ("spatial_svd_conv2d", "inference"): 40,
    ("spatial_svd_conv2d", "forward"): 12,
    ("spatial_svd_conv2d", "backward"): 12,
    ("decoupled_svd_conv2d", "inference"): 24,
    ("decoupled_svd_conv2d", "forward"): 12,
    ("decoupled_svd_conv2d", "backward"): 12,
}
PATHS = ("cp_conv2d", "decoupled_svd_conv2d")  # of R paths of all output channels each
# (I, O, map, stride) of 3×3 convolutions in ResNet-18 and -50, VGG-16 and the CIFAR ResNets.
SHAPES = [
    (64, 64, 56, 1), (64, 128, 56, 2), (128, 128, 28, 1), (128, 256, 28, 2), (256, 256, 14, 1), (256, 512, 14, 2),
    (512, 512, 7, 1), (128, 128, 56, 2), (256, 256, 28, 2), (512, 512, 14, 2), (64, 64, 112, 1), (64, 128, 112, 1),
    (128, 256, 56, 1), (256, 256, 56, 1), (256, 512, 28, 1), (512, 512, 28, 1), (512, 512, 14, 1), (16, 16, 32, 1),
    (16, 32, 32, 2), (32, 32, 16, 1), (64, 64, 8, 1),
]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a cost model is of."""

    dtype: torch.dtype
    channels_last: bool
    threads: int


def setups(threads: Iterable[int]) -> list[Setup]:
    """What networks run in on a CPU: float32, bfloat16 where it is served, both layouts, at these numbers of threads.

    Without the vendor's library a 16-bit convolution takes a hundred times as long as one of float32.
    """
    dtypes = (torch.float32, torch.bfloat16) if _serves_bfloat16() else (torch.float32,)
    kinds = itertools.product(threads, dtypes, (False, True))
    return [Setup(dtype, channels_last, count) for count, dtype, channels_last in kinds]


def _serves_bfloat16() -> bool:
    """Whether torch gives bfloat16 convolutions to its vendor's library here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Regret:
    """Time of the chosen backend over that of the faster one, on layers that the model was not made from."""

    layers: int
    p50: float
    p95: float
    worst: float


def calibrate(
    table: _tables.Table, setup: Setup, *, effort: float = 1.0, say: Callable[[str], None] = lambda _: None
) -> Regret:
    """Measure the library's calls and whole layers under `setup`, and put the model into the table.

    effort: a factor to the number of measurements; 1 takes about a minute on one core. Returns how well it chooses.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(setup.threads)
    try:
        points = [(step, _time_of(step, setup)) for step in _sample_steps(setup, effort)]
        groups = _tables.fit(points)
        say(f"{len(points)} calls of the library")
        layers = [(case, measure(case)) for case in _sample_layers(setup, effort)]
        say(f"{len(layers)} layers")
    finally:
        torch.set_num_threads(before)
    plain = _tables.Model(groups, dict.fromkeys(_labels(), 1.0))
    model = _tables.Model(groups, _scale(plain, layers[::2], setup))
    label = (str(setup.dtype).removeprefix("torch."), setup.channels_last, setup.threads)
    table.models[label] = model
    regret = _regret(model, layers[1::2], setup)
    spread = statistics.median(timing.spread for _, timing in layers)
    table.validation = [v for v in table.validation if (v["dtype"], v["channels_last"], v["threads"]) != label]
    table.validation.append(
        dict(zip(("dtype", "channels_last", "threads"), label, strict=True))
        | {"layers": regret.layers, "p50": regret.p50, "p95": regret.p95, "worst": regret.worst, "spread": spread}
    )
    return regret


def _sample_steps(setup: Setup, effort: float) -> Iterator[Step]:
    """Steps of random sizes, as many of every group, the same ones at every call."""
    rng = random.Random(0)
    for kind, count in POINTS.items():
        wanted: dict[str, int] = {}
        for _ in range(100 * count):
            step = _random_step(rng, kind, setup)
            if step.macs > LIMIT_MACS or step.batch * step.in_pixels * step.in_channels > LIMIT_ELEMENTS:
                continue
            group = _tables.group_of(step)
            if wanted.setdefault(group, max(8, round(effort * count))) > 0:
                wanted[group] -= 1
                yield step


def _channels(rng: random.Random) -> int:
    """Between 2 and 1024, evenly in the logarithm; from 8 on mostly multiples of 8, as networks have them."""
    count = round(2 ** rng.uniform(1, 10))
    return count if count < 8 or rng.random() < 0.4 else 8 * round(count / 8)


def _random_step(rng: random.Random, kind: str, setup: Setup) -> Step:
    side, batch = rng.choice((7, 8, 14, 16, 28, 32, 56, 112)), rng.choice((1, 1, 1, 2, 4, 8, 16, 32))
    source, target, kernel = (
        _channels(rng),
        _channels(rng),
        rng.choice(((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (5, 5))),
    )
    plain, forward = kind.removesuffix("-backward"), kind.endswith("-backward")
    stride = 2 if kernel != (1, 1) and rng.random() < 0.25 else 1
    ranks = max(1, round(source * rng.uniform(0.1, 0.9))), max(1, round(target * rng.uniform(0.1, 0.9)))
    pads = kernel[0] // 2, kernel[1] // 2
    work = ConvWork(
        batch, source, target, (side, side), kernel, ranks, (stride,) * 2, pads, (1, 1), setup.channels_last, "forward"
    )
    if plain == "merge":
        step = _tables.steps("tucker2_conv2d", "dense", work, setup.dtype, setup.threads)[0]
    elif plain == "convolution":
        step = _tables.steps("tucker2_conv2d", "dense", work, setup.dtype, setup.threads)[1]
    else:
        rank, form, k = rng.choice((1, 1, 2, 4, 8)), rng.choice(PATHS), rng.choice((3, 3, 5))
        work = replace(
            work,
            out_channels=min(target, 4096 // rank),
            kernel=(k, k),
            ranks=(rank, rank),
            stride=work.stride if form == "decoupled_svd_conv2d" else (1, 1),
            padding=(k // 2, k // 2),
        )
        *_, last, total = _tables.steps(form, "sequence", work, setup.dtype, setup.threads)
        step = total if plain == "sum" else last
    return step._replace(kind=f"{plain}-backward") if forward else step


def _time_of(step: Step, setup: Setup) -> float:
    """Median microseconds of a step on random data."""
    with torch.no_grad():
        timing: Timing = in_turns({"call": _call(step, setup)}, CPU, 5)
    return timing.us["call"]


def _call(step: Step, setup: Setup) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if setup.channels_last else torch.contiguous_format

    def random_of(*size: int) -> Tensor:
        made = torch.randn(size, generator=generator).to(setup.dtype)
        return made.contiguous(memory_format=layout) if made.dim() == 4 else made

    kind, backward = step.kind.removesuffix("-backward"), step.kind.endswith("-backward")
    side, out = math.isqrt(step.in_pixels), math.isqrt(step.out_pixels)
    if kind == "merge":
        return _merge_call(step, backward, random_of)
    x = random_of(step.batch, step.in_channels, side, side)
    if kind == "sum":
        return lambda: x.unflatten(1, (-1, step.out_channels)).sum(1)  # type: ignore[no-untyped-call]
    k, groups, stride = math.isqrt(step.taps), step.in_channels if kind == "depthwise" else 1, -(-side // out)
    kernel = (k, k) if k * k == step.taps else (step.taps, 1)
    pads = kernel[0] // 2, kernel[1] // 2
    weight = random_of(step.out_channels, step.in_channels // groups, *kernel)
    if not backward:
        return partial(F.conv2d, x, weight, None, stride, pads, 1, groups)
    grad = torch.ones_like(F.conv2d(x, weight, None, stride, pads, 1, groups))
    arguments: Any = ((stride, stride), pads, (1, 1), False, (0, 0), groups, (True, True, False))
    return partial(torch.ops.aten.convolution_backward, grad, x, weight, None, *arguments)


def _merge_call(step: Step, backward: bool, random_of: Callable[..., Tensor]) -> Callable[[], object]:
    """The ranks follow from the multiply-adds; the two of them alike, since only the sum of the products is known."""
    i, o, taps = step.in_channels, step.out_channels, step.taps
    # macs = taps · O · r · (r + I)
    rank = max(1, round((math.sqrt(i * i + 4 * step.macs / (taps * o)) - i) / 2))
    k = math.isqrt(taps)
    w_in, core, w_out = random_of(rank, i), random_of(rank, rank, k, k), random_of(o, rank)
    if not backward:
        return partial(reference.conv.tucker2_weight, w_in, core, w_out)
    return partial(reference.conv.tucker2_weight_backward, random_of(o, i, k, k), w_in, core, w_out)


def _sample_layers(setup: Setup, effort: float) -> Iterator[Case]:
    """Layers of known networks at random ranks and batches, the same ones at every call."""
    rng = random.Random(1)
    for (op, call), count in LAYERS.items():
        left = max(4, round(effort * count))
        while left:
            i, o, side, stride = rng.choice(SHAPES)
            batch, share = rng.choice((1, 1, 2, 4, 8, 16, 32)), rng.uniform(0.1, 0.9)
            if op in PATHS:
                rank = rng.choice((1, 1, 2, 4, 8))
                ranks, largest, paths = (rank, rank), 0.25 * LIMIT_MACS, max(1.0, rank / 2)
            else:
                ranks = max(1, round(share * i)), max(1, round(share * o * rng.uniform(0.7, 1.1)))
                ranks = ranks if op == "tucker2_conv2d" else ranks[:1] * 2
                largest, paths = LIMIT_MACS if call == "inference" else 0.25 * LIMIT_MACS, 1.0
            macs = 9 * i * o * (-(-side // stride)) ** 2 * batch * paths
            if macs <= largest:
                left -= 1
                work = ConvWork(
                    batch, i, o, (side, side), (3, 3), ranks, (stride,) * 2, (1, 1), (1, 1), setup.channels_last, call
                )
                yield Case("", op, work, setup.dtype)


def _labels() -> Iterator[str]:
    """What a factor belongs to: operator, backend and call."""
    for op, call in LAYERS:
        for backend in _tables.LIBRARY[op]:
            yield f"{op} {backend} {call}"


def _predicted(model: _tables.Model, case: Case, setup: Setup) -> dict[str, float]:
    times = {}
    for backend in _tables.LIBRARY[case.op]:
        parts = _tables.steps(case.op, backend, case.work, setup.dtype, setup.threads)
        us = model.predict(f"{case.op} {backend} {case.work.call}", parts)
        assert us is not None
        times[backend] = us
    return times


def _scale(model: _tables.Model, layers: list[tuple[Case, Timing]], setup: Setup) -> dict[str, float]:
    """What whole layers take over the sum of their calls: medians over the layers that are hard to decide.

    That of each backend is taken relative to dense, so that what disturbed both drops out.
    """
    scale = {}
    for op, call in LAYERS:
        found = [
            (timing.us, _predicted(model, case, setup))
            for case, timing in layers
            if (case.op, case.work.call) == (op, call)
        ]
        dense = statistics.median(us["dense"] / guess["dense"] for us, guess in _closest(found, "sequence"))
        scale[f"{op} dense {call}"] = float(f"{dense:.4g}")
        for name in set(_tables.LIBRARY[op]) - {"dense"}:
            ratio = statistics.median(
                us[name] / us["dense"] * guess["dense"] / guess[name] for us, guess in _closest(found, name)
            )
            scale[f"{op} {name} {call}"] = float(f"{dense * ratio:.4g}")
    return scale


def _closest(found: list[tuple[Times, Times]], name: str) -> list[tuple[Times, Times]]:
    """The half of the layers, four at least, on which a backend and dense differ least."""
    ordered = sorted(found, key=lambda pair: abs(math.log(pair[0]["dense"] / pair[0][name])))
    return ordered[: max(4, len(found) // 2)]


def _regret(model: _tables.Model, layers: list[tuple[Case, Timing]], setup: Setup) -> Regret:
    ratios = []
    for case, timing in layers:
        guess = _predicted(model, case, setup)
        chosen = min(guess, key=lambda name: guess[name])
        ratios.append(timing.us[chosen] / min(timing.us[name] for name in guess))
    ratios.sort()
    p50, p95 = (ratios[round(q * (len(ratios) - 1))] for q in (0.5, 0.95))
    return Regret(len(ratios), round(p50, 4), round(p95, 4), round(ratios[-1], 4))
