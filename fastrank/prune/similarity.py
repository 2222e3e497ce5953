"""How alike the filters of a layer are, and which ones to keep (NORTON's similarity pruning).

All distances are float64 matrices (O, O), symmetric, with zeros on the diagonal, on the device of their argument.

criterion   distance of filters i and j
"pabs"      Σ over the three CP factors of the largest principal angle between the spans of their columns
"csa"       1 − Π over the three CP factors of the squared cosine of that angle
"vbd"       var(W_i − W_j) / (var W_i + var W_j) over the entries of the filters
"l2"        ‖W_i − W_j‖, the only one for plain convolutions

Sources: Pham, Zniyed and Nguyen 2024 (NORTON) for pabs and csa, their CORING for vbd. Where their published code
differs: it takes the arcsine of a Frobenius norm modulo π/2 for the angle, under which orthogonal spans come out
identical; it reads csa and vbd off the pointwise factor alone; and it ranks plain filters by their norm. Here csa runs
over all three factors, which at rank 1 makes it the squared sine of the angle between the filters; vbd compares the
filters themselves, because their factors are determined only up to the order, sign and scale of the terms; and plain
filters are compared in pairs like all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrank import _checks, reference
from fastrank.nn import FusedCPConv

CRITERIA = ("pabs", "csa", "vbd", "l2")
# Entries of the largest intermediate of a chunk of pairs: 32 MiB in float64.
_CHUNK = 1 << 22


def pabs(pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Principal-angle distance of filters in CP form, in [0, 3π/2]; see the module for the formula.

    Shapes: pointwise (R, O, I), vertical (R, O, kh), horizontal (R, O, kw) -> (O, O).
    """
    return _angles(pointwise, vertical, horizontal).sum(0)


def csa(pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Cosine-of-subspace-angles distance of filters in CP form, in [0, 1]; shapes as in `pabs`."""
    # By logarithms, because 1 − Π cos² would lose every distance below 1e-16.
    logarithms = torch.log1p(-_angles(pointwise, vertical, horizontal).sin().square())
    return -torch.expm1(logarithms.sum(0))


def vbd(weight: Tensor) -> Tensor:
    """Variance-based distance of filters (O, ...), in [0, 2]; 0 between two filters that are both constant."""
    filters = _filters(weight)
    centred = filters - filters.mean(1, keepdim=True)
    total = centred.square().sum(1)
    total = total[:, None] + total[None, :]
    return torch.where(total > 0, _euclidean(centred).square() / total, 0.0)


def l2(weight: Tensor) -> Tensor:
    """Euclidean distance of filters (O, ...)."""
    return _euclidean(_filters(weight))


def principal_angles(factor: Tensor) -> Tensor:
    """Largest principal angle, in [0, π/2], between the spans of the columns of factor (O, d, R), for each pair.

    The span is that of the left singular vectors whose singular value exceeds max(d, R)·ε·σ_max, ε that of the
    factor's dtype (float32's for shorter ones). Spans of unequal dimension have as many principal angles as the smaller
    has dimensions, so one that lies in another is at angle 0, as is every span from the whole space, and the empty span
    of a zero factor from all.
    Angles come from sines below π/4 and from cosines above, accurate to rounding at both ends (Björck and Golub 1973).
    """
    _checks.filled("factor", _checks.tensor("factor", factor, (None, None, None), "(O, d, R)"), "(O, d, R)")
    bases, dims = _bases(_checks.finite("factor", factor.detach()))
    count, size, width = bases.shape
    angles = bases.new_zeros(count, count)
    apart = (torch.minimum(dims[:, None], dims) > 0) & (torch.maximum(dims[:, None], dims) < size)
    rows = max(1, _CHUNK // (count * width * width))
    for start in range(0, count, rows):
        block = bases[start : start + rows]
        inner = torch.einsum("idm,jdn->ijmn", block, bases)
        first, second = apart[start : start + len(block)].triu(start + 1).nonzero().unbind(1)
        # Zero columns stand last in a basis, so zeros stand behind the singular values of a pair.
        last = torch.minimum(dims[first + start], dims[second]) - 1
        cosine = torch.linalg.svdvals(inner[first, second]).gather(1, last[:, None])[:, 0].clamp(max=1.0)
        angle = cosine.acos()
        near = cosine.square() > 0.5
        first = first + start
        angle[near] = _sines(bases, dims, first[near], second[near]).asin()
        angles[first, second] = angles[second, first] = angle
    return angles


def distances(layer: nn.Module, criterion: str = "pabs", *, inputs: Tensor | None = None) -> Tensor:
    """Distances (O, O) of the filters of a `FusedCPConv`, or of a plain convolution or linear layer.

    criterion: see the module; a plain layer has no factors and is always compared by "l2". inputs: 1-D indices of the
    input channels that count; all by default.
    """
    _checks.choice("criterion", criterion, CRITERIA)
    with torch.no_grad():
        if isinstance(layer, FusedCPConv):
            pointwise: Tensor = layer.pointwise
            if inputs is not None:
                pointwise = pointwise.index_select(2, inputs.to(pointwise.device))
            factors = pointwise, layer.vertical, layer.horizontal
            if criterion in ("pabs", "csa"):
                return {"pabs": pabs, "csa": csa}[criterion](*factors)
            weight = reference.conv.cp_weight(*(factor.double() for factor in factors))
            return {"vbd": vbd, "l2": l2}[criterion](weight)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise _checks.fail_type("layer", "an nn.Conv2d, an nn.Linear or a FusedCPConv", layer)
        return l2(layer.weight if inputs is None else layer.weight.index_select(1, inputs.to(layer.weight.device)))


def _angles(pointwise: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The principal angles of the three factors, (3, O, O)."""
    _checks.tensor("pointwise", pointwise, (None, None, None), "(R, O, I)")
    for name, factor in (("vertical", vertical), ("horizontal", horizontal)):
        _checks.tensor(name, factor, (*pointwise.shape[:2], None), "(R, O, k)")
    return torch.stack([principal_angles(factor.permute(1, 2, 0)) for factor in (pointwise, vertical, horizontal)])


