"""Cases to measure, from models, and their measuring: in turns, as medians."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _backends, _checks, _tables, ops
from fastrank._backends import ConvWork
from fastrank.convert import input_sizes, sites
from fastrank.decompose.tucker import max_ranks
from fastrank.nn import FusedCPConv, FusedTucker2Conv
from fastrank.nn._forms import CP, SVD, TUCKER2, Form, chain, stages_of
from fastrank.nn._fused import FusedConv2d
from fastrank.nn._prepared import work_of
from fastrank.ops._conv import BY_LIBRARY, Geometry
from fastrank.ops._conv import Call as ConvCall

# A sample lasts at least this long, so that the clock's resolution and the start of a kernel do not show.
MIN_SAMPLE_SECONDS = 1.5e-3
SAMPLES = 7
# A spread that a quiet machine does not show, and how often such a measurement is tried.
BUSY, ATTEMPTS = 0.2, 3
FORMS: dict[str, Form] = {form.op: form for form in (TUCKER2, CP, *SVD.values())}
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One call of a factored convolution: a layer's name, the operator, its size and its dtype."""

    name: str
    op: str
    work: ConvWork
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """Microseconds of each backend, medians; spread: (p80 - p20) / p50 of the one that varied most."""

    us: dict[str, float]
    spread: float


@dataclass(frozen=True)
class Explanation:
    """What `auto` takes for a case, what every known backend costs and how that is known, and why others cannot run."""

    case: Case
    backend: str
    us: dict[str, float]
    source: str
    refused: dict[str, str]


def cases(model: nn.Module, x: Tensor) -> list[Case]:
    """The inferences of the compressed layers of `model` on the batch x (N, C, H, W).

    These are FusedTucker2Conv, FusedCPConv and SVDConv. Runs one forward in eval mode. Raises ValueError where there is
    none of them.
    """
    found: dict[tuple[str, ConvWork], Case] = {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, FusedConv2d)}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, FusedConv2d)
        padded, padding = layer._padded(layer._batched(inputs[0]))
        work = work_of(layer, padded, padding)
        found[names[layer], work] = Case(names[layer], layer.form.op, work, padded.dtype)

    if not names:
        kinds = "one with compressed layers (FusedTucker2Conv, FusedCPConv, SVDConv)"
        raise _checks.fail("model", kinds, "none of them")
    flags = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in flags:
            module.training = flag
    return list(found.values())


def cases_as_if(
    model: nn.Module,
    x: Tensor,
    share: float,
    *,
    cp_rank: int | None = None,
    channels_last: bool = False,
    largest: float = math.inf,
) -> list[Case]:
    """The same for a dense `model` whose convolutions had Tucker-2 kernels, ranks being `share` of the channels.

    cp_rank: CP filters of that rank instead, of no more than the kernel's taps. Left out are 1×1 convolutions, those of
    fewer than 8 input channels, which nobody compresses, and those of more than `largest` multiply-adds a batch.
    """
    share = _checks.number("share", share, 0.0, 1.0, open_low=True)
    sizes, found = input_sizes(model, x[:1]), {}
    for site in sites(model):
        conv = site.conv
        if site.reason or conv.kernel_size == (1, 1) or site.name not in sizes or conv.in_channels < 8:
            continue
        layer = _as_if(conv, share, cp_rank)
        inputs = torch.empty(x.shape[0], conv.in_channels, *sizes[site.name], device="meta", dtype=x.dtype)
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        work = work_of(layer, *layer._padded(inputs))
        macs = work.batch * math.prod(work.out_size) * math.prod(work.kernel) * work.in_channels * work.out_channels
        if macs <= largest:
            found[work] = Case(site.name, layer.form.op, work, x.dtype)
    return list(found.values())


def _as_if(conv: nn.Conv2d, share: float, cp_rank: int | None) -> FusedConv2d:
    """The layer, without values, that a convolution would become."""
    kernel = conv.kernel_size[0], conv.kernel_size[1]
    sizes = conv.in_channels, conv.out_channels, kernel
    geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    if cp_rank is not None:
        return FusedCPConv(*sizes, min(cp_rank, math.prod(kernel)), device="meta", **geometry)
    limits = max_ranks(tuple(conv.weight.shape))
    ranks = [round(share * channels) for channels in (conv.in_channels, conv.out_channels)]
    rank_in, rank_out = (min(max(1, rank), limit) for rank, limit in zip(ranks, limits, strict=True))
    return FusedTucker2Conv(*sizes, (rank_in, rank_out), device="meta", **geometry)


def explain(case: Case, device: torch.device | str = "cpu") -> Explanation:
    """The choice that `backend="auto"` makes for a case on a device, and why."""
    facts = _backends.facts(case.op, torch.empty(0, dtype=case.dtype, device=device), case.work)
    choice, kernels = _backends.fastest(facts), {name: _backends.verdict(facts, name) for name in ("triton", "cuda")}
    refused = {name: found.reason for name, found in kernels.items() if not found}
    return Explanation(case, choice.backend, dict(choice.estimate.us), choice.estimate.source, refused)


def measure(case: Case, device: torch.device | str = "cpu", samples: int = SAMPLES) -> Timing:
    """Time every backend that can serve a case: random data, in turns, `samples` times each."""
    device = torch.device(device)
    calls = contenders(case, device)
    with torch.no_grad():  # a graph that is there already can be gone through
        return in_turns(calls, device, samples)


