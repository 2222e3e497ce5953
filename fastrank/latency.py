"""Measured time of models side by side: interleaved, in one process, as medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrank import _checks

# One sample lasts at least this long, so that the clock's resolution and the call overhead do not show.
MIN_SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Latency:
    """Time of one call in microseconds: median and the 20th and 80th percentiles over `samples` samples."""

    p50_us: float
    p20_us: float
    p80_us: float
    samples: int


def compare(
    contenders: Mapping[str, nn.Module | Callable[[Tensor], object]], x: Tensor, *, rounds: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Time every contender on the input `x`, in turn in every round, so that drifts of the machine hit all alike.

    Modules run in eval mode, without gradients, and get their training flag back. On a CUDA device each sample is
    synchronised. rounds and warmup are at least 1 and 0. Raises ValueError or TypeError, naming the argument.
    """
    _checks.integer("rounds", rounds, 1)
    _checks.integer("warmup", warmup, 0)
    if not isinstance(contenders, Mapping):
        raise _checks.fail_type("contenders", "a mapping of names to models", contenders)
    for name, contender in contenders.items():
        if not callable(contender):
            raise _checks.fail_type(f"contenders[{name!r}]", "callable", contender)
    _checks.tensor("x", x)
    if not contenders:
        raise _checks.fail("contenders", "at least one model", "none")
    flags = [(m, m.training) for c in contenders.values() if isinstance(c, nn.Module) for m in c.modules()]
    for module, _ in flags:
        module.training = False
    try:
        with torch.inference_mode():
            for contender in contenders.values():
                for _ in range(warmup):
                    contender(x)
            repeats = {name: _repeats(contender, x) for name, contender in contenders.items()}
            samples: dict[str, list[float]] = {name: [] for name in contenders}
            names = list(contenders)
            for index in range(rounds):
                # The order rotates: who runs after whom must not favour anyone.
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    samples[name].append(_seconds(contenders[name], x, repeats[name]) / repeats[name] * 1e6)
    finally:
        for module, flag in flags:
            module.training = flag
    return {name: _summary(values) for name, values in samples.items()}


def _repeats(contender: Callable[[Tensor], object], x: Tensor) -> int:
    once = _seconds(contender, x, 1)
    return max(1, min(1000, int(MIN_SAMPLE_SECONDS / max(once, 1e-7)) + 1))


def _seconds(contender: Callable[[Tensor], object], x: Tensor, repeats: int) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    for _ in range(repeats):
        contender(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _summary(values: list[float]) -> Latency:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = quantiles.tolist()
    return Latency(p50_us=p50, p20_us=p20, p80_us=p80, samples=len(values))
