"""What the factored convolutions share: geometry, padding strings, dispatch, and their registration as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank import _backends, _checks
from fastrank.ops import _register
from fastrank.reference.conv import ACTIVATIONS, epilogue, epilogue_backward
from fastrank.reference.conv import Geometry as Geometry

Pair = tuple[int, int]
Shape = tuple[int, ...]
BACKEND_NAMES = _backends.NAMES


# (x, residual, out, activation): out = activation(convolution of x + bias + residual), of x's memory format, not empty.
Launch = Callable[[Tensor, Tensor | None, Tensor, str], None]


class Sizes(NamedTuple):
    """What the shapes of the factors say. ranks: (R_in, R_out) of Tucker-2, else (R, R)."""

    out_channels: int
    kernel: Pair
    ranks: Pair


class Library(NamedTuple):
    """One more way to compute a convolution by the library: (x, *factors, bias, residual, *geometry, activation), and
    its gradients as `register_convolution` takes them."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, ...]]


class Kernels(Protocol):
    """One backend's kernels of a factored convolution, over outputs that are allocated here."""

    def prepare(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry) -> Launch:
        """What serves inputs of the shape, kind and layout of x; it keeps copies of the weights, and nothing of x."""

    def backward(
        self, grad: Tensor, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (x, *factors), None where `needs` is False; nothing is empty."""


def same_padding(kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Zeros (before, after) along H and W that keep the size of the map at stride 1, the larger part after."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)


def conv_geometry(
    x: Tensor, kernel: Pair, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair
) -> tuple[Tensor, Geometry]:
    """x and the checked (stride, padding, dilation) as pairs.

    The zeros that a padding string asks for on one side only are appended to x: the first stage has no bias, so
    padding its input with zeros is padding its output with zeros.
    """
    strides, dilations = _checks.pair("stride", stride, 1), _checks.pair("dilation", dilation, 1)
    if isinstance(padding, str):
        _checks.choice("padding", padding, ("same", "valid"))
        if padding == "valid":
            paddings = (0, 0)
        else:
            if strides != (1, 1):
                raise _checks.fail("stride", "1 with padding='same'", strides)
            top, left = same_padding(kernel, dilations)
            paddings = (top[0], left[0])
            x = F.pad(x, (0, left[1] - left[0], 0, top[1] - top[0])) if top[1] != top[0] or left[1] != left[0] else x
    else:
        paddings = _checks.pair("padding", padding, 0)
    _checks.conv_output_size((x.shape[2], x.shape[3]), kernel, strides, paddings, dilations)
    return x, (strides, paddings, dilations)


def conv_macs(kh: int, kw: int, in_channels: int, out_channels: int, out_size: Pair, groups: int = 1) -> int:
    """Multiply-adds of one image through one convolution, without its bias."""
    return kh * kw * in_channels * out_channels // groups * out_size[0] * out_size[1]


def convolve(
    name: str,
    x: Tensor,
    factors: dict[str, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    kernel: Pair,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    activation: str,
    backend: str,
) -> Tensor:
    """Call the operator `name` on factors whose shapes are checked: autocast, one kind of tensor, geometry."""
    _checks.choice("backend", backend, BACKEND_NAMES)
    _checks.choice("activation", activation, ACTIVATIONS)
    cast: Any = _register.autocast(x, *factors.values(), bias, residual)
    x, *values, bias, residual = cast
    _checks.same_kind(x=x, **dict(zip(factors, values, strict=True)), bias=bias, residual=residual)
    x, geometry = conv_geometry(x, kernel, stride, padding, dilation)
    if residual is not None:
        _checks.tensor("residual", residual, _out_shape(name, x, values, geometry), "the output's shape")
    if backend == "auto" and not _register.watched(x, *values, bias, residual):
        with _register.no_autocast(x):  # the tensors are cast, and sums stay in their dtype
            found = EAGER[name](Call(x, values, bias, residual, geometry, activation))
        if found is not None:
            return found
    out: Tensor = getattr(torch.ops.fastrank, name)(x, *values, bias, residual, *geometry, activation, backend)
    return out


def _out_shape(name: str, x: Tensor, factors: Sequence[Tensor], geometry: Geometry) -> Shape:
    sizes = SIZES[name](*(factor.shape for factor in factors))
    return (x.shape[0], sizes.out_channels, *out_size((x.shape[2], x.shape[3]), sizes.kernel, geometry))


def out_size(size: Pair, kernel: Pair, geometry: Geometry) -> Pair:
    """(H', W') of a convolution of an (H, W) map, which is not checked."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, *geometry, strict=True)
    )
    return height, width


def work_of(name: str, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, call: str) -> _backends.ConvWork:
    """A call of the operator as tables know it."""
    channels_last = _register.memory_format(x) is torch.channels_last
    return _work(name, x.shape, [factor.shape for factor in factors], geometry, channels_last, call)


