"""A long training with TRP's projections and sub-gradients from warm state: does it grow, does it drift?

    python tests/reliability/soak.py [--steps 2000] [--keep]

A small CNN learns scikit-learn's digits by `fastrank.train.fit`, with a checkpoint every 100 steps. Measured along the
way, on the same weights each: sub-gradients and projections from warm state against the truth, decompositions in
float64; how orthogonal the warm bases are; memory, open files, threads. Beside it the same training by the exact
method: cold, by the reference. The kernels begin with a gap in their spectra, as trained rank pruning makes one: at a
cut without a gap nothing starts warm. What is judged, and why there:

- Every rank along the way is that of the truth, and results are apart from it (relative, Frobenius) by no more than
  the tolerance of the warm steps and the 1e-4 of the float32 Gram matrices that they start from.
- Bases: ‖QᵀQ − I‖ (Frobenius) at most n^1.5 · eps, what a Householder QR factorisation of n columns leaves.
- Bytes of tensors, files and threads: none more at the end than after the warm-up, a tenth of the steps.
- Resident memory, from 1,000 steps on: a slope, by least squares and less three of its standard errors, below the
  smallest matrix a checkpoint interval: a leak of a single one at every checkpoint would show.
- Ranks at the end are those of the exact method; where rounding alone moves them (a twin of the exact method that
  starts one part in 2²² away), they differ by no more than the twin's.
- A fresh network resumes the finished run to the same bits.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import outcome
import torch
from torch import Tensor, nn

from fastrank import data, ops, reference
from fastrank.data import ImageSet
from fastrank.ops import SpectralState
from fastrank.regularize import LowRankProjection, NuclearNorm
from fastrank.regularize.base import Regularizer
from fastrank.train import TrainConfig, fit

BATCH, IMAGES = 32, 640
EVERY, ENERGY, WEIGHT = 20, 0.98, 3e-4
CHECKPOINT = 100
LR = 0.01
RANK, TAIL = 24, 0.05
"""Of the kernels at the start: so many equal singular values, and what a fresh layer has by so much smaller."""
TOLERANCES = {"subgradient": 1e-4, "projection": 1e-3}
GRAM = 1e-4
MEMORY_STEPS = 1000
"""Steps from which on a slope says more of leaks than of the allocator."""


def network(shift: float = 0.0) -> nn.Sequential:
    """Three kernels of 96 rows and more, from which on decompositions start warm. shift: relative, of all weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for source, target, stride in ((1, 24, 1), (24, 96, 2), (96, 96, 1), (96, 128, 2)):
        layers += [nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.BatchNorm2d(target), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        for weight in (layer.weight for layer in model if isinstance(layer, nn.Conv2d) and len(layer.weight) >= 96):
            left, right = (torch.linalg.qr(torch.randn(n, RANK)).Q for n in weight.flatten(1).shape)
            gap = (left @ right.T).view_as(weight) * weight.norm() / RANK**0.5
            weight.mul_(TAIL).add_(gap)
        for parameter in model.parameters():
            parameter.mul_(1 + shift)
    return model


class ExactNorm(NuclearNorm):
    """The sub-gradient by the reference."""

    def _subgradients(self, matrices: list[Tensor], state: SpectralState | None) -> tuple[list[Tensor], None]:
        return ops.nuclear_subgradient(matrices, energy=self.energy, backend="reference"), None


class ExactProjection(LowRankProjection):
    """The projection by the reference."""

    def _projections(self, matrices: list[Tensor], state: SpectralState | None) -> tuple[list[Tensor], Tensor]:
        found, ranks = ops.project_energy(matrices, self.energy, backend="reference")
        return found, torch.tensor(list(ranks), dtype=torch.int64)


def regularizers(model: nn.Module, exact: bool) -> tuple[NuclearNorm, LowRankProjection]:
    """Those of TRP with the nuclear norm, warm or by the reference."""
    norm, projection = (ExactNorm, ExactProjection) if exact else (NuclearNorm, LowRankProjection)
    return (
        norm(
            model,
            WEIGHT,
            energy=ENERGY,
            matricization="channel",
            warm=not exact,
            tolerance=TOLERANCES["subgradient"],
        ),
        projection(model, every=EVERY, energy=ENERGY, warm=not exact, tolerance=TOLERANCES["projection"]),
    )


@dataclass
class Seen:
    """What a probe saw. worst: the largest figures; wrong_ranks: where a rank was not the truth's."""

    looks: int = 0
    subgradient: float = 0.0
    projection: float = 0.0
    orthogonality: float = 0.0
    """‖QᵀQ − I‖ as a share of n^1.5 · eps."""
    wrong_ranks: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """(step, bytes resident)."""
    counts: list[dict[str, int]] = field(default_factory=list)
    """Bytes of tensors, open files, threads."""


class Probe(Regularizer):
    """Changes nothing. Stands behind the regularisers it looks at, and before the projection as `before`."""

    def __init__(self, norm: NuclearNorm, projection: LowRankProjection, every: int, count_every: int) -> None:
        self._norm, self._projection, self._every, self._count_every = norm, projection, every, count_every
        self._step, self._before = 0, dict[str, Tensor]()
        self._seen = Seen()

    @property
    def seen(self) -> Seen:
        return self._seen

    def add_gradients(self) -> None:
        if self._before:
            self._judge_projection()
        if self._step % self._every == 0:
            self._judge_subgradients()
            self._seen.memory.append((self._step, resident()))
        if self._step % self._count_every == 0:
            self._seen.counts.append(counted())

    def note(self) -> None:
        """Called after the optimizer and before the projection."""
        self._step += 1
        due = self._step % EVERY == 0
        self._before = {name: kernel.detach().clone() for name, kernel in self._kernels().items()} if due else {}

    def _kernels(self) -> dict[str, nn.Parameter]:
        return self._projection.kernels

    def _judge_projection(self) -> None:
        for name, before in self._before.items():
            truth, rank = reference.linalg.project_energy(before.flatten(1).double(), ENERGY)
            own = self._kernels()[name].detach().flatten(1)
            self._rank("projection", name, self._projection.ranks[name], int(rank))
            self._seen.projection = max(self._seen.projection, apart(own, truth))
        self._before = {}

    def _judge_subgradients(self) -> None:
        self._seen.looks += 1
        for (name, kernel), own in zip(self._norm.kernels.items(), self._norm._buffers, strict=True):
            truth = reference.linalg.nuclear_subgradient(kernel.detach().flatten(1).double(), ENERGY)
            # ‖U_k V_kᵀ‖² = k
            ranks = [round(float(found.double().square().sum())) for found in (own, truth)]
            self._rank("sub-gradient", name, *ranks)
            self._seen.subgradient = max(self._seen.subgradient, apart(own, truth))
        for state in (self._norm._state, self._projection._state):
            for entry in [] if state is None else state._entries.values():
                basis = entry.basis[0].double()
                off = float((basis.T @ basis - torch.eye(len(basis), dtype=torch.float64)).norm())
                bound = len(basis) ** 1.5 * torch.finfo(torch.float32).eps
                self._seen.orthogonality = max(self._seen.orthogonality, off / bound)

    def _rank(self, what: str, name: str, own: int, truth: int) -> None:
        if own != truth:
            self._seen.wrong_ranks.append(f"{what} of {name} at step {self._step}: {own} instead of {truth}")

    def value(self) -> Tensor:
        return torch.zeros(())


class Before(Regularizer):
    """Tells the probe of the moment before a projection."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def add_gradients(self) -> None: ...

    def after_step(self, stepped: bool = True) -> None:
        self._probe.note()

    def value(self) -> Tensor:
        return torch.zeros(())


def apart(found: Tensor, truth: Tensor) -> float:
    """The relative distance, Frobenius norm."""
    return float((found.double() - truth).norm() / truth.norm())


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def counted() -> dict[str, int]:
    """Bytes of all tensors that are alive, open files, threads."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    tensors = sum(storages.values())
    return {"tensors": tensors, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def images() -> tuple[ImageSet, ImageSet]:
    """Digits to learn and to test."""
    found = [data.load("digits", split=split) for split in ("train", "test")]
    return tuple(ImageSet(s.images[:IMAGES], s.labels[:IMAGES], classes=10) for s in found)  # type: ignore[return-value]


def train(model: nn.Module, steps: int, penalties: list[Regularizer], folder: Path | None) -> None:
    """So many steps, an epoch having twenty."""
    config = TrainConfig(steps // (IMAGES // BATCH), BATCH, LR, checkpoint_steps=CHECKPOINT, shift=1)
    train_set, test_set = images()
    fit(model, train_set, test_set, config, regularizers=penalties, run_dir=folder, progress=False)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of every layer that a plan of TRP gives."""
    found: dict[str, int] = {}
    for name, kernel in regularizers(model, True)[1].kernels.items():
        values = torch.linalg.svdvals(kernel.detach().flatten(1).double())
        found[name] = int(reference.linalg.energy_rank(values, ENERGY))
    return found


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Bytes a step by least squares, and the standard error of that."""
    x, y = (torch.tensor([float(point[i]) for point in points], dtype=torch.float64) for i in (0, 1))
    x = x - x.mean()
    rate = float(x @ y / (x @ x))
    rest = y - y.mean() - rate * x
    return rate, math.sqrt(float(rest @ rest) / max(len(points) - 2, 1) / float(x @ x))


def exact_ranks(steps: int, shift: float = 0.0) -> dict[str, int]:
    """What the exact method comes to."""
    model = network(shift)
    train(model, steps, list(regularizers(model, True)), None)
    return ranks_of(model)


def soak(steps: int, folder: Path) -> dict[str, Any]:
    """The figures of a run of so many steps, and under "bad" what is not as it should be."""
    model = network()
    norm, projection = regularizers(model, False)
    interval = min(CHECKPOINT, steps // 3)
    probe = Probe(norm, projection, max(1, min(10, steps // 20)), interval)
    started = time.monotonic()
    train(model, steps, [norm, probe, Before(probe), projection], folder)
    seconds = time.monotonic() - started
    seen, bad = probe.seen, list(probe.seen.wrong_ranks[:5])
    settled = [point for point in seen.memory if point[0] >= steps // 10]
    rate, error = slope(settled)
    smallest = min(kernel.numel() * kernel.element_size() for kernel in projection.kernels.values())
    early, late = seen.counts[1], seen.counts[-1]
    bad += [f"{name}: {early[name]} grew to {late[name]}" for name in early if late[name] > early[name]]
    if steps >= MEMORY_STEPS and rate - 3 * error > smallest / CHECKPOINT:
        bad.append(f"resident memory grows by {rate:.0f} ± {error:.0f} bytes a step")
    for name, tolerance in TOLERANCES.items():
        if getattr(seen, name) > tolerance + GRAM:
            bad.append(f"{name}: {getattr(seen, name):.1e} from the truth")
    if seen.orthogonality > 1:
        bad.append(f"bases: {seen.orthogonality:.1f} of n^1.5 eps")
    warm = {"norm": norm.counts, "projection": projection.counts}
    if not norm.counts["warm"] or not projection.counts["warm"]:
        bad.append(f"nothing started warm: {warm}")
    other = network()
    norm, projection = regularizers(other, False)
    probe = Probe(norm, projection, steps, steps)
    train(other, steps, [norm, probe, Before(probe), projection], folder)
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    if probe.seen.looks or not all(torch.equal(one, two) for one, two in pairs):
        bad.append("the finished run was not resumed to its bits")
    own, exact = ranks_of(model), exact_ranks(steps)
    apart_by = {name: abs(own[name] - exact[name]) for name in own}
    twin = exact_ranks(steps, 2.0**-22) if any(apart_by.values()) else exact
    for name, by in apart_by.items():
        if by > abs(twin[name] - exact[name]):
            bad.append(
                f"rank of {name}: {own[name]} where the exact method has {exact[name]} and its twin {twin[name]}"
            )
    growth = (settled[-1][1] - settled[0][1]) / 2**20
    return {
        "steps": steps,
        "seconds_warm": round(seconds, 1),
        "looks": seen.looks,
        "resident_mib": {"after_warm_up": settled[0][1] / 2**20, "end": settled[-1][1] / 2**20, "growth": growth},
        "slope_bytes_a_step": {"rate": rate, "standard_error": error, "limit": smallest / CHECKPOINT},
        "counts": {"early": early, "late": late},
        "drift": {
            "subgradient": seen.subgradient,
            "projection": seen.projection,
            "limits": {name: tolerance + GRAM for name, tolerance in TOLERANCES.items()},
            "orthogonality": seen.orthogonality,
        },
        "wrong_ranks_on_the_way": len(seen.wrong_ranks),
        "decompositions": warm,
        "ranks": {"warm": own, "exact": exact, "twin": twin},
        "bad": bad,
    }


def main() -> int:
    """The run, its figures and its exit code."""
    parser = outcome.parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, in twenties (2,000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(options.steps // 20 * 20, Path(folder))
    ranks = found["ranks"]
    same = sum(ranks["warm"][name] == ranks["exact"][name] for name in ranks["exact"])
    drift = max(found["drift"]["subgradient"], found["drift"]["projection"])
    line = (
        f"{found['steps']:,} steps, {found['resident_mib']['growth']:+.1f} MiB, ranks equal in {same} of "
        f"{len(ranks['exact'])} layers, drift ≤ {drift:.1e}"
    )
    for what in found["bad"]:
        print(what)
    return outcome.finish("soak", line, found, ok=not found["bad"], keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
