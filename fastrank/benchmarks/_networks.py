"""The family "networks": ResNet-18 by Tucker-2 and NORTON's ResNet-56 by CP filters, dense, compressed and fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrank import _backends, complexity, convert, models
from fastrank.benchmarks import networks
from fastrank.benchmarks._peers import WAYS, cannot_compile, compiled_call, missing
from fastrank.benchmarks._registry import KERNELS, Case, Contender, Judge, Thunk, Work, refusals

EXAMPLES = 16
COMPILED = ("dense", "sequence")


class Spec(NamedTuple):
    """A network, what its layers become, and the side of its images."""

    name: str
    op: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    size: int
    needs: str = ""


class Problem(NamedTuple):
    """The networks by contender, in the dtype and layout of a device, and a batch of images."""

    networks: dict[str, nn.Module]
    x: Tensor

    def tensors(self) -> list[Tensor]:
        """What a forward pass reads."""
        return [self.x, *self.networks["sequence"].parameters()]

    def copied(self) -> Problem:
        """The same networks on a batch in other memory."""
        return Problem(self.networks, self.x.clone())


def resnet18() -> tuple[nn.Module, nn.Module]:
    """torchvision's ResNet-18, dense and at the ranks of `layers.RESNET18`."""
    dense: nn.Module = import_module("torchvision").models.resnet18()
    return dense, convert.compress(dense, networks.resnet18_plan(dense))


def zoo(name: str, rank: int, rates: str | None) -> tuple[nn.Module, nn.Module]:
    """A network of the zoo, dense and as NORTON compresses it."""
    return models.build(name), models.build(name, rank=rank, compress_rate=rates)


def cases(device: str) -> list[Case]:
    """Rows for a device; on a CPU small images, and nothing is compiled, which takes it minutes."""
    gpu = device == "cuda"
    deep = Spec("ResNet-56, R=1", "cp_conv2d", partial(zoo, "resnet_56", 1, "[0.]+[0.18]*29"), 32)
    wide = Spec("ResNet-18", "tucker2_conv2d", resnet18, 224 if gpu else 64, "torchvision")
    return [case(spec, batch, device) for spec in (wide, deep) for batch in ((32, 1, 128) if gpu else (1, 8))]


def case(spec: Spec, batch: int, device: str) -> Case:
    """A network on a batch of images."""
    gpu, gone = device == "cuda", missing(spec.needs) if spec.needs else ""
    dtype = torch.bfloat16 if gpu else torch.float32
    refused = refusals(spec.op, device, dtype)
    kernels = [name for name in KERNELS if name in _backends.BACKENDS[spec.op]]
    found = [
        Contender("auto", partial(_call, "auto"), refusal=gone),
        Contender("fused", partial(_call, "fused"), refusal=gone),
        Contender("dense fused", partial(_call, "dense fused"), refusal=gone),
        *(
            Contender(f"fused {name}", partial(_call, f"fused {name}"), refusal=refused.get(name, "") or gone,
                      may_refuse=True)
            for name in kernels
        ),
        Contender("dense", partial(_call, "dense"), "dense", gone),
        Contender("sequence", partial(_call, "sequence"), "sequence", gone),
    ]  # fmt: skip
    if gpu:
        without = gone or cannot_compile()
        found += [Contender(f"{name} compiled", partial(_compiled, name), "compile", without) for name in COMPILED]
    if spec.op == "tucker2_conv2d":
        without = gone or missing("tltorch")
        found += [Contender(f"tltorch {way}", partial(_call, f"tltorch {way}"), "tltorch", without) for way in WAYS]
    found = [_judged(each) if each.name.startswith("dense") else each for each in found]
    return Case(
        family="networks",
        operation=spec.name,
        name=f"{spec.size}x{spec.size}, N={batch}",
        dtype=dtype,
        device=device,
        make=partial(_make, spec, batch, device, gone),
        judge=partial(_judge, "sequence"),
        contenders=found,
        baselines=("dense", "sequence"),
        sizes={"batch": batch, "size": spec.size},
        copied=Problem.copied,
        tensors=Problem.tensors,
        work=None if gone else partial(_work, spec),
    )


def _judged(each: Contender) -> Contender:
    """The contender, judged by the dense network, which is another function."""
    return Contender(each.name, each.build, each.peer, each.refusal, each.may_refuse, partial(_judge, "dense"))


@cache
def _forms(spec: Spec, device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    x = networks.images(EXAMPLES, min(spec.size, 64))
    dense, small = (networks.alive(each, x) for each in spec.build())
    kernels = [name for name in KERNELS if name in _backends.BACKENDS[spec.op]] if device == "cuda" else []
    found = networks.forms(dense, small, x[:1], kernels)
    gpu = device == "cuda"
    dtype, layout = (torch.bfloat16, torch.channels_last) if gpu else (torch.float32, torch.contiguous_format)
    ready = {name: each.to(device, dtype, memory_format=layout).eval() for name, each in found.items()}  # type: ignore[call-overload]
    for each in ready.values():
        each.requires_grad_(False)
    return ready


@cache
def _counts(spec: Spec, device: str) -> tuple[int, int, int]:
    """(multiply-adds of an image, the same dense, parameters)."""
    ready = _forms(spec, device)
    small, dense = (complexity.count(ready[name], (3, spec.size, spec.size)) for name in ("auto", "dense"))
    return small.macs, dense.macs, small.params


def _work(spec: Spec, p: Problem) -> Work:
    batch = len(p.x)
    macs, dense_macs, weights = _counts(spec, p.x.device.type)
    moved = p.x.element_size() * (weights + p.x.numel())
    return Work(2.0 * batch * macs, float(moved), batch * macs, batch * dense_macs)


def _make(spec: Spec, batch: int, device: str, gone: str) -> Problem | None:
    if gone:
        return None
    ready = _forms(spec, device)
    like = next(ready["dense"].parameters())
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    return Problem(ready, networks.images(batch, spec.size).to(device, like.dtype, memory_format=layout))


def _call(name: str, p: Problem) -> Thunk:
    return partial(p.networks[name], p.x)


def _compiled(name: str, p: Problem) -> Thunk:
    return compiled_call(p.networks[name], p.x, tuned=False)


def _judge(name: str, p: Problem | None) -> Judge:
    """By the float64 form of a network."""
    if p is None:
        return lambda outputs: (0.0, 0.0)
    with torch.no_grad():
        wanted, limit = networks.truth(p.networks[name], p.x)
    rows = networks.ends(p.x)

    def judge(outputs: Any) -> tuple[float, float]:
        return networks.apart([each[rows] for each in networks.tensors(outputs)], wanted), limit

    return judge
