"""Registration of the `fastrank::*` operators: schema, implementation, fake, autograd, in one call an operator.

The schemas live in csrc/registry.cpp, so that C++ programs have them too. Where that part is not compiled they are
defined here from the same strings; a test holds the two spellings together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from json import JSONDecodeError
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrank import _native

_native.load("_C")
_library = torch.library.Library("fastrank", "FRAGMENT")  # type: ignore[no-untyped-call]
SCHEMAS: dict[str, str] = {}
FLOP_COUNTER = "torch.utils.flop_counter"


def register(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register one operator from its schema, ``name(...) -> ...``.

    `implementation` serves every device and does its own dispatch; `fake` (default: the implementation itself, run on
    fake tensors) gives shapes; `backward` and `setup_context` are `torch.library.register_autograd`'s.
    """
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = schema
    qualified = f"fastrank::{name}"
    if not hasattr(torch.ops.fastrank, name):
        _library.define(schema)  # type: ignore[no-untyped-call]
    torch.library.impl(qualified, "default", _naming_cache(implementation), lib=_library)
    torch.library.register_fake(qualified, fake or implementation, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)


def _naming_cache(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation`, which says what to delete where a file of Triton's compile cache was cut off."""

    @wraps(implementation)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return implementation(*arguments, **options)
        except (JSONDecodeError, RuntimeError) as error:
            if not isinstance(error, JSONDecodeError) and "device kernel image is invalid" not in str(error):
                raise
            folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
            raise RuntimeError(f"Triton's compile cache is damaged ({error}): delete the folder {folder}") from error

    return call


def flop_formula(operator: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """torch's `register_flop_formula`, put off until somebody imports its module.

    That module imports Triton, which takes as long as all of fastrank does.
    """

    def decorate(formula: Callable[..., int]) -> Callable[..., int]:
        _Formulas.found.append((operator, formula))
        if FLOP_COUNTER in sys.modules:
            _Formulas.register(sys.modules[FLOP_COUNTER])
        elif not any(isinstance(finder, _Formulas) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Formulas())
        return formula

    return decorate


class _Formulas(MetaPathFinder):
    """Formulas that wait for torch's flop counter to be imported."""

    found: ClassVar[list[tuple[Any, Callable[..., int]]]] = []

    @classmethod
    def register(cls, counter: ModuleType) -> None:
        """Hand the formulas to the module."""
        while cls.found:
            operator, formula = cls.found.pop()
            counter.register_flop_formula(operator)(formula)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the flop counter, with a loader that registers the formulas behind it."""
        if name != FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                self.register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x` (meta knows none)."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype, where autocast is on for their device (float64 is left alone, as in torch)."""
    tensors = (x, *others)
    if not autocasting(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which tensors that `autocast` has cast keep their dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


# Looked up once: asking costs less than a microsecond.
modes, functorch = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
tracing = torch._C._get_tracing_state


def watched(*tensors: Tensor | None) -> bool:
    """Whether torch has to see an operator: a compiler, tracer, mode or transformation is at work, or a tensor is no
    plain one."""
    if torch.compiler.is_compiling() or modes() or functorch() is not None or tracing() is not None:
        return True
    return any(
        t is not None and (type(t) not in (Tensor, Parameter) or t.layout is not torch.strided or t.is_meta)
        for t in tensors
    )


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is stored so (and not also contiguous), else contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
