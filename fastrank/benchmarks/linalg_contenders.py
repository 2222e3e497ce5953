"""Who computes U Vᵀ of all convolutions of a network: the loops that published codes run, and what replaces them.

A contender takes a list of float32 matrices and gives a list of matrices of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastrank import reference
from fastrank.benchmarks.layers import RESNET18_CONVS, RESNET50_CONVS
from fastrank.decompose import unfold

Solve = Callable[[Sequence[Tensor]], list[Tensor]]
Quintic = tuple[float, float, float]
# The published coefficients of Muon's five steps; no sub-gradient: singular values end between about 0.7 and 1.2.
MUON: tuple[Quintic, ...] = ((3.4445, -4.7750, 2.0315),) * 5
DRIFT = 1e-3
NETWORKS = {
    "ResNet-18 mode3+mode4": (RESNET18_CONVS, ("mode3", "mode4")),
    "ResNet-18 channel+spatial": (RESNET18_CONVS, ("channel", "spatial")),
    "ResNet-18 channel": (RESNET18_CONVS, ("channel",)),
    "ResNet-18, up to 128 channels": (RESNET18_CONVS[:10], ("mode3", "mode4")),
    "ResNet-50 channel": (RESNET50_CONVS, ("channel",)),
}


def matrices(network: str, spectrum: str, device: str) -> list[Tensor]:
    """Unfoldings of He-initialised kernels ("flat"), or of ones whose singular values fall about as i^-0.7."""
    torch.manual_seed(0)
    shapes, names = NETWORKS[network]
    found = []
    for o, i, k in shapes:
        weight = torch.randn(o, i, k, k) * math.sqrt(2 / (o * k * k))
        for name in names:
            matrix = unfold(weight, name)
            if spectrum == "decaying":
                n = min(matrix.shape)
                turn = torch.linalg.qr(torch.randn(n, n))[0] * torch.arange(1, n + 1).pow(-0.7)
                matrix = turn @ matrix if matrix.shape[0] == n else matrix @ turn.T
            found.append(matrix.contiguous().to(device))
    return found


def drift(weights: Sequence[Tensor]) -> None:
    """Move weights by `DRIFT` of their norm, as a training step does."""
    for w in weights:
        noise = torch.randn_like(w)
        w += DRIFT * noise * (w.norm() / noise.norm())


def svd_loop(energy: float | None, *, tall: bool = False, driver: str | None = None) -> Solve:
    """What published codes do: one torch.linalg.svd after the other; `tall` hands LAPACK the faster orientation."""

    def solve(weights: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for w in weights:
            turned = tall and w.shape[0] < w.shape[1]
            u, s, vh = torch.linalg.svd(w.T if turned else w, full_matrices=False, driver=driver)
            k = reference.linalg.numerical_rank(s, (w.shape[0], w.shape[1]))
            k = k if energy is None else torch.minimum(k, reference.linalg.energy_rank(s, energy))
            x = (u * (torch.arange(len(s), device=w.device) < k)) @ vh
            out.append(x.T if turned else x)
        return out

    return solve


def batched_eigh(energy: float | None) -> Solve:
    """Gram matrices and torch.linalg.eigh, the matrices of one shape in a batch."""

    def solve(weights: Sequence[Tensor]) -> list[Tensor]:
        out = list(weights)
        for shape in {tuple(w.shape) for w in weights}:
            places = [i for i, w in enumerate(weights) if tuple(w.shape) == shape]
            a = torch.stack([weights[i] if shape[0] <= shape[1] else weights[i].T for i in places])
            values, vectors = torch.linalg.eigh(a @ a.mT)
            part = values.flip(1).cumsum(1) < (1.0 if energy is None else energy) * values.sum(1, keepdim=True)
            kept = torch.cat([torch.ones_like(part[:, :1]), part[:, :-1]], 1).flip(1)
            f = torch.where(kept & (values > 0), values, torch.inf).rsqrt()
            for i, x in zip(places, (vectors * f[:, None]) @ vectors.mT @ a, strict=True):
                out[i] = x if shape[0] <= shape[1] else x.T
        return out

    return solve


def newton_schulz(quintics: Sequence[Quintic], dtype: torch.dtype = torch.float32) -> Solve:
    """X ← a X + (b G + c G²) X with G = X Xᵀ, layer by layer, from X of Frobenius norm 1."""

    def solve(weights: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for matrix in weights:
            tall = matrix.shape[0] > matrix.shape[1]
            x = matrix.mT if tall else matrix
            x = (x / x.norm()).to(dtype)
            for a, b, c in quintics:
                gram = x @ x.mT
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            found.append((x.mT if tall else x).to(matrix.dtype))
        return found

    return solve


def truth(weights: Sequence[Tensor], energy: float | None) -> tuple[list[Tensor], list[float]]:
    """U_k V_kᵀ in float64 on the CPU, with the rank that float32 entries have, and how far rounding may turn each.

    A change of W by δ‖W‖₂ turns the eigenspaces of W Wᵀ by about δ σ₁² over the gap behind the k-th σ² (Davis and
    Kahan). 30 eps of float32 for δ, as LAPACK's tests allow an SVD; at most 1, the error of something unrelated.
    """
    out, limits = [], []
    for w in weights:
        u, s, vh = torch.linalg.svd(w.double().cpu(), full_matrices=False)
        k = int((s > torch.finfo(torch.float32).eps * max(w.shape) * s[0]).sum())
        k = k if energy is None else min(k, int(reference.linalg.energy_rank(s, energy)))
        out.append(u[:, :k] @ vh[:k])
        square = s.square()
        gap = square[k - 1] - (square[k] if k < len(s) else 0.0)
        limits.append(min(1.0, 30 * torch.finfo(torch.float32).eps * float(square[0] / gap)))
    return out, limits


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, int]:
    """Largest relative error among the matrices, and how many have another rank (by ‖X‖_F²)."""
    pairs = [(x.double().cpu(), y) for x, y in zip(found, wanted, strict=True)]
    ranks = sum(round(float(x.square().sum())) != round(float(y.square().sum())) for x, y in pairs)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs), ranks


def pat_step(weights: Sequence[Tensor], threshold: float) -> Callable[[], list[Tensor]]:
    """A step of torchao's PruneOptimizer that lowers every singular value by `threshold`, gradients being zero."""
    pat: Any = import_module("torchao.prototype.pat.optim")
    parameters = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    for each in parameters:
        each.grad = torch.zeros_like(each)
    group = {"params": parameters, "group_type": "SVDGrouper", "prox_type": "ProxNuclearNorm", "reg_lambda": threshold}
    optimizer = pat.PruneOptimizer(torch.optim.SGD([group], lr=1.0), reg_lambda=threshold)

    def step() -> list[Tensor]:
        optimizer.param_groups[0]["gamma"] = 0.0  # it adds up, and with it the threshold
        optimizer.step()
        return [each.detach() for each in parameters]

    return step


def soft_thresholded(weights: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """What `pat_step` gives, in float64 on the CPU."""
    found = []
    for w in weights:
        u, s, vh = torch.linalg.svd(w.double().cpu(), full_matrices=False)
        found.append((u * (s - threshold).clamp(min=0)) @ vh)
    return found
