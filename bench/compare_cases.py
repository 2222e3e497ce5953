"""What bench/compare.py times: small cases of the public contract, so that one file runs against any revision.

    PYTHONPATH=TREE python bench/compare_cases.py --tree TREE [--families …] [-k …] [--seconds 0.2] [--outputs FILE]

prints one JSON object: of each case the samples in microseconds a call, or why this revision has no such case.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
LEAST_SAMPLE_S = 2e-3
"""A sample is the mean over so many calls that the clock and the interpreter's start count for little."""
LEAST_SAMPLES = 5
Thunk = Callable[[], Any]


def as_it_is(found: Any) -> Any:
    return found


class Case(NamedTuple):
    """A call to time.

    make: inputs that depend on nothing but torch's generator, and the call on them. shown: what of the first call's
    result two revisions must agree on, to `tolerance` (relative, Frobenius norm).
    """

    family: str
    name: str
    make: Callable[[], Thunk]
    tolerance: float
    shown: Callable[[Any], Any] = as_it_is

    @property
    def title(self) -> str:
        return f"{self.family}: {self.name}"


def rounding(*terms: int, condition: float = 1.0) -> float:
    """What two float32 results may differ by, that come from sums of so many terms, one behind the other.

    A sum of K terms errs by about eps √K of its size; twice that between two results, with a margin of four. condition:
    by how much what follows can enlarge a relative error.
    """
    return 8 * EPS * condition * sum(math.sqrt(count) for count in terms)


def randn(*shape: int) -> Tensor:
    """Drawn on the CPU: the same numbers on every device."""
    return torch.randn(shape).to(DEVICE)


def seeded(module: nn.Module) -> nn.Module:
    """The module with parameters drawn in the order of their names, however its own start draws them."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            value = torch.randn(parameter.shape) / math.sqrt(fan)
            parameter.copy_(value.abs() + 0.5 if name.rpartition(".")[2].startswith("gate") else value)
    return module.to(DEVICE)


def backward(call: Callable[..., Tensor], *inputs: Tensor) -> Thunk:
    """Forward and backward; the gradients of all inputs."""
    leaves = [value.requires_grad_() for value in inputs]
    weight = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, weight)


def tucker2(channels: int, size: int, batch: int, rank: int, backend: str, *, grad: bool = False) -> Thunk:
    from fastrank import ops

    inputs = (
        randn(batch, channels, size, size),
        randn(rank, channels) / channels**0.5,
        randn(rank, rank, 3, 3) / (3 * rank**0.5),
        randn(channels, rank) / rank**0.5,
    )
    call = partial(ops.tucker2_conv2d, padding=1, backend=backend)
    return backward(call, *inputs) if grad else partial(call, *inputs)


def cp(channels: int, size: int, batch: int, rank: int, *, grad: bool = False) -> Thunk:
    from fastrank import ops

    inputs = (
        randn(batch, channels, size, size),
        randn(rank, channels, channels) / channels**0.5,
        randn(rank, channels, 3),
        randn(rank, channels, 3),
    )
    call = partial(ops.cp_conv2d, padding=1)
    return backward(call, *inputs) if grad else partial(call, *inputs)


def layer(kind: str, *arguments: Any, grad: bool = False, **options: Any) -> Thunk:
    from fastrank import nn as layers

    module = seeded(getattr(layers, kind)(*arguments, padding=1, **options))
    x = randn(4, module.in_channels, 28, 28)
    if not grad:
        module.eval().requires_grad_(False)
        return partial(module, x)
    weight = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), list(module.parameters()), weight)


def spectral(call: str, shapes: Sequence[tuple[int, int]], *arguments: Any, **options: Any) -> Thunk:
    from fastrank import ops

    return partial(getattr(ops, call), [randn(*shape) for shape in shapes], *arguments, **options)


def projection(shapes: Sequence[tuple[int, int]]) -> Thunk:
    """Matrices of a quarter of the full rank with a little noise: the cut is where the noise begins."""
    from fastrank import ops

    matrices = [randn(n, n // 4) @ randn(n // 4, m) + 1e-3 * randn(n, m) for n, m in shapes]
    return partial(ops.project_energy, matrices, 1 - 1e-4)


def warm(shapes: Sequence[tuple[int, int]]) -> Thunk:
    """Sub-gradients of matrices that have moved a little since the state saw them."""
    from fastrank import ops

    matrices, state = [randn(*shape) for shape in shapes], ops.SpectralState(refresh_every=1_000_000)
    ops.nuclear_subgradient(matrices, state=state)
    moved = [matrix + 1e-4 * torch.randn_like(matrix) for matrix in matrices]
    return partial(ops.nuclear_subgradient, moved, state=state)


def gate_lists() -> tuple[list[Tensor], list[Tensor]]:
    """Directions and gates of a network of twelve Tucker-2 layers."""
    shapes = [(width // 2, width) for width in (16, 32, 64)] * 4
    return [randn(*shape) for shape in shapes], [randn(shape[0]).abs() + 0.5 for shape in shapes]


def gates(call: str, *, grad: bool = False) -> Thunk:
    from fastrank import ops

    directions, sizes = gate_lists()
    if call == "funnel_penalty":
        value = partial(ops.funnel_penalty, sizes, 0.1)
        if not grad:
            return value
        leaves = [size.requires_grad_() for size in sizes]
        return lambda: torch.autograd.grad(value(), leaves)
    if not grad:
        return partial(ops.gated_factors, directions, sizes)
    leaves = [value.requires_grad_() for value in (*directions, *sizes)]
    weights = [torch.randn_like(direction) for direction in directions]
    return lambda: torch.autograd.grad(ops.gated_factors(directions, sizes), leaves, weights)


def network(width: int = 32) -> nn.Sequential:
    """Three convolutions of 3×3 and a classifier."""
    stages: list[nn.Module] = []
    for inputs in (3, width, width):
        stages += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def compression(method: str, **options: Any) -> Thunk:
    import fastrank

    model = seeded(network()).eval()
    plan = fastrank.make_plan(model, method, example_input=randn(1, 3, 16, 16), **options)
    return lambda: fastrank.compress(model, plan)


def answers(model: nn.Module) -> Tensor:
    """What a compressed network computes: its factors may have other signs."""
    torch.manual_seed(1)
    with torch.no_grad():
        found: Tensor = model(randn(4, 3, 16, 16))
    return found


Step = tuple[nn.Module, list[Tensor]]
"""A model after its first step, and its parameters before."""


def training(kind: str, **options: Any) -> Thunk:
    """A whole step: forward, backward, regulariser, SGD. kind: a regulariser, or nothing."""
    from fastrank import regularize

    model = network()
    if kind == "Funnel":
        from fastrank.nn import GatedTucker2Conv

        for place in (2, 4):
            model[place] = GatedTucker2Conv(32, 32, 3, (16, 16), padding=1)
    seeded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if kind:
        getattr(regularize, kind)(model, **options).attach(optimizer)
    x, labels = randn(8, 3, 16, 16), torch.arange(8).to(DEVICE)
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> Step:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        return model, start

    return step


def moved(found: Step) -> list[Tensor]:
    """Gradients, penalties included, and what became of the parameters."""
    model, start = found
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients + [new.detach() - old for new, old in zip(model.parameters(), start, strict=True)]


def rebuilt(found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Singular values and products: the vectors' signs are free."""
    return [*(s for _, s, _ in found), *((u * s) @ vh for u, s, vh in found)]


