"""`gated_factor` and `funnel_penalty`: factors with a gate a slice, and the regulariser that closes gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrank import _backends, _checks, _native, reference
from fastrank.ops import _register

FUNNEL_CHUNK = 4096  # gates a partial sum stands for: kChunk of csrc/gates/gates.h


def gated_factor(direction: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Each slice of a factor along dim 0, normalised, times its gate: gate[j] * direction[j] / |direction[j]|.

    Shapes: direction (J, ...) of one dimension or more, gate (J,) -> (J, ...), in direction's dtype and memory format.
    The norm is over all dimensions but the first, in float32 (float64 for float64 tensors). A slice whose sum of
    squares is no normal number there (a norm below about 1e-19) counts as zero: its result, its gradient and its
    gate's gradient are 0, never NaN. Norms above about 1e19 overflow in float32. Differentiable in both, twice.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or backend.
    """
    _checks.tensor("direction", direction)
    if direction.dim() == 0:
        raise _checks.fail("direction", "of one dimension or more", "a 0-d tensor")
    _checks.tensor("gate", gate, (direction.shape[0],), "(direction.shape[0],)")
    _checks.same_kind(direction=direction, gate=gate)
    _checks.choice("backend", backend, _backends.NAMES)
    out: Tensor = torch.ops.fastrank.gated_factor(direction, gate, backend)
    return out


def funnel_penalty(gates: Sequence[Tensor], c: float, *, normalized: bool = False, backend: str = "auto") -> Tensor:
    """The funnel regulariser F_c(g) = |g| / (|g| + c), summed over all gates of all tensors.

    Its derivative is sign(g) c / (|g| + c)^2, and 0 at 0. `normalized` multiplies both by c, so that the slope beside
    0 is 1 whatever c is.

    gates: a list of tensors of any shapes, one dtype and one device -> 0-d tensor, float32 (float64 for float64
    gates); an empty list gives 0. c: above 0. Differentiable twice.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong type, dtype, device, c or backend.
    """
    if isinstance(gates, Tensor) or not isinstance(gates, Sequence):
        raise _checks.fail_type("gates", "a list of tensors", gates)
    gates = list(gates)
    named = {f"gates[{i}]": _checks.tensor(f"gates[{i}]", gate) for i, gate in enumerate(gates)}
    c = _checks.number("c", c, 0.0, open_low=True)
    _checks.choice("backend", backend, _backends.NAMES)
    if not gates:
        return torch.zeros(())
    _checks.same_kind(**named)
    out: Tensor = torch.ops.fastrank.funnel_penalty(gates, c, bool(normalized), backend)
    return out


def _empty_like(x: Tensor) -> Tensor:
    """An output in x's memory format: for the kernels a slice along dim 0 is one block of memory."""
    return torch.empty_like(x, memory_format=_register.memory_format(x))


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous(memory_format=_register.memory_format(like))


def _rows(x: Tensor) -> tuple[int, int]:
    """Slices along dim 0 and elements in each, of a tensor that is not empty."""
    return x.shape[0], x.numel() // x.shape[0]


def _gated_factor(direction: Tensor, gate: Tensor, backend: str) -> Tensor:
    chosen = _backends.choose(_backends.facts("gated_factor", direction), backend)
    if chosen == "reference":
        return _as(reference.gates.gated_factor(direction, gate), direction)
    out = _empty_like(direction)
    if out.numel() == 0:
        return out
    direction, gate = _as(direction, direction), gate.contiguous()
    if chosen == "triton":
        _native.triton_kernels("gates").gated_factor(direction, gate, out)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_gated_factor(direction, gate, out)
    else:
        pointers = (t.data_ptr() for t in (direction, gate, out))
        _native.host().gated_factor(*pointers, *_rows(direction))
    return out


