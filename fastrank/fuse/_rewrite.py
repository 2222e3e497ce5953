"""The graph rewritten: what follows a convolution goes into its weights (BatchNorm) or its epilogue (addition, ReLU).

Only what nobody else reads may disappear, and nothing may be computed from a tensor that an in-place operation has
changed in between.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrank.fuse._fold import FOLDABLE, fold, why_no_statistics
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv
from fastrank.nn._conv import FactoredConv2d

EXAMPLE = "example"
"""The name of the run on the user's own input, which every graph has made."""
WITH_EPILOGUE = (FusedTucker2Conv, FusedCPConv, SVDConv)
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.SiLU: "silu", F.relu: "relu", F.silu: "silu", torch.relu: "relu", torch.relu_: "relu",
    "relu": "relu", "relu_": "relu",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_INTO_FIRST = (operator.iadd, "add_")
_HARMLESS = ("", "torch", "_operator", "math", "builtins")  # where functions live whose names tell what they change


@dataclass(frozen=True)
class FusedLayer:
    """What became of one convolution.

    layer: its name in the model. kind: its class. folded: what it now does itself, in order: names of modules, and
    functions such as "add". left: why what follows stayed as it was, empty where nothing that could be folded follows.
    """

    layer: str
    kind: str
    folded: tuple[str, ...]
    left: str


class Rewriter:
    """Rewrites a traced graph in place.

    whole: the modules that tracing did not look into, with the reasons. The nodes bear ``meta["kinds"]``: for each
    trial run of the graph by its name, (shape, dtype) of their value in it.
    """

    def __init__(self, traced: fx.GraphModule, whole: dict[nn.Module, str]) -> None:
        self.graph = traced.graph
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.whole = whole
        # How many calls reach a module, by itself or as a part of one that is called whole.
        self.calls = Counter(part for node in self._calls() for part in self.modules[str(node.target)].modules())
        self.read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}

    def run(self) -> list[FusedLayer]:
        """Rewrite; one row a convolution, in the order of their calls."""
        for node in list(self._calls()):
            module = self._module(node)
            if isinstance(module, nn.Module) and self._does_nothing(module):
                self._absorb(node.all_input_nodes[0], node)
        rows: dict[str, FusedLayer] = {}
        for node in list(self._calls()):
            layer, name = self._module(node), str(node.target)
            if isinstance(layer, nn.Conv2d | FactoredConv2d) and name not in rows:
                folded: list[str] = []
                left = self._why_not(node, layer) or self._take(node, layer, folded)
                rows[name] = FusedLayer(name, type(layer).__name__, tuple(folded), left)
        self.graph.lint()  # type: ignore[no-untyped-call]
        return list(rows.values())

    def _calls(self) -> Iterator[fx.Node]:
        return (node for node in self.graph.nodes if node.op == "call_module")

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _does_nothing(self, module: nn.Module) -> bool:
        return type(module) in _NO_OPS and module not in self.whole and not module.training

    def _absorb(self, node: fx.Node, after: fx.Node) -> None:
        """`node` stands for `after`, its only way on, from now on."""
        after.replace_all_uses_with(node)
        node.meta.update(kinds=after.meta["kinds"], stands_for=after.meta.get("stands_for", after.name))
        self.graph.erase_node(after)

    def _why_not(self, conv: fx.Node, layer: nn.Module) -> str:
        """Empty where the parameters of the convolution serve this one call alone and may be replaced."""
        if layer in self.whole:
            return self.whole[layer]
        if type(layer) not in FOLDABLE:
            return f"nothing can be folded into a {type(layer).__name__}"
        if self.calls[layer] > 1:
            return f"it is called {self.calls[layer]} times"
        if any(name.startswith(f"{conv.target}.") for name in self.read):
            return "its parameters are read by something else too"
        if len(conv.args) + len(conv.kwargs) > 1 or getattr(layer, "activation", "none") != "none":
            return "it has an epilogue already"
        return ""

    def _take(self, conv: fx.Node, layer: Any, folded: list[str]) -> str:
        """Take in what follows `conv`, noted in `folded`; returns why it stopped early, where it did."""
        for step in (self._norm, self._addition, self._activation)[: 3 if isinstance(layer, WITH_EPILOGUE) else 1]:
            if len(conv.users) > 1:
                return f"its output is read {len(conv.users)} times"
            after = next(iter(conv.users), None)
            reason = None if after is None else step(conv, layer, after)
            if after is None or reason is None:
                continue
            if reason:
                return f"{_label(after)}: {reason}"
            folded.append(_label(after))
            self._absorb(conv, after)
        return ""

    # A step does what `after` does, in `layer`, and returns "". Where it must not it does nothing and returns the
    # reason, and None where `after` is of another kind.

    def _norm(self, conv: fx.Node, layer: Any, after: fx.Node) -> str | None:
        norm: Any = self._module(after)
        if not isinstance(norm, _BatchNorm):
            return None
        return why_no_statistics(norm) or fold(layer, norm)

    def _addition(self, conv: fx.Node, layer: Any, after: fx.Node) -> str | None:
        if after.op not in ("call_function", "call_method") or after.target not in _ADDITIONS:
            return None
        if conv not in after.args or len(after.all_input_nodes) != 2 or not _plain_sum(after):
            return None
        residual = next(node for node in after.all_input_nodes if node is not conv)
        if after.target in _INTO_FIRST and after.args[0] is residual:
            return "it writes into the other addend"
        known = residual.meta["kinds"]
        if any(known.get(run) != kind for run, kind in conv.meta["kinds"].items() if run in known or run == EXAMPLE):
            return "the addends may differ in shape or dtype"
        between = list(_between(conv, after))
        if any(self._mutates(node) for node in between):
            return "what stands between may write into its input"
        if residual in between:
            after.prepend(conv)
        conv.args, conv.kwargs = (*conv.all_input_nodes, residual), {}
        return ""

    def _activation(self, conv: fx.Node, layer: Any, after: fx.Node) -> str | None:
        module = self._module(after)
        if module is not None:
            name = None if module in self.whole else _ACTIVATIONS.get(type(module))
        else:
            plain = after.args[:1] == (conv,) and all(isinstance(flag, bool) for flag in after.args[1:])
            name = _ACTIVATIONS.get(after.target) if plain and set(after.kwargs) <= {"inplace"} else None
        if name is None:
            return None
        layer.activation = name
        return ""

    def _mutates(self, node: fx.Node) -> bool:
        """Whether `node` may change a tensor that it is given; True where that cannot be known."""
        if node.op == "call_module":
            parts = list(self.modules[str(node.target)].modules())
            known = all(isinstance(p, FactoredConv2d) or type(p).__module__.startswith("torch.nn.") for p in parts)
            return not known or any(getattr(part, "inplace", False) or part in self.whole for part in parts)
        name = _label(node)
        room = "" if isinstance(node.target, str) else str(getattr(node.target, "__module__", None) or "")
        asked = "out" in node.kwargs or node.kwargs.get("inplace", False) or any(arg is True for arg in node.args)
        by_name = node.op.startswith("call_") and name.endswith("_") and not name.endswith("__")
        return bool(asked or by_name or node.target in _INTO_FIRST or room.partition(".")[0] not in _HARMLESS)


def _plain_sum(node: fx.Node) -> bool:
    return len(node.args) == 2 and set(node.kwargs) <= {"alpha"} and bool(node.kwargs.get("alpha", 1) == 1)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _label(node: fx.Node) -> str:
    """A module by its name, a function or method by its own."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