def cases() -> list[Case]:
    """Every case, with the sums that its rounding comes from."""
    found = []

    def add(family: str, name: str, tolerance: float, make: Callable[..., Thunk], *a: Any, **k: Any) -> None:
        shown = rebuilt if name.startswith("svd ") else {"compress": answers, "train": moved}.get(family, as_it_is)
        found.append(Case(family, name, partial(make, *a, **k), tolerance, shown))

    for channels, size, batch, rank in ((64, 28, 8, 24), (256, 14, 4, 64), (512, 7, 1, 128)):
        what = f"{channels} channels {size}×{size}, N={batch}, R={rank}"
        sums = channels, 9 * rank, rank
        for backend in ("auto", "sequence", "dense"):
            add("tucker2", f"{backend} {what}", rounding(*sums), tucker2, channels, size, batch, rank, backend)
        back = rounding(*sums, *sums, batch * size**2)
        add("tucker2", f"auto, backward {what}", back, tucker2, channels, size, batch, rank, "auto", grad=True)
    for channels, size, batch, rank in ((64, 28, 4, 2), (256, 8, 4, 4)):
        what = f"{channels} channels {size}×{size}, N={batch}, R={rank}"
        sums = channels, 3, 3, rank
        add("cp", what, rounding(*sums), cp, channels, size, batch, rank)
        back = rounding(*sums, *sums, batch * size**2)
        add("cp", f"backward {what}", back, cp, channels, size, batch, rank, grad=True)
    for kind, options, sums in (
        ("FusedTucker2Conv", {"ranks": (24, 24)}, (64, 216, 24)),
        ("FusedCPConv", {"rank": 2}, (64, 3, 3, 2)),
        ("SVDConv", {"rank": 24, "scheme": "channel"}, (576, 24)),
        ("SVDConv", {"rank": 24, "scheme": "spatial"}, (192, 72)),
        ("SVDConv", {"rank": 2, "scheme": "decoupled"}, (64, 18)),
        ("GatedTucker2Conv", {"ranks": (24, 24)}, (64, 64, 216, 24)),
    ):
        what = f"{kind} {options.get('scheme', '')}".rstrip()
        add("nn", what, rounding(*sums), layer, kind, 64, 64, 3, **options)
        back = rounding(*sums, *sums, 4 * 28 * 28)
        add("nn", f"{what}, backward", back, layer, kind, 64, 64, 3, grad=True, **options)
    small, large = [(16, 144), (32, 288), (64, 576)] * 2, [(128, 1152), (256, 1024)]
    for what, shapes in (("six small matrices", small), ("two large matrices", large)):
        m = max(max(shape) for shape in shapes)
        # Ratios of the singular values of these Gaussian matrices are below 4, squared where a Gram matrix is taken.
        add("linalg", f"svd {what}", rounding(m, condition=16), spectral, "svd", shapes)
        add("linalg", f"nuclear_norm {what}", rounding(m, condition=16), spectral, "nuclear_norm", shapes)
        add("linalg", f"nuclear_subgradient {what}", rounding(m, condition=16), spectral, "nuclear_subgradient", shapes)
        add("linalg", f"project_energy {what}", rounding(m, condition=16), projection, shapes)
    # A warm result may be off by the state's tolerance of 1e-4, in either revision.
    add("linalg", "nuclear_subgradient, warm", 2e-4 + rounding(1152, condition=16), warm, large)
    for call, sums in (("gated_factors", (64,)), ("funnel_penalty", (672,))):
        add("gates", call, rounding(*sums), gates, call)
        add("gates", f"{call}, backward", rounding(*sums, 64), gates, call, grad=True)
    # Networks' sums: 27, 288 and 288 terms, the mean of 256 places, 32 terms; decompositions condition them a little.
    through = 27, 288, 288, 256, 32
    for method, options in (("nrmf", {"energy": 0.9}), ("trp-channel", {"energy": 0.9}), ("norton", {"rank": 2})):
        add("compress", method, rounding(*through, condition=32), compression, method, **options)
    for kind, options in (
        ("", {}),
        ("NuclearNorm", {"weight": 1e-2}),
        ("GramTrace", {"weight": 1e-2}),
        ("LowRankProjection", {"every": 1}),
        ("Funnel", {"weight": 1.0}),
    ):
        # A parameter's change is a hundredth of it and less: so many times larger is its relative error.
        bound = rounding(*through, *through, 8 * 256, condition=100)
        add("train", f"step with {kind or 'no regulariser'}", bound, training, kind, **options)
    return found


