"""From the gates' operators to their kernels: outputs, layouts, and the backend that serves a list.

For the kernels a slice of a factor along dim 0 is one block of memory, and gates are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank import _backends, _native, reference
from fastrank.ops import _register

PENALTIES = ("funnel", "l1", "l2")  # in the order of Penalty in csrc/gates/gates.h
FUNNEL_CHUNK = 4096  # gates that a partial sum stands for: kChunk of csrc/gates/gates.h


def empty_like(x: Tensor) -> Tensor:
    """An output in x's memory format."""
    return torch.empty_like(x, memory_format=_register.memory_format(x))


def gated_factors(directions: list[Tensor], gates: list[Tensor], backend: str) -> list[Tensor]:
    """`fastrank::gated_factors`."""
    chosen = _choose("gated_factor", directions, backend)
    if chosen == "reference":
        found = reference.gates.gated_factors(directions, gates)
        return [_as(x, v) for x, v in zip(found, directions, strict=True)]
    outs = [empty_like(v) for v in directions]
    some = _filled(outs)
    sources, scales = [_as(directions[i], directions[i]) for i in some], [gates[i].contiguous() for i in some]
    _launch(chosen, "gated_factors", [sources, scales, [outs[i] for i in some]], sources)
    return outs


def gated_factors_backward(
    grads: list[Tensor], directions: list[Tensor], gates: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """`fastrank::gated_factors_backward`."""
    chosen = _choose("gated_factor", directions, backend)
    if chosen == "reference":
        of_directions, of_gates = reference.gates.gated_factors_backward(grads, directions, gates)
        return [_as(x, v) for x, v in zip(of_directions, directions, strict=True)], of_gates
    grad_directions, grad_gates = gated_factors_backward_fake(grads, directions, gates, backend)
    some = _filled(directions)
    for i in set(range(len(gates))) - set(some):
        grad_gates[i].zero_()
    sources = [_as(directions[i], directions[i]) for i in some]
    upstream, scales = [_as(grads[i], directions[i]) for i in some], [gates[i].contiguous() for i in some]
    targets = [grad_directions[i] for i in some], [grad_gates[i] for i in some]
    _launch(chosen, "gated_factors_backward", [upstream, sources, scales, *targets], sources)
    return grad_directions, grad_gates


def gated_factors_backward_fake(
    grads: list[Tensor], directions: list[Tensor], gates: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients without values."""
    return [empty_like(v) for v in directions], empty_gates(gates)


def empty_gates(gates: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous outputs of the gates' shapes."""
    return [torch.empty_like(gate, memory_format=torch.contiguous_format) for gate in gates]


def funnel_penalty(gates: list[Tensor], c: float, normalized: bool, backend: str) -> Tensor:
    """`fastrank::funnel_penalty`."""
    chosen = _choose("funnel_penalty", gates, backend)
    if chosen == "reference":
        return reference.gates.funnel_penalty(gates, c, normalized)
    out = gates[0].new_empty((), dtype=torch.float32)
    gates = [gate.contiguous() for gate in gates if gate.numel()]
    if not gates:
        return out.zero_()
    if chosen == "triton":
        _native.triton_kernels("gates").funnel_penalty(gates, c, normalized, out)
        return out
    partials = out.new_empty(sum(-(-gate.numel() // FUNNEL_CHUNK) for gate in gates))
    if chosen == "cuda":
        torch.ops.fastrank.launch_funnel_penalty(gates, c, normalized, partials, out)
    else:
        _native.host().funnel_penalty(*_addresses(gates), c, normalized, partials.data_ptr(), out.data_ptr())
    return out


def funnel_penalty_backward(
    grad: Tensor, gates: list[Tensor], c: float, normalized: bool, backend: str
) -> list[Tensor]:
    """`fastrank::funnel_penalty_backward`."""
    chosen = _choose("funnel_penalty", gates, backend)
    if chosen == "reference":
        return reference.gates.funnel_penalty_backward(grad, gates, c, normalized)
    grads = empty_gates(gates)
    sources, targets = [g.contiguous() for g in gates if g.numel()], [g for g in grads if g.numel()]
    if not targets:
        return grads
    grad = grad.to(torch.float32).contiguous()
    if chosen == "triton":
        _native.triton_kernels("gates").funnel_penalty_backward(grad, sources, c, normalized, targets)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_funnel_penalty_backward(grad, sources, c, normalized, targets)
    else:
        addresses, sizes = _addresses(sources)
        _native.host().funnel_penalty_backward(
            grad.data_ptr(), addresses, [g.data_ptr() for g in targets], sizes, c, normalized
        )
    return grads


def funnel_proximal_(gates: list[Tensor], eta: float, c: float, penalty: str, backend: str) -> None:
    """`fastrank::funnel_proximal_`."""
    chosen = _choose("funnel_proximal_", gates, backend)
    if chosen == "reference":
        reference.gates.funnel_proximal_(gates, eta, c, penalty)
        return
    filled = [gate for gate in gates if gate.numel()]
    if not filled:
        return
    work = [gate.contiguous() for gate in filled]
    threshold = reference.gates.proximal_threshold(eta, c, penalty)
    options = eta, c, threshold, PENALTIES.index(penalty)
    if chosen == "triton":
        _native.triton_kernels("gates").funnel_proximal(work, *options)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_funnel_proximal(work, *options)
    else:
        _native.host().funnel_proximal(*_addresses(work), *options)
    for gate, moved in zip(filled, work, strict=True):
        if moved is gate:
            torch.autograd.graph.increment_version(gate)  # the kernel wrote behind torch's back
        else:
            gate.copy_(moved)


def count_below(gates: list[Tensor], threshold: float, backend: str) -> Tensor:
    """`fastrank::count_below`."""
    chosen = _choose("count_below", gates, backend)
    if chosen == "reference":
        return reference.gates.count_below(gates, threshold)
    counts = gates[0].new_empty(len(gates), dtype=torch.int64)
    gates = [gate.contiguous() for gate in gates]
    if chosen == "triton":
        _native.triton_kernels("gates").count_below(gates, threshold, counts)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_count_below(gates, threshold, counts)
    else:
        _native.host().count_below(*_addresses(gates), threshold, counts.data_ptr())
    return counts


def _choose(op: str, tensors: Sequence[Tensor], backend: str) -> str:
    return _backends.choose(_backends.facts(op, tensors[0]), backend)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous(memory_format=_register.memory_format(like))


def _filled(tensors: Sequence[Tensor]) -> list[int]:
    """The places of the tensors that are not empty."""
    return [i for i, x in enumerate(tensors) if x.numel()]


def _launch(chosen: str, name: str, columns: list[list[Tensor]], directions: list[Tensor]) -> None:
    """Run the kernel `name` over lists of factors and gates, one a column."""
    if not directions:
        return
    if chosen == "triton":
        getattr(_native.triton_kernels("gates"), name)(*columns)
    elif chosen == "cuda":
        getattr(torch.ops.fastrank, f"launch_{name}")(*columns)
    else:
        rows = [v.shape[0] for v in directions]
        sizes = [v.numel() // n for v, n in zip(directions, rows, strict=True)]
        getattr(_native.host(), name)(*(_addresses(column)[0] for column in columns), rows, sizes)


def _addresses(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses and sizes."""
    return [x.data_ptr() for x in tensors], [x.numel() for x in tensors]
