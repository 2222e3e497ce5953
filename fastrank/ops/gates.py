"""Gates over lists of tensors: gated factors, the penalty that closes gates, its proximal step, and who is closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrank import _backends, _checks, reference
from fastrank.ops import _gates, _register
from fastrank.reference.gates import proximal_threshold as proximal_threshold


def gated_factors(directions: Sequence[Tensor], gates: Sequence[Tensor], *, backend: str = "auto") -> list[Tensor]:
    """`gated_factor` of every pair of two lists, in one launch; bit for bit what single calls give.

    Shapes: directions[i] (J_i, ...) of one dimension or more, gates[i] (J_i,) -> list of (J_i, ...), each in its
    direction's dtype and memory format. All tensors share dtype and device; empty lists give an empty list. The list
    is one node of autograd: a factor that the loss does not reach leaves its two gradients None, as single calls do.
    Differentiable twice.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or backend.
    """
    directions, gates = _list("directions", directions), _list("gates", gates)
    if len(gates) != len(directions):
        raise _checks.fail("gates", f"of as many tensors as directions, {len(directions)}", len(gates))
    named: dict[str, Tensor] = {}
    for i, (direction, gate) in enumerate(zip(directions, gates, strict=True)):
        _check_pair(f"directions[{i}]", direction, f"gates[{i}]", gate)
        named |= {f"directions[{i}]": direction, f"gates[{i}]": gate}
    _checks.choice("backend", backend, _backends.NAMES)
    if not directions:
        return []
    _checks.same_kind(**named)
    outs: list[Tensor] = torch.ops.fastrank.gated_factors(directions, gates, backend)
    return outs


def gated_factor(direction: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Each slice of a factor along dim 0, normalised, times its gate: gate[j] * direction[j] / |direction[j]|.

    Shapes: direction (J, ...) of one dimension or more, gate (J,) -> (J, ...), in direction's dtype and memory format.
    The norm is over all dimensions but the first, in float32 (float64 for float64 tensors). A slice whose sum of
    squares is no normal number there (a norm below about 1e-19) counts as zero: its result, its gradient and its
    gate's gradient are 0, never NaN. Norms above about 1e19 overflow in float32. Differentiable in both, twice.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong shape, dtype, device or backend.
    """
    _check_pair("direction", direction, "gate", gate)
    _checks.same_kind(direction=direction, gate=gate)
    _checks.choice("backend", backend, _backends.NAMES)
    out: Tensor = torch.ops.fastrank.gated_factors([direction], [gate], backend)[0]
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
    gates = _gates_of(gates)
    c = _checks.number("c", c, 0.0, open_low=True)
    _checks.choice("backend", backend, _backends.NAMES)
    if not gates:
        return torch.zeros(())
    out: Tensor = torch.ops.fastrank.funnel_penalty(gates, c, bool(normalized), backend)
    return out


def funnel_proximal_(
    gates: Sequence[Tensor], eta: float, c: float, *, penalty: str = "funnel", backend: str = "auto"
) -> None:
    """Move every gate of a list, in place, to argmin_x ½ (x − g)² + η · penalty(x).

    penalty: "funnel", |x| / (|x| + c) (see `reference.gates.proximal_points`: the global minimum, exactly 0 up to a
    threshold); "l1", |x|; "l2", x², which closes no gate. The last two ignore c. Computed in float64, then rounded.

    gates: a list of tensors of any shapes, one dtype and one device; parameters are taken as they are, and nothing is
    recorded for autograd. eta: a learning rate times a weight, at least 0. c: above 0.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong type, dtype, device, number, penalty or backend.
    """
    gates = _gates_of(gates)
    eta, c = _checks.number("eta", eta, 0.0), _checks.number("c", c, 0.0, open_low=True)
    _checks.choice("penalty", penalty, _gates.PENALTIES)
    _checks.choice("backend", backend, _backends.NAMES)
    if gates:
        with torch.no_grad():
            torch.ops.fastrank.funnel_proximal_(gates, eta, c, penalty, backend)


def count_below(gates: Sequence[Tensor], threshold: float, *, backend: str = "auto") -> Tensor:
    """How many gates of each tensor have |g| < threshold: a list of tensors -> (len(gates),) int64, on their device.

    gates: tensors of any shapes, one dtype and one device; an empty list gives (0,). NaN is below nothing. threshold:
    at least 0; compared in float64. Nothing waits for the device.

    backend: "auto" | "reference" | "triton" | "cuda" | "host" (the CUDA kernel compiled for the CPU, for tests).
    Raises ValueError or TypeError, naming the argument, on a wrong type, dtype, device, threshold or backend.
    """
    gates = _gates_of(gates)
    threshold = _checks.number("threshold", threshold, 0.0)
    _checks.choice("backend", backend, _backends.NAMES)
    if not gates:
        return torch.zeros(0, dtype=torch.int64)
    out: Tensor = torch.ops.fastrank.count_below([gate.detach() for gate in gates], threshold, backend)
    return out