def _work(
    name: str, x: Shape, factors: Sequence[Shape], geometry: Geometry, channels_last: bool, call: str
) -> _backends.ConvWork:
    """The same from the shapes."""
    out_channels, kernel, ranks = SIZES[name](*factors)
    return _backends.ConvWork(
        batch=x[0],
        in_channels=x[1],
        out_channels=out_channels,
        size=(x[2], x[3]),
        kernel=kernel,
        ranks=ranks,
        stride=geometry[0],
        padding=geometry[1],
        dilation=geometry[2],
        channels_last=channels_last,
        call=call,
    )


@_backends.remembered
def _chosen(
    name: str,
    x: Shape,
    factors: tuple[Shape, ...],
    geometry: Geometry,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    interpreter: bool,
    call: str,
) -> str:
    """What `auto` takes for a call; threads and interpreter are what its facts have of the process."""
    work = _work(name, x, factors, geometry, channels_last, call)
    return _backends.choose(_backends.facts_of(name, device, dtype, work), "auto")


def _facts(name: str, x: Tensor, factors: Sequence[Tensor], geometry: Geometry, call: str) -> _backends.Facts:
    return _backends.facts(name, x, work_of(name, x, factors, geometry, call))


def empty(x: Tensor, shape: Shape) -> Tensor:
    """An output of x's kind and memory format."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_register.memory_format(x))


def like(grad: Tensor, t: Tensor) -> Tensor:
    """`grad` in the memory format of t."""
    return grad.contiguous(memory_format=_register.memory_format(t))


class Call(NamedTuple):
    """The checked arguments of an operator, but for the backend."""

    x: Tensor
    factors: Sequence[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    geometry: Geometry
    activation: str


# What a backend of the library makes of a call, by operators whose derivatives torch knows.
BY_LIBRARY: dict[str, Callable[[str, Call], Tensor]] = {}
# What `auto` makes of it past the operator, or None where the operator has to serve.
EAGER: dict[str, Callable[[Call], Tensor | None]] = {}
SIZES: dict[str, Callable[..., Sizes]] = {}
KERNELS: dict[str, Mapping[str, Kernels]] = {}


def register_convolution(
    name: str,
    factors: Sequence[str],
    *,
    sequence: Callable[..., Tensor],
    merge: Callable[..., Tensor],
    merge_backward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    macs: Callable[..., Iterable[int]],
    sizes: Callable[..., Sizes],
    libraries: Mapping[str, Library] = {},
    kernels: Mapping[str, Kernels] = {},
) -> None:
    """Register ``name(x, *factors, bias, residual, stride, padding, dilation, activation, backend)``.

    sequence: the plain-PyTorch truth, of the operator's arguments but the backend; merge: factors -> dense kernel;
    merge_backward: (gradient of that kernel, *factors) -> gradients of the factors; backward: (grad, x, *factors,
    *geometry, needs) -> gradients of x and the factors; macs: multiply-adds of each stage from (shapes of the factors,
    (H, W), (H', W')); sizes: of the factors' shapes; libraries, kernels: what serves the other backends.
    """
    SIZES[name], KERNELS[name] = sizes, kernels
    count = len(factors) + 1  # of tensors besides bias and residual

    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, bias, residual, stride, padding, dilation, activation, backend = arguments
        geometry = (tuple(stride), tuple(padding), tuple(dilation))
        chosen = _backends.choose(_facts(name, x, tensors, geometry, "forward"), backend)
        if chosen in kernels:
            out = empty(x, _out_shape(name, x, tensors, geometry))
            if out.numel():
                kernels[chosen].prepare(x, tensors, bias, geometry)(x, residual, out, activation)
            return out
        return by_library(chosen, Call(x, tensors, bias, residual, geometry, activation))

    def by_library(chosen: str, call: Call) -> Tensor:
        x, tensors, bias, residual, geometry, activation = call
        if chosen == "dense":
            out = epilogue(F.conv2d(x, merge(*tensors), bias, *geometry), residual, activation)
        else:
            serve = libraries[chosen].forward if chosen in libraries else sequence
            out = serve(x, *tensors, bias, residual, *geometry, activation)
        return out.contiguous(memory_format=_register.memory_format(x))

    def eager(call: Call) -> Tensor | None:
        """The library's own calls: they cost less than an operator of Python, and keep the maps between for the
        backward pass."""
        x, tensors, bias, residual, geometry, _ = call
        last = _register.memory_format(x) is torch.channels_last
        sizes = name, x.shape, tuple([t.shape for t in tensors]), geometry, last, x.dtype, x.device
        given = (x, *tensors, bias, residual)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        process = torch.get_num_threads(), _backends.interpreting()
        chosen = _chosen(*sizes, *process, "training" if trains else "forward")
        return None if chosen in kernels else by_library(chosen, call)

    EAGER[name], BY_LIBRARY[name] = eager, by_library

    def fake(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, _, _, stride, padding, dilation, _, _ = arguments
        return empty(x, _out_shape(name, x, tensors, (stride, padding, dilation)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, bias, residual, stride, padding, dilation, activation, backend = inputs
        ctx.options = (tuple(stride), tuple(padding), tuple(dilation)), activation, backend
        ctx.save_for_backward(
            *tensors,
            bias if activation == "silu" else None,
            residual if activation == "silu" else None,
            output if activation == "relu" else None,
        )

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (*tensors, bias, residual, output), (geometry, activation, backend) = ctx.saved_tensors, ctx.options
        before = None
        if activation == "silu":
            before = getattr(torch.ops.fastrank, name)(*tensors, bias, residual, *geometry, "none", backend)
        grad = epilogue_backward(grad, before, output, activation)
        x, *values = tensors
        needs = list(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # a second differentiation goes through operators whose derivatives torch knows
            library = "dense" if backend == "dense" else "sequence"
            grads = list(differentiate(grad, x, values, geometry, needs[:count], library))
        else:
            found = iter(differentiate_now(grad, x, *values, *geometry, needs[:count], backend))
            grads = [next(found) if need else None for need in needs[:count]]
        return (
            *grads,
            grad.sum((0, 2, 3)) if needs[count] else None,
            grad if needs[count + 1] else None,
            None, None, None, None, None,
        )  # fmt: skip

    def differentiate(
        grad: Tensor, x: Tensor, values: Sequence[Tensor], geometry: Geometry, needs: Sequence[bool], chosen: str
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (x, *values), None where not needed, by differentiable operators unless `chosen` is a kernel."""
        if chosen in kernels and grad.numel():
            return kernels[chosen].backward(grad, x, values, geometry, needs)
        if chosen != "dense":
            take = libraries[chosen].backward if chosen in libraries else backward
            return take(grad, x, *values, *geometry, needs)
        weight = merge(*values)
        need_weight = any(needs[1:])
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, False, (0, 0), 1, (needs[0], need_weight, False)
        )
        factors_too = merge_backward(grad_weight, *values) if need_weight else (None,) * len(values)
        return (grad_x, *(g if need else None for g, need in zip(factors_too, needs[1:], strict=True)))

    def backward_now(grad: Tensor, *arguments: Any) -> list[Tensor]:
        x, *values, stride, padding, dilation, needs, backend = arguments
        geometry = (tuple(stride), tuple(padding), tuple(dilation))
        chosen = _backends.choose(_facts(name, x, values, geometry, "gradient"), backend)
        found = differentiate(grad, x, values, geometry, needs, chosen)
        wanted = zip(found, (x, *values), needs, strict=True)
        return [like(g, t) for g, t, need in wanted if need and g is not None]

    def backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
        *tensors, _, _, _, needs, _ = arguments
        return [empty(t, t.shape) for t, need in zip(tensors, needs, strict=True) if need]

    tensors = ", ".join(f"Tensor {factor}" for factor in factors)
    schema = f"{name}(Tensor x, {tensors}, Tensor? bias, Tensor? residual, "
    schema += "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str activation, str backend) -> Tensor"
    _register.register(schema, forward, fake=fake, setup_context=setup_context, backward=gradients)
    schema = f"{name}_backward(Tensor grad, Tensor x, {tensors}, "
    schema += f"SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[{count}] needs, str backend) -> Tensor[]"
    _register.register(schema, backward_now, fake=backward_fake)
    differentiate_now = getattr(torch.ops.fastrank, f"{name}_backward")

    @_register.flop_formula(getattr(torch.ops.fastrank, name))
    def flops(x: Shape, *shapes: Any, out_shape: Shape, **_: object) -> int:
        """Two floating-point operations a multiply-add, of the stages as `sequence` runs them."""
        return 2 * x[0] * sum(macs(*shapes[: len(factors)], x[2:], out_shape[2:]))

    @_register.flop_formula(differentiate_now)
    def backward_flops(_: Shape, x: Shape, *arguments: Any, out_shape: Any, **__: object) -> int:
        """The same of the gradients that are needed, and of the two maps that are computed again."""
        *shapes, stride, padding, dilation, needs, _ = arguments
        size = out_size((x[2], x[3]), SIZES[name](*shapes).kernel, (stride, padding, dilation))
        costs = list(macs(*shapes, x[2:], size))
        total = sum(costs[:-1])  # the maps between
        for i, cost in enumerate(costs):
            below = any(needs[: i + 1])  # whether this stage passes a gradient on
            total += (below + needs[i + 1]) * cost
        return int(2 * x[0] * total)