def contenders(case: Case, device: torch.device) -> dict[str, Call]:
    """Backend -> what it does for a case, on random data."""
    op, work, form = case.op, case.work, FORMS[case.op]
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, case.dtype)

    layout = torch.channels_last if work.channels_last else torch.contiguous_format
    x = random(work.batch, work.in_channels, *work.size).contiguous(memory_format=layout)
    factors = [random(*size) for size in _factor_shapes(op, work)]
    bias, geometry = random(work.out_channels), (work.stride, work.padding, work.dilation)
    facts = _backends.facts(op, x, work)
    names = [name for name in _backends.BACKENDS[op] if name not in ("reference", "host")]
    names = [name for name in names if _backends.verdict(facts, name) and not (name == "triton" and facts.interpreter)]
    options = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    calls: dict[str, Call] = {}
    for name in names:
        if work.call == "inference" and name in _tables.LIBRARY[op]:
            branches = stages_of(form, factors, name, geometry, layout)
            summed = work.ranks[0] if form.sums and name == "sequence" else 0
            calls[name] = partial(chain, branches, x, bias, summed)
            continue
        if name in _tables.LIBRARY[op]:
            run = partial(_past, op, name, geometry)
        else:
            run = partial(getattr(ops, op), backend=name, **options)
        calls[name] = _backward(run, x, factors, bias) if work.call == "backward" else partial(run, x, *factors, bias)
    return calls


def _past(op: str, backend: str, geometry: Geometry, x: Tensor, *weights: Tensor) -> Tensor:
    """What a backend of the library gives for x, factors and a bias, as `auto` calls it."""
    *factors, bias = weights
    return BY_LIBRARY[op](backend, ConvCall(x, factors, bias, None, geometry, "none"))


def _factor_shapes(op: str, work: ConvWork) -> list[tuple[int, ...]]:
    (kh, kw), (rank_in, rank_out), i, o = work.kernel, work.ranks, work.in_channels, work.out_channels
    if op == "tucker2_conv2d":
        return [(rank_in, i), (rank_out, rank_in, kh, kw), (o, rank_out)]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "cp_conv2d": [(rank_in, o, i), (rank_in, o, kh), (rank_in, o, kw)],
        "channel_svd_conv2d": [(rank_in, i, kh, kw), (o, rank_in, 1, 1)],
        "spatial_svd_conv2d": [(rank_in, i, kh, 1), (o, rank_in, 1, kw)],
        "decoupled_svd_conv2d": [(rank_in, o, i), (rank_in, o, kh, kw)],
    }
    return shapes[op]


def _backward(run: Callable[..., Tensor], x: Tensor, factors: Sequence[Tensor], bias: Tensor) -> Call:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *factors, bias)]
    with torch.enable_grad():
        out = run(*leaves)
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def in_turns(calls: Mapping[str, Call], device: torch.device, samples: int = SAMPLES) -> Timing:
    """Time calls one after the other, in an order that rotates, so that a drift of the machine meets all of them.

    What varied by more than `BUSY` is timed again, twice at most, and the calmest of the times counts.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        _seconds(call, 1, device)
        repeats[name] = max(1, min(500, int(MIN_SAMPLE_SECONDS / max(_seconds(call, 1, device), 1e-7)) + 1))
    found: list[Timing] = []
    while len(found) < ATTEMPTS and all(timing.spread > BUSY for timing in found):
        found.append(_once_in_turns(calls, repeats, device, samples))
    return min(found, key=lambda timing: timing.spread)


def _once_in_turns(calls: Mapping[str, Call], repeats: Mapping[str, int], device: torch.device, samples: int) -> Timing:
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(samples):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_seconds(calls[name], repeats[name], device) / repeats[name] * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spreads = []
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        spreads.append((cuts[3] - cuts[0]) / medians[name])
    return Timing({name: float(f"{us:.5g}") for name, us in medians.items()}, max(spreads))


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    # On one thread of a CPU, what other processes take of the core need not count.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What figures of a device depend on."""
    device = torch.device(device)
    if device.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32": torch.backends.cudnn.allow_tf32,
        }
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": _tables.cpu_name(), "capability": capability, "cores": os.cpu_count(), "torch": torch.__version__
    }  # fmt: skip


def key_of(case: Case, device: torch.device | str = "cpu") -> _tables.Key:
    """The row of a table that a case is."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 0
    return _tables.Key(case.op, str(case.dtype).removeprefix("torch."), threads, case.work)


def empty_table(device: torch.device | str = "cpu") -> _tables.Table:
    """A table of a device without rows."""
    device = torch.device(device)
    return _tables.Table(_tables.device_name(device.type, device.index), environment(device))


def table_of(device: torch.device | str = "cpu") -> _tables.Table:
    """The user's own table of a device to add rows to: a copy of what there is, or an empty one."""
    device = torch.device(device)
    name = _tables.device_name(device.type, device.index)
    known = _tables.cached(name)
    if known is None:
        return replace(empty_table(device), start=_tables.Table(name))
    return replace(
        known,
        environment=environment(device),
        rows=dict(known.rows),
        models=dict(known.models),
        validation=list(known.validation),
        start=known,
    )


def add_rows(
    table: _tables.Table, found: Iterable[Case], device: torch.device | str = "cpu", samples: int = SAMPLES
) -> list[tuple[Case, Timing]]:
    """Measure cases and put them into a table as rows, over rows of the same work."""
    timed = [(case, measure(case, device, samples)) for case in found]
    for case, timing in timed:
        table.rows[key_of(case, device)] = timing.us
    return timed


def save(table: _tables.Table, path: str | os.PathLike[str] | None = None) -> str:
    """Write a table to a file, or over the user's own of its device, and say where. `auto` goes by it at once.

    What other processes have added to the user's own meanwhile stays, where the table is one of `table_of`.
    """
    return str(_tables.save(table, path))
