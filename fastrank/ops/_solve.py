"""Chooses a backend for each matrix of a list, runs it, and settles what was not finite or did not converge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastrank import _backends, _checks, reference
from fastrank.ops import _counts, _gram, _linalg_kernels, _pending, _warm
from fastrank.ops._pending import NONFINITE, NOT_CONVERGED
from fastrank.ops._spectra import PROJECTION, SUBGRADIENT
from fastrank.ops._warm import SpectralState
from fastrank.ops.polar import polar_factors

Factors = tuple[Tensor, Tensor, Tensor]
_Share = tuple[str, torch.device]
OPS = {SUBGRADIENT: "nuclear_subgradient", PROJECTION: "project_energy"}


def spectral(
    matrices: list[Tensor],
    kind: str,
    energy: float | None,
    backend: str,
    on_nonfinite: str,
    state: SpectralState | None = None,
    targets: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Sub-gradients or projections of all matrices, and their ranks, (N,) int64 on the first matrix's device."""
    out = list(matrices)
    device = matrices[0].device if matrices else torch.device("cpu")
    ranks = [torch.zeros((), dtype=torch.int64, device=device)] * len(matrices)
    for (chosen, home), places in _shares(OPS[kind], matrices, backend, warm=state is not None).items():
        own = [matrices[place] for place in places]
        into = None if targets is None else [targets[place] for place in places]
        with reference.linalg.exact_products(home):
            found, k = _solved(matrices, own, places, kind, energy, chosen, on_nonfinite, state, into)
        for i, place in enumerate(places):
            out[place], ranks[place] = found[i], k[i].to(device)
            if into is not None and found[i] is not into[i]:
                out[place] = into[i].copy_(found[i])
    # Stacked, not written by index: a list of places would have to be copied to the device.
    return out, torch.stack(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def _solved(
    matrices: list[Tensor],
    own: list[Tensor],
    places: list[int],
    kind: str,
    energy: float | None,
    chosen: str,
    on_nonfinite: str,
    state: SpectralState | None,
    into: list[Tensor] | None,
) -> tuple[list[Tensor], Tensor]:
    """Results and ranks of those of the matrices, `own` at `places`, that a backend serves on a device."""
    if chosen in ("cuda", "host"):
        found, k, status = _linalg_kernels.spectral(own, kind, energy, chosen)
        found = _settle(found, own, status, places, kind, energy, on_nonfinite)
    elif chosen == "gram":
        if state is None:
            found, k, bad = _gram.spectral(own, kind, energy, into)
        else:
            found, k, bad, late = _warm.spectral(own, kind, energy, state, places, into)
            if late is not None:
                found = _settle(found, own, late, places, kind, energy, on_nonfinite, state)
        for i in _refuse([places[i] for i in bad], matrices, on_nonfinite):
            found[places.index(i)] = _neutral(matrices[i], kind)
    else:
        found, k = _by_reference(own, places, kind, energy, on_nonfinite)
    return found, k


def norms(matrices: list[Tensor], backend: str, on_nonfinite: str) -> list[Tensor]:
    """‖·‖_* of each matrix, 0-d tensors; 0 for one that is skipped."""
    out: dict[int, Tensor] = {}
    for (chosen, device), places in _shares("nuclear_norm", matrices, backend).items():
        own = [matrices[place] for place in places]
        if chosen == "reference":
            bad = _refuse([place for place in places if not matrices[place].isfinite().all()], matrices, on_nonfinite)
            found = [
                matrices[place].new_zeros(()) if place in bad else reference.linalg.nuclear_norm(matrices[place])
                for place in places
            ]
        elif chosen == "gram":
            with reference.linalg.exact_products(device):
                found, broken = _gram.norms(own)
            _refuse([places[i] for i in broken], matrices, on_nonfinite)
        else:
            # ⟨U Vᵀ, W⟩: what singular values beyond the numerical rank would add is rounding.
            sub, _, status = _linalg_kernels.spectral(own, SUBGRADIENT, None, chosen)
            sub = _settle(sub, own, status, places, SUBGRADIENT, None, on_nonfinite)
            found = [(x.float() * w.float().nan_to_num()).sum() for x, w in zip(sub, own, strict=True)]
        out.update(zip(places, found, strict=True))
    return [out[i] for i in range(len(matrices))]


def svd(matrices: list[Tensor], backend: str) -> list[Factors]:
    """Thin SVDs of all matrices."""
    out: dict[int, Factors] = {}
    for (chosen, device), places in _shares("svd", matrices, backend).items():
        own = [matrices[place].detach() for place in places]
        if chosen == "reference":
            for place, matrix in zip(places, own, strict=True):
                _checks.finite(f"matrices[{place}]", matrix)
            found = [reference.linalg.svd(matrix) for matrix in own]
        elif chosen == "gram":
            with reference.linalg.exact_products(device):
                found, bad = _gram.svd(own)
            _refuse([places[i] for i in bad], matrices, "raise")
        else:
            found, status = _linalg_kernels.svd(own, chosen)
            if status.is_cuda:
                _pending.watch("svd", status, places, "raise")
            else:
                _refuse([p for p, s in zip(places, status.tolist(), strict=True) if s & NONFINITE], matrices, "raise")
                for i, s in enumerate(status.tolist()):
                    if s & NOT_CONVERGED:
                        _counts.count("not_converged")
                        found[i] = reference.linalg.svd(own[i])
        out.update(zip(places, found, strict=True))
    return [out[i] for i in range(len(matrices))]


def polar(matrices: list[Tensor], tolerance: float | None, backend: str, on_nonfinite: str) -> list[Tensor]:
    """U Vᵀ of all matrices by Newton–Schulz iterations."""
    out = polar_factors(matrices, tolerance=tolerance, backend=backend)
    for device in {matrix.device for matrix in matrices}:
        places = [place for place, matrix in enumerate(matrices) if matrix.device == device]
        found, own = [out[place] for place in places], [matrices[place] for place in places]
        status = torch.stack([(~x.isfinite().all()).int() * NONFINITE for x in found])
        settled = _settle(found, own, status, places, SUBGRADIENT, None, on_nonfinite)
        for place, x in zip(places, settled, strict=True):
            out[place] = x
    return out


def _shares(op: str, matrices: Sequence[Tensor], backend: str, *, warm: bool = False) -> dict[_Share, list[int]]:
    """The places of the matrices that each backend serves on each device."""
    shares: dict[_Share, list[int]] = {}
    chosen: dict[tuple[torch.device, torch.dtype], str] = {}
    for place, matrix in enumerate(matrices):
        key = matrix.device, matrix.dtype
        if key not in chosen:
            facts = _backends.facts(op, matrix)
            chosen[key] = _backends.choose(facts, backend)
            if warm and backend == "auto" and _backends.explain(facts)["gram"]:
                chosen[key] = "gram"  # where warm starts live
        shares.setdefault((chosen[key], matrix.device), []).append(place)
    return shares


def _by_reference(
    own: list[Tensor], places: list[int], kind: str, energy: float | None, on_nonfinite: str
) -> tuple[list[Tensor], Tensor]:
    bad = [i for i, matrix in enumerate(own) if not bool(matrix.isfinite().all())]
    _refuse([places[i] for i in bad], dict(zip(places, own, strict=True)), on_nonfinite)
    found, ranks = [], []
    for i, matrix in enumerate(own):
        if i in bad:
            x, k = _neutral(matrix, kind), torch.zeros((), dtype=torch.int64, device=matrix.device)
        elif kind == PROJECTION:
            assert energy is not None
            x, k = reference.linalg.project_energy(matrix, energy)
        else:
            x, k = reference.linalg.nuclear_subgradient(matrix, energy), torch.zeros((), dtype=torch.int64)
        found.append(x)
        ranks.append(k.to(own[0].device))
    return found, torch.stack(ranks)


def _settle(
    found: list[Tensor],
    own: list[Tensor],
    status: Tensor,
    places: list[int],
    kind: str,
    energy: float | None,
    on_nonfinite: str,
    state: SpectralState | None = None,
) -> list[Tensor]:
    """What a kernel's status asks for: at once on a CPU, on a GPU without waiting for it."""
    if status.is_cuda:
        stale = None if state is None else partial(_warm.stale, state)
        _pending.watch(OPS[kind], status, places, on_nonfinite, stale)
        if on_nonfinite == "raise":
            return found  # NaN until the error is raised
        bad = (status & NONFINITE) != 0
        return [torch.where(bad[i], _neutral(w, kind), x) for i, (x, w) in enumerate(zip(found, own, strict=True))]
    flags = status.tolist()
    bad_places = [place for place, flag in zip(places, flags, strict=True) if flag & NONFINITE]
    _refuse(bad_places, dict(zip(places, own, strict=True)), on_nonfinite)
    out = list(found)
    for i, (matrix, flag) in enumerate(zip(own, flags, strict=True)):
        if flag & NONFINITE:
            out[i] = _neutral(matrix, kind)
        elif flag & NOT_CONVERGED:
            _counts.count("not_converged")
            out[i] = _by_reference([matrix], [places[i]], kind, energy, on_nonfinite)[0][0]
    return out


def _neutral(matrix: Tensor, kind: str) -> Tensor:
    """What stands for the result of a matrix that is skipped."""
    if kind == PROJECTION:
        return matrix.clone(memory_format=torch.contiguous_format)
    return torch.zeros_like(matrix, memory_format=torch.contiguous_format)


def _refuse(places: list[int], matrices: Sequence[Tensor] | dict[int, Tensor], on_nonfinite: str) -> list[int]:
    """Raise for the first of the matrices that are not finite, or count them; the places again."""
    places = sorted(places)
    if places and on_nonfinite == "raise":
        _checks.finite(f"matrices[{places[0]}]", matrices[places[0]].detach())
    _counts.skipped(places)
    return places
