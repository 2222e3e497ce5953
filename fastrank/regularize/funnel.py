"""Funnel regularisation: a penalty on the gates of a factored network that closes those it can do without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastrank import _checks, ops
from fastrank.regularize.base import Regularizer, trained
from fastrank.regularize.schedules import Linear, Schedule

PENALTIES = ("funnel", "l1", "l2")
STEPS = ("proximal", "subgradient")
PUBLISHED = Linear()


class Funnel(Regularizer):
    """weight · Σ over the penalised gates of F_C(g) = |g| / (|g| + C), with C by `schedule` and epoch.

    The gates are those that the gated layers of `model` name in ``penalized()``. penalty: "funnel", or for comparison
    "l1", Σ|g|, and "l2", Σg², which have no C. normalized: C · F_C, whose slope at 0 is 1 whatever C is.

    step "proximal": after every optimizer step each gate g becomes argmin_x ½ (x − g)² + lr · weight · penalty(x), lr
    the learning rate of the gate's group (also with Adam, whose step is not lr · gradient): gates become exactly 0.
    The gradient that the optimizer sees, and its momentum, are without the penalty. "subgradient", as published: the
    penalty's derivative is added to the gradient, 0 at 0; with a small C gates then swing around 0.

    `start_epoch` sets C, which is that of epoch 0 before. Source: "Low-rank Tensor Decomposition for Compression of
    Convolutional Neural Networks Using Funnel Regularization": weight 0.002, C from 10 to 0.001 over 100 epochs, a
    learning rate of 0.01 for the gates and 0.001 for the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 0.002,
        *,
        schedule: Schedule = PUBLISHED,
        penalty: str = "funnel",
        step: str = "proximal",
        normalized: bool = False,
    ) -> None:
        self.weight = _checks.number("weight", weight, 0.0)
        if not isinstance(schedule, Schedule):
            raise _checks.fail_type("schedule", "a schedule, such as fastrank.regularize.Linear()", schedule)
        self.schedule = schedule
        self.penalty = _checks.choice("penalty", penalty, PENALTIES)
        self.step = _checks.choice("step", step, STEPS)
        if not isinstance(normalized, bool):
            raise _checks.fail_type("normalized", "a bool", normalized)
        if normalized and penalty != "funnel":
            raise _checks.fail("normalized", f"False where penalty is {penalty!r}, which has no C", normalized)
        self.normalized = normalized
        self.gates = penalized_gates(model)
        self.epoch = 0
        self._optimizer: Optimizer | None = None

    @property
    def c(self) -> float:
        """C in the current epoch."""
        return self.schedule.at(self.epoch)

    def governed(self) -> Mapping[str, nn.Parameter]:
        """The gates, by parameter name."""
        return self.gates

    def bind(self, optimizer: Optimizer) -> None:
        """Besides the check of every regulariser: where the gates' learning rates are read from, at every step."""
        super().bind(optimizer)
        self._optimizer = optimizer

    def start_epoch(self, epoch: int) -> None:
        """Set C to that of the given epoch."""
        self.epoch = _checks.integer("epoch", epoch, 0)

    def add_gradients(self) -> None:
        """In sub-gradient mode, add weight · penalty′(g) to every gate's gradient."""
        if self.weight == 0 or self.step != "subgradient":
            return
        for gates in self._by_kind():
            slopes, grads = self._slopes(gates), []
            for gate in gates:
                if gate.grad is None:
                    gate.grad = torch.zeros_like(gate)
                grads.append(gate.grad)
            torch._foreach_add_(grads, slopes, alpha=self.weight)

    @torch.no_grad()
    def after_step(self, stepped: bool = True) -> None:
        """In proximal mode, move every gate to its proximal point."""
        if not stepped or self.weight == 0 or self.step != "proximal":
            return
        for (lr, *_), gates in self._by_rate().items():
            eta = lr * self.weight
            if self.normalized:
                eta *= self.c
            ops.funnel_proximal_(gates, eta, self.c, penalty=self.penalty)

    def value(self) -> Tensor:
        """weight · Σ penalty(g), at the current C."""
        sums = [self._sum([gate.detach() for gate in gates]) for gates in self._by_kind()]
        return self.weight * sum((found.to(sums[0]) for found in sums[1:]), sums[0]) if sums else torch.zeros(())

    def below(self, threshold: float) -> dict[str, int]:
        """How many gates of each parameter have |g| < threshold, by name: what `pruned` would cut. Waits for a GPU.

        Raises ValueError for a negative threshold.
        """
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
        for name, gate in self.gates.items():
            kinds.setdefault((gate.dtype, gate.device), {})[name] = gate
        counted = {
            name: count
            for named in kinds.values()
            for name, count in zip(named, ops.count_below(list(named.values()), threshold).tolist(), strict=True)
        }
        return {name: counted[name] for name in self.gates}

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and so C."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the epoch."""
        self.epoch = _checks.integer("state['epoch']", state.get("epoch"), 0)

    def _sum(self, gates: list[Tensor]) -> Tensor:
        if self.penalty == "funnel":
            return ops.funnel_penalty(gates, self.c, normalized=self.normalized)
        wide = torch.cat([gate.flatten() for gate in gates])
        wide = wide if wide.dtype == torch.float64 else wide.float()
        return wide.abs().sum() if self.penalty == "l1" else wide.square().sum()

    def _slopes(self, gates: list[nn.Parameter]) -> list[Tensor]:
        if self.penalty == "l1":
            return [gate.detach().sign() for gate in gates]
        if self.penalty == "l2":
            return [2 * gate.detach() for gate in gates]
        with torch.enable_grad():
            leaves: list[Tensor] = [gate.detach().requires_grad_() for gate in gates]
            return list(torch.autograd.grad(self._sum(leaves), leaves))

    def _by_kind(self) -> list[list[nn.Parameter]]:
        """The gates to be trained, in lists of one dtype and device, as the operators want them."""
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for gate in trained(self.gates).values():
            kinds.setdefault((gate.dtype, gate.device), []).append(gate)
        return list(kinds.values())

    def _by_rate(self) -> dict[tuple[float, torch.dtype, torch.device], list[nn.Parameter]]:
        """The gates to be trained, by learning rate, dtype and device."""
        if self._optimizer is None:
            raise RuntimeError("Funnel must meet its optimizer before a proximal step: call attach or bind")
        left = {id(gate): gate for gate in trained(self.gates).values()}
        found: dict[tuple[float, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for group in self._optimizer.param_groups:
            gates = [left.pop(id(parameter)) for parameter in group["params"] if id(parameter) in left]
            lr = float(group["lr"]) if gates else 0.0  # reading a learning rate on a GPU waits for it
            for gate in gates:
                found.setdefault((lr, gate.dtype, gate.device), []).append(gate)
        if left:
            self.bind(self._optimizer)  # unfrozen since, and in no group: the error names it
        return found


def penalized_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable gates that the layers of `model` name in ``penalized()``, each once, by parameter name.

    Raises ValueError where there is none.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gates: dict[str, nn.Parameter] = {}
    for layer, module in model.named_modules():
        for gate in module.penalized() if callable(getattr(module, "penalized", None)) else ():
            if id(gate) not in names:
                whole = "a list of parameters of the model"
                raise _checks.fail(f"penalized() of layer {layer!r}", whole, f"a {type(gate).__name__} that is none")
            if gate.requires_grad:
                gates[names[id(gate)]] = gate
    if not gates:
        raise _checks.fail("model", "a model with trainable gates, such as gated layers have", type(model).__name__)
    return gates