def _list(name: str, tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise _checks.fail_type(name, "a list of tensors", tensors)
    return list(tensors)


def _gates_of(gates: Any) -> list[Tensor]:
    """`gates` as a list of tensors of one kind."""
    named = {f"gates[{i}]": gate for i, gate in enumerate(_list("gates", gates))}
    for name, gate in named.items():
        _checks.tensor(name, gate)
    if named:
        _checks.same_kind(**named)
    return list(named.values())


def _check_pair(name: str, direction: Tensor, gate_name: str, gate: Tensor) -> None:
    _checks.tensor(name, direction)
    if direction.dim() == 0:
        raise _checks.fail(name, "of one dimension or more", "a 0-d tensor")
    _checks.tensor(gate_name, gate, (direction.shape[0],), f"({name}.shape[0],)")


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    directions, gates, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*directions, *gates)


def _differentiate_gated(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = len(grads)
    saved = ctx.saved_tensors  # once: activation checkpointing hands it out no second time
    directions, gates = saved[:count], saved[count:]
    grad_directions: list[Tensor | None] = [None] * count
    grad_gates: list[Tensor | None] = [None] * count
    wanted = [of_direction or of_gate for of_direction, of_gate in zip(*ctx.needs_input_grad[:2], strict=True)]
    needed = [i for i, grad in enumerate(grads) if grad is not None and wanted[i]]
    if not needed:
        return grad_directions, grad_gates, None
    found = torch.ops.fastrank.gated_factors_backward(
        [grads[i] for i in needed], [directions[i] for i in needed], [gates[i] for i in needed], ctx.backend
    )
    for i, of_direction, of_gate in zip(needed, *found, strict=True):
        grad_directions[i], grad_gates[i] = of_direction, of_gate
    return grad_directions, grad_gates, None


def _save_gated_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    grads, directions, gates, _ = inputs
    ctx.save_for_backward(*grads, *directions, *gates)


def _differentiate_gated_again(ctx: Any, a: list[Tensor], b: list[Tensor]) -> tuple[Any, ...]:
    count = len(a)
    saved = ctx.saved_tensors
    columns = [saved[first : first + count] for first in (0, count, 2 * count)]
    found = [reference.gates.gated_factor_double_backward(*tensors) for tensors in zip(a, b, *columns, strict=True)]
    return (*(list(column) for column in zip(*found, strict=True)), None)


def _funnel_penalty_fake(gates: list[Tensor], c: float, normalized: bool, backend: str) -> Tensor:
    return gates[0].new_empty((), dtype=reference.gates.accumulation_dtype(gates[0].dtype))


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
    "gated_factors(Tensor[] directions, Tensor[] gates, str backend) -> Tensor[]",
    _gates.gated_factors,
    fake=lambda directions, gates, backend: [_gates.empty_like(direction) for direction in directions],
    setup_context=_save_gated,
    backward=_differentiate_gated,
)
_register.register(
    "gated_factors_backward(Tensor[] grads, Tensor[] directions, Tensor[] gates, str backend) -> "
    "(Tensor[] grad_directions, Tensor[] grad_gates)",
    _gates.gated_factors_backward,
    fake=_gates.gated_factors_backward_fake,
    setup_context=_save_gated_backward,
    backward=_differentiate_gated_again,
)
_register.register(
    "funnel_penalty(Tensor[] gates, float c, bool normalized, str backend) -> Tensor",
    _gates.funnel_penalty,
    fake=_funnel_penalty_fake,
    setup_context=_save_funnel,
    backward=_differentiate_funnel,
)
_register.register(
    "funnel_penalty_backward(Tensor grad, Tensor[] gates, float c, bool normalized, str backend) -> Tensor[]",
    _gates.funnel_penalty_backward,
    fake=lambda grad, gates, c, normalized, backend: _gates.empty_gates(gates),
    setup_context=_save_funnel_backward,
    backward=_differentiate_funnel_again,
)
_register.register(
    "funnel_proximal_(Tensor(a!)[] gates, float eta, float c, str penalty, str backend) -> ()",
    _gates.funnel_proximal_,
    fake=lambda gates, eta, c, penalty, backend: None,
)
_register.register(
    "count_below(Tensor[] gates, float threshold, str backend) -> Tensor",
    _gates.count_below,
    fake=lambda gates, threshold, backend: gates[0].new_empty(len(gates), dtype=torch.int64),
)
