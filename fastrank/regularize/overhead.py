"""What a regulariser adds to a training step, measured: steps with it and without it, in turn, in one process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastrank import _checks
from fastrank.latency import Latency, _summary
from fastrank.regularize._kernels import is_fsdp
from fastrank.regularize.base import Regularizer

LEAST_SAMPLES = 3
WARMUP = 2
"""Windows of each kind before the first timed one: allocators, library handles, and warm starts."""


@dataclass(frozen=True)
class Overhead:
    """The time of a training step with regularisers and without, in microseconds.

    regularized, plain: median and percentiles over samples; a sample is the mean over a window of `window` steps, over
    which each regulariser acts equally often (TRP's projection acts in one step of 20). device: where the model was.
    """

    regularized: Latency
    plain: Latency
    regularizers: tuple[str, ...]
    window: int
    device: str

    @property
    def step_us(self) -> float:
        """Median time of a step with the regularisers."""
        return self.regularized.p50_us

    @property
    def plain_us(self) -> float:
        """Median time of the same step without them."""
        return self.plain.p50_us

    @property
    def added_us(self) -> float:
        """What they add; below 0 where the noise of the machine is larger."""
        return self.step_us - self.plain_us

    @property
    def ratio(self) -> float:
        """Time of a step with them over that of one without; 1.02 is an overhead of 2 %."""
        return self.step_us / self.plain_us

    def as_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return {
            "regularizers": list(self.regularizers),
            "device": self.device,
            "step_us": self.step_us,
            "step_p20_us": self.regularized.p20_us,
            "step_p80_us": self.regularized.p80_us,
            "plain_us": self.plain_us,
            "plain_p20_us": self.plain.p20_us,
            "plain_p80_us": self.plain.p80_us,
            "added_us": self.added_us,
            "ratio": self.ratio,
            "samples": self.plain.samples,
            "steps_per_sample": self.window,
        }

    def __str__(self) -> str:
        def row(time: Latency) -> str:
            return f"{time.p50_us / 1e3:.3f} ms (p20 {time.p20_us / 1e3:.3f}, p80 {time.p80_us / 1e3:.3f})"

        steps = f"{self.window} steps" if self.window > 1 else "1 step"
        return (
            f"{' + '.join(self.regularizers)}: {100 * (self.ratio - 1):+.1f} % of a training step on {self.device}: "
            f"{row(self.regularized)} against {row(self.plain)}; medians of {self.plain.samples} samples of {steps}"
        )


class _Trainee:
    """A copy of model, optimizer and regularisers, in training mode, that takes whole steps."""

    def __init__(
        self,
        model: nn.Module,
        regularizers: Sequence[Regularizer],
        optimizer: Optimizer | None,
        inputs: tuple[Any, ...],
        loss: Callable[[Any], Tensor],
        active: bool,
    ) -> None:
        self.model, own, copied = copy.deepcopy((model, list(regularizers), optimizer))
        self.model.train()
        self.optimizer = copied or torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad], lr=0.01, momentum=0.9
        )
        for regularizer in own:
            regularizer.bind(self.optimizer)
        self.regularizers = own if active else []
        self.inputs, self.loss = inputs, loss

    def step(self) -> None:
        """Forward, backward, penalties, the optimizer's step, projections."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(*self.inputs))
        if not isinstance(loss, Tensor) or loss.dim():
            raise _checks.fail_type("loss", "a function to a 0-d tensor", loss)
        torch.autograd.backward(loss)
        for regularizer in self.regularizers:
            regularizer.add_gradients()
        self.optimizer.step()
        for regularizer in self.regularizers:
            regularizer.after_step()


def overhead(
    model: nn.Module,
    regularizer: Regularizer | Sequence[Regularizer],
    example_input: Tensor | tuple[Any, ...],
    *,
    steps: int = 20,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Overhead:
    """Train copies of `model` on `example_input`, with the regulariser and without, and compare the time of a step.

    regularizer: one or more that govern parameters of `model`. example_input: what the model is called with, a tuple
    for several arguments; take the batch size of the training. steps: how many are timed of each kind, rounded up to
    whole windows (see `Overhead`), three of them at least. optimizer: one that holds the model's parameters; it is
    copied with its state (None: SGD with momentum). loss: the output of the model to a 0-d tensor (None: the mean of
    its squares). Steps with and without take turns; on a GPU each sample is synchronised. The model, its gradients,
    buffers and mode, regulariser, optimizer and random numbers stay as they are; there is memory for two more models.
    Under torch.distributed every rank has to call it. Raises ValueError or TypeError, naming the argument.
    """
    own = _checked(model, regularizer)
    _checks.integer("steps", steps, 1)
    inputs = example_input if isinstance(example_input, tuple) else (_checks.tensor("example_input", example_input),)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise _checks.fail_type("optimizer", "a torch.optim.Optimizer", optimizer)
    if loss is not None and not callable(loss):
        raise _checks.fail_type("loss", "a function of the model's output", loss)
    device = next(model.parameters()).device
    window = math.lcm(*(int(getattr(one, "every", 1)) for one in own))
    samples = max(LEAST_SAMPLES, -(-steps // window))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        trainees = [_Trainee(model, own, optimizer, inputs, loss or _mean_square, active) for active in (True, False)]
        times: list[list[float]] = [[], []]
        for sample in range(-WARMUP, samples):
            for which in (0, 1) if sample % 2 else (1, 0):  # who runs after whom must not favour anyone
                seconds = _seconds(trainees[which], window, device)
                if sample >= 0:
                    times[which].append(seconds / window * 1e6)
    names = tuple(type(one).__name__ for one in own)
    return Overhead(_summary(times[0]), _summary(times[1]), names, window, _name(device))


def _checked(model: nn.Module, regularizer: Regularizer | Sequence[Regularizer]) -> list[Regularizer]:
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    fsdp = [name for name, module in model.named_modules() if is_fsdp(module)]
    if fsdp:
        raise _checks.fail("model", "one that can be copied: measure before sharding it", f"FSDP at {fsdp[0]!r}")
    own = [regularizer] if isinstance(regularizer, Regularizer) else regularizer
    if not isinstance(own, Sequence) or not all(isinstance(one, Regularizer) for one in own):
        raise _checks.fail_type("regularizer", "one or more fastrank.regularize.Regularizer", regularizer)
    if not own:
        raise _checks.fail("regularizer", "one or more fastrank.regularize.Regularizer", "none")
    held = {id(parameter) for parameter in model.parameters()}
    for one in own:
        for name, parameter in one.governed().items():
            if id(parameter) not in held:
                got = f"a {type(one).__name__} whose {name!r} is of another model"
                raise _checks.fail("regularizer", "one that was made of model", got)
    return list(own)


def _mean_square(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise _checks.fail("loss", "given for a model whose output is no tensor", type(output).__name__)
    return output.float().square().mean()


def _seconds(trainee: _Trainee, steps: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        trainee.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