def chosen(families: Iterable[str], expression: str) -> list[Case]:
    """The cases of these families (none: all) whose title matches; raises ValueError where a family is unknown."""
    known = list(dict.fromkeys(case.family for case in cases()))
    wanted = [name for name in families if name]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--families must name some of {', '.join(known)}, got {name}")
    found = [case for case in cases() if not wanted or case.family in wanted]
    return [case for case in found if re.search(expression, case.title)]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def samples(call: Thunk, seconds: float) -> list[float]:
    """Microseconds a call, a mean over a burst each, for about so long."""
    call()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    once = time.perf_counter() - begin
    burst = max(1, round(LEAST_SAMPLE_S / max(once, 1e-7)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_SAMPLES or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(burst):
            call()
        synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / burst)
    return times


def flat(found: Any) -> list[Tensor]:
    """The tensors of a nest of lists, on the CPU; numbers as tensors."""
    if isinstance(found, Tensor):
        return [found.detach().double().cpu().clone()]
    if isinstance(found, (int, float)):
        return [torch.tensor(float(found), dtype=torch.float64)]
    return [tensor for each in found for tensor in flat(each)]


def run(case: Case, seconds: float) -> tuple[dict[str, Any], list[Tensor]]:
    """The samples of a case, and what its first call gave; "absent" and why, where this revision cannot."""
    torch.manual_seed(0)
    try:
        call = case.make()
        outputs = flat(case.shown(call()))
    except (AttributeError, ImportError, TypeError, ValueError, RuntimeError) as error:
        return {"absent": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}, []
    return {"us": samples(call, seconds)}, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="where fastrank must come from")
    parser.add_argument("--families", default="")
    parser.add_argument("-k", dest="expression", default="")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--outputs", type=Path, help="file for what the cases compute")
    options = parser.parse_args()
    import fastrank

    if options.tree.resolve() not in Path(fastrank.__file__).resolve().parents:
        raise SystemExit(f"fastrank must come from {options.tree}, got {fastrank.__file__}")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # the tolerances are float32's
    results: dict[str, Mapping[str, Any]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for case in chosen(options.families.split(","), options.expression):
        results[case.title], outputs[case.title] = run(case, options.seconds)
    if options.outputs:
        torch.save(outputs, options.outputs)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