def _gated_factor_backward(grad: Tensor, direction: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    chosen = _backends.choose(_backends.facts("gated_factor", direction), backend)
    if chosen == "reference":
        grad_direction, grad_gate = reference.gates.gated_factor_backward(grad, direction, gate)
        return _as(grad_direction, direction), grad_gate
    grad_direction = _empty_like(direction)
    if grad_direction.numel() == 0:
        return grad_direction, gate.new_zeros(gate.shape)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad, direction, gate = _as(grad, direction), _as(direction, direction), gate.contiguous()
    tensors = (grad, direction, gate, grad_direction, grad_gate)
    if chosen == "triton":
        _native.triton_kernels("gates").gated_factor_backward(*tensors)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_gated_factor_backward(*tensors)
    else:
        _native.host().gated_factor_backward(*(t.data_ptr() for t in tensors), *_rows(direction))
    return grad_direction, grad_gate


def _gated_factor_backward_fake(grad: Tensor, direction: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_like(direction), torch.empty_like(gate, memory_format=torch.contiguous_format)


def _funnel_penalty(gates: list[Tensor], c: float, normalized: bool, backend: str) -> Tensor:
    chosen = _backends.choose(_backends.facts("funnel_penalty", gates[0]), backend)
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
        pointers, sizes = [gate.data_ptr() for gate in gates], [gate.numel() for gate in gates]
        _native.host().funnel_penalty(pointers, sizes, c, normalized, partials.data_ptr(), out.data_ptr())
    return out


def _funnel_penalty_fake(gates: list[Tensor], c: float, normalized: bool, backend: str) -> Tensor:
    return gates[0].new_empty((), dtype=reference.gates.accumulation_dtype(gates[0].dtype))


def _funnel_penalty_backward(
    grad: Tensor, gates: list[Tensor], c: float, normalized: bool, backend: str
) -> list[Tensor]:
    chosen = _backends.choose(_backends.facts("funnel_penalty", gates[0]), backend)
    if chosen == "reference":
        slopes = reference.gates.funnel_penalty_backward(grad, gates, c, normalized)
        return [slope.contiguous() for slope in slopes]
    grads = _funnel_penalty_backward_fake(grad, gates, c, normalized, backend)
    sources, targets = [g.contiguous() for g in gates if g.numel()], [g for g in grads if g.numel()]
    if not targets:
        return grads
    grad = grad.to(torch.float32).contiguous()
    if chosen == "triton":
        _native.triton_kernels("gates").funnel_penalty_backward(grad, sources, c, normalized, targets)
    elif chosen == "cuda":
        torch.ops.fastrank.launch_funnel_penalty_backward(grad, sources, c, normalized, targets)
    else:
        pointers = [g.data_ptr() for g in sources], [g.data_ptr() for g in targets]
        _native.host().funnel_penalty_backward(grad.data_ptr(), *pointers, [g.numel() for g in sources], c, normalized)
    return grads


def _funnel_penalty_backward_fake(
    grad: Tensor, gates: list[Tensor], c: float, normalized: bool, backend: str
) -> list[Tensor]:
    return [torch.empty_like(gate, memory_format=torch.contiguous_format) for gate in gates]


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.fastrank.gated_factor_backward(grad, *ctx.saved_tensors, ctx.backend), None)


def _differentiate_gated_again(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    return (*reference.gates.gated_factor_double_backward(a, b, *ctx.saved_tensors), None)


def _save_funnel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gates, *ctx.options = inputs
    ctx.save_for_backward(*gates)


def _differentiate_funnel(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.fastrank.funnel_penalty_backward(grad, list(ctx.saved_tensors), *ctx.options), None, None, None


def _save_funnel_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, gates, ctx.c, ctx.normalized, _ = inputs
    ctx.save_for_backward(grad, *gates)


def _differentiate_funnel_again(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    grad, *gates = ctx.saved_tensors
    grads = reference.gates.funnel_penalty_double_backward(upstream, grad, gates, ctx.c, ctx.normalized)
    return (*grads, None, None, None)


_register.register(
    "gated_factor(Tensor direction, Tensor gate, str backend) -> Tensor",
    _gated_factor,
    fake=lambda direction, gate, backend: _empty_like(direction),
    setup_context=_save_gated,
    backward=_differentiate_gated,
)
_register.register(
    "gated_factor_backward(Tensor grad, Tensor direction, Tensor gate, str backend) -> "
    "(Tensor grad_direction, Tensor grad_gate)",
    _gated_factor_backward,
    fake=_gated_factor_backward_fake,
    setup_context=_save_gated,
    backward=_differentiate_gated_again,
)
_register.register(
    "funnel_penalty(Tensor[] gates, float c, bool normalized, str backend) -> Tensor",
    _funnel_penalty,
    fake=_funnel_penalty_fake,
    setup_context=_save_funnel,
    backward=_differentiate_funnel,
)
_register.register(
    "funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, str backend) -> Tensor[]",
    _funnel_penalty_backward,
    fake=_funnel_penalty_backward_fake,
    setup_context=_save_funnel_backward,
    backward=_differentiate_funnel_again,
)
