"""What the gated layers share: factors as unit directions times gates, and what becomes of them when gates close.

Source: the Funnel paper, eq. 4 and 5. A gate is the norm of one output slice of a factor (along dim 0). The gates are
parameters of their own: they survive copies, state dicts and compilation like any other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastrank import _checks, ops
from fastrank._stages import ConvStage
from fastrank.nn._conv import FactoredConv2d, Pair

Index = Tensor | slice
Folded = TypeVar("Folded", bound=FactoredConv2d)


class Ready(NamedTuple):
    """Factors that were computed ahead of a layer's call, and what they were computed from and under."""

    factors: dict[str, Tensor]
    versions: tuple[int, ...]
    recorded: bool  # whether for autograd
    hooks: object  # on what autograd saves: those of an activation checkpoint come and go within a forward pass


class GatedConv2d(FactoredConv2d):
    """A factored convolution in which slice j of a factor is gate[j] · direction[j] / |direction[j]|.

    GATES: factor -> its gate, by parameter names. PENALIZED: the gates that a regulariser closes and that `pruned`
    drops, one a rank; the others are plain parameters.
    """

    GATES: ClassVar[Mapping[str, str]]
    PENALIZED: ClassVar[tuple[str, ...]]
    _ready: Ready | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors anew, as the plain layer of the same form does, and the bias."""
        plain = self._form(self._gate_counts()).to_empty(device=next(self.parameters()).device)
        plain.reset_parameters()
        for name, gate in self.GATES.items():
            direction, size = split(getattr(plain, name))
            getattr(self, name).copy_(direction)
            getattr(self, gate).copy_(size)
        self._init_bias()

    def factors(self) -> dict[str, Tensor]:
        """The factors with their gates multiplied in, differentiable in both; all in one call."""
        ready = self._ready
        if ready is not None and _holds(ready, self):
            if not torch.compiler.is_compiling():
                self._ready = None  # a second call has gradients of its own, which add up as they would alone
            return ready.factors
        return compute_factors([self])[0].factors

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: all but factors computed ahead."""
        return {name: value for name, value in self.__dict__.items() if name != "_ready"}

    def penalized(self) -> list[nn.Parameter]:
        """The gates that a regulariser should close, one tensor (R,) a rank of the layer."""
        return [getattr(self, name) for name in self.PENALIZED]

    def pruned(self, threshold: float) -> FactoredConv2d:
        """The plain factored layer without the slices whose penalised gate |g| is below `threshold`, gates folded in.

        Of a gate vector that lies below it as a whole, the largest gate stays. Raises ValueError for a negative
        threshold and for gates that are not finite.
        """
        threshold = _checks.number("threshold", threshold, 0.0)
        return self._assemble([_kept(name, getattr(self, name), threshold) for name in self.PENALIZED])

    def fold(self) -> FactoredConv2d:
        """The plain factored layer of the same ranks, gates folded in: the same function to rounding."""
        return self._assemble([slice(None)] * len(self.PENALIZED))

    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel, all gates in: the same function to rounding."""
        return self.fold().to_dense()

    def to_sequential(self) -> nn.Sequential:
        """Plain convolutions with the gates folded in, for export and comparison."""
        return self.fold().to_sequential()

    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The convolutions of the folded layer on an (H, W) map, for counting; gates count nothing."""
        return self._form(self._gate_counts()).conv_stages(in_size)

    def _gate_counts(self) -> list[int]:
        return [gate.numel() for gate in self.penalized()]

    @abstractmethod
    def _form(self, ranks: Sequence[int]) -> FactoredConv2d:
        """The plain factored layer of this geometry and of these ranks (one a penalised gate), without values."""

    @abstractmethod
    def _cut(self, factors: Mapping[str, Tensor], kept: Sequence[Index]) -> dict[str, Tensor]:
        """The factors without the slices that `kept` (one index a penalised gate) leaves out."""

    @torch.no_grad()
    def _assemble(self, kept: Sequence[Index]) -> FactoredConv2d:
        factors = self._cut(self.factors(), kept)
        layer = self._form([len(gate[index]) for gate, index in zip(self.penalized(), kept, strict=True)])
        needs = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        for name, factor in factors.items():
            setattr(layer, name, nn.Parameter(factor.contiguous(), requires_grad=needs))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return layer.train(self.training)

    def _plain_form(self, kind: type[Folded], **ranks: Any) -> Folded:
        dtype = next(self.parameters()).dtype
        return kind(**FactoredConv2d.config(self), **ranks, device="meta", dtype=dtype)


def compute_factors(layers: Sequence[GatedConv2d]) -> list[Ready]:
    """The factors of every layer, in one call for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, str]]] = {}
    for place, layer in enumerate(layers):
        for name in layer.GATES:
            direction = getattr(layer, name)
            kinds.setdefault((direction.dtype, direction.device), []).append((place, name))
    found: list[dict[str, Tensor]] = [{} for _ in layers]
    for members in kinds.values():
        directions = [getattr(layers[place], name) for place, name in members]
        gates = [getattr(layers[place], layers[place].GATES[name]) for place, name in members]
        for (place, name), factor in zip(members, ops.gated_factors(directions, gates), strict=True):
            found[place][name] = factor
    recorded, hooks = torch.is_grad_enabled(), _saving_hooks()
    return [Ready(factors, _versions(layer), recorded, hooks) for layer, factors in zip(layers, found, strict=True)]


def _holds(ready: Ready, layer: GatedConv2d) -> bool:
    """Whether factors computed ahead are those that the layer would compute now, recorded as it would record them."""
    if torch.compiler.is_compiling():
        return not ready.versions  # computed in this graph, which records as a whole
    recorded = ready.recorded or not torch.is_grad_enabled()
    return recorded and ready.versions == _versions(layer) and ready.hooks == _saving_hooks()


def _versions(layer: GatedConv2d) -> tuple[int, ...]:
    """Tells whether directions or gates were replaced, or changed in place, since; nothing within a compiled graph."""
    if torch.compiler.is_compiling():
        return ()
    tensors = [getattr(layer, name) for pair in layer.GATES.items() for name in pair]
    return tuple(number for x in tensors for number in (id(x), 0 if x.is_inference() else x._version))


def _saving_hooks() -> object:
    """The innermost `torch.autograd.graph.saved_tensors_hooks` in force."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(False)


def split(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A factor (J, ...) as unit directions (J, ...) and gates (J,), both float64; `gated_factor` is the way back.

    A slice of zeros gets the gate 0 and a constant direction, so that the gate can still open.
    """
    rows = factor.detach().double().flatten(1)
    gate = rows.norm(dim=1)
    units = torch.where(gate[:, None] > 0, rows / gate[:, None], rows.shape[1] ** -0.5)
    return units.reshape(factor.shape), gate


def _kept(name: str, gate: Tensor, threshold: float) -> Tensor:
    """Indices (R',) of the gates with |g| >= threshold, of the largest where there is none."""
    sizes = _checks.finite(name, gate.detach()).double().abs()
    found = (sizes >= threshold).nonzero().flatten()
    return found if len(found) else sizes.argmax()[None]