def _bases(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(O, d, R) -> orthonormal bases (O, d, min(d, R)), zero columns last, and their dimensions (O,)."""
    vectors, values, _ = torch.linalg.svd(factor.detach().double(), full_matrices=False)
    cut = max(factor.shape[1:]) * min(torch.finfo(factor.dtype).eps, torch.finfo(torch.float32).eps)
    inside = values > cut * values[:, :1]
    return vectors * inside[:, None, :], inside.sum(1)


def _sines(bases: Tensor, dims: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sines of the largest principal angles of the pairs: the norm of the smaller basis off the span of the larger."""
    swap = dims[first] < dims[second]
    larger, smaller = torch.where(swap, second, first), torch.where(swap, first, second)
    sines = [bases.new_empty(0)]
    pairs = max(1, _CHUNK // bases[0].numel())
    for big, small in zip(torch.split(larger, pairs), torch.split(smaller, pairs), strict=True):
        rest = bases[small] - bases[big] @ (bases[big].mT @ bases[small])
        # The largest eigenvalue of the Gram matrix of what is left is accurate relative to itself, however small.
        sines.append(torch.linalg.eigvalsh(rest.mT @ rest)[:, -1].clamp(0.0, 1.0).sqrt())
    return torch.cat(sines)


def _filters(weight: Tensor) -> Tensor:
    _checks.tensor("weight", weight)
    if weight.dim() < 2:
        raise _checks.fail("weight", "of shape (O, ...)", tuple(weight.shape))
    return _checks.finite("weight", weight.detach()).double().flatten(1)


def _euclidean(rows: Tensor) -> Tensor:
    """Distances of the rows by their Gram matrix, and by subtraction where that would cancel: equal rows are at 0."""
    norms = rows.square().sum(1)
    scale = norms[:, None] + norms
    squares = (scale - 2 * rows @ rows.T).clamp(min=0.0).fill_diagonal_(0.0)
    # Above this the cancellation costs six digits of sixteen at most.
    close = (squares < 1e-6 * scale).triu(1).nonzero()
    for first, second in (pairs.unbind(1) for pairs in torch.split(close, max(1, _CHUNK // max(1, rows.shape[1])))):
        squares[first, second] = squares[second, first] = (rows[first] - rows[second]).square().sum(1)
    return squares.sqrt()
