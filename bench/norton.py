"""NORTON's networks, measured: images a second of every row of its README, and of its detector.

    python bench/norton.py [--out FILE] [--seconds 6] [--threads 2] [--only resnet_50,...] [--image 800]

A row is a network with the rank and the rates of a recipe (recipes/norton_*.yaml). Its contenders:

    dense         the network as published                  dense fused   `fastrank.fuse_for_inference` of it
    four ops      NORTON's block: three plain convolutions and the sum over the rank (`to_sequential`)
    auto          the layers as `fastrank` runs them        fused         `fastrank.fuse_for_inference` of that
    fused triton, fused cuda   the same by that kernel alone, where there is one

The compressed network is `models.build(name, rank=, compress_rate=)`, which is what `methods.norton.compress` returns.
Weights are random, since speed does not depend on them, with normalisation statistics of a batch of made-up images.
Before anything is timed, every contender must agree with its network in float64. Contenders run in turns, every round
in another order. On a GPU: bfloat16, channels_last, eager, in CUDA graphs of two inputs, and (--compiled) as
torch.compile makes them. On a CPU: float32, eager. The detector is Faster R-CNN in float32, one image at a time, as a
whole and its ResNet-50 alone: its proposals are its anchors and its classes are all alike, so that no contender's heads
get other work.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import gpu
import torch
from torch import Tensor, nn

from fastrank import _backends, complexity, models, recipe, tune
from fastrank.benchmarks import networks as forms
from fastrank.benchmarks import timing
from fastrank.benchmarks.networks import alive, apart, tensors

ROOT = Path(__file__).resolve().parents[1]
GPU = timing.DEVICE == "cuda"
OP = "cp_conv2d"
KERNELS = ("triton", "cuda")
NAMES = {"vgg_16_bn": "vgg16", "resnet_56": "resnet56", "resnet_50": "resnet50"}  # as recipes call them
# Counted to the digit by the README or its code, and measured first.
EXACT = {
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12"),
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7"),
    ("vgg_16_bn", 2, None),
    ("vgg_16_bn", 8, "[0.21]*7+[0.75]*5"),
    ("resnet_56", 1, "[0.]+[0.18]*29"),
    ("resnet_56", 7, "[0.]+[0.18]*29"),
}
BACKBONE = (1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12")  # of the detector: 0.92 G
DETECTOR = "fasterrcnn"
PLAIN = ("dense", "four ops")
COMPILED = ("dense", "dense fused", "four ops", "auto", "fused")
LEAST_ROUNDS, MOST_ROUNDS = 5, 60
GRAPH_US = 4000.0
GPU_BATCHES = (32, 1, 128)
EXAMPLES = 16

Network = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """A row of the README's tables: a network of the zoo, its rank and rates, and what was published of it."""

    network: str
    rank: int
    rates: str | None
    source: str = ""

    @property
    def exact(self) -> bool:
        return (self.network, self.rank, self.rates) in EXACT

    @property
    def size(self) -> int:
        return models.default_input_size(self.network)[1]

    def build(self, compressed: bool) -> nn.Module:
        """The network, dense or compressed, on the default device."""
        if not compressed:
            return models.build(self.network)
        return models.build(self.network, rank=self.rank, compress_rate=self.rates)

    @cache  # noqa: B019 - of some twenty rows
    def costs(self) -> tuple[complexity.Complexity, complexity.Complexity]:
        """(dense, compressed), as the README counts."""
        with torch.device("meta"):
            dense, small = (self.build(compressed) for compressed in (False, True))
        return count(dense, self.size), count(small, self.size)


def count(model: nn.Module, size: int) -> complexity.Complexity:
    """As the README counts, of an image of size × size pixels."""
    return complexity.count(model, size, convention="ptflops")


@cache
def rows() -> list[Row]:
    """Those of the recipes, the ones counted to the digit first."""
    found = []
    for name, short in NAMES.items():
        for path in sorted((ROOT / "recipes").glob(f"norton_{short}_*.yaml")):
            each = recipe.load(path)
            assert each.compress is not None
            assert each.model["name"] == name
            source = each.experiment["source"].removeprefix("NORTON README, ")
            found.append(Row(name, each.compress["rank"], each.compress.get("compress_rate"), source))
    return sorted(found, key=lambda row: not row.exact)


def contenders(dense: nn.Module, small: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """All of them, of two networks in float32 on the CPU; `example` proves the fused ones."""
    # Elsewhere kernels only run in an interpreter.
    kernels = [name for name in KERNELS if name in _backends.BACKENDS[OP]] if GPU else []
    found = forms.forms(dense, small, example, kernels)
    return {"four ops" if name == "sequence" else name: network for name, network in found.items()}


def wrong(
    calls: Mapping[str, Network], plain: Mapping[str, nn.Module], x: Tensor
) -> tuple[dict[str, str], dict[str, str]]:
    """(contenders whose output is wrong, kernels that refuse the input), each with the reason.

    plain: "dense" and "four ops" as networks; in float64, on the first and the last image, they are the truth of the
    contenders whose names begin with "dense" and of the others. How much a contender may be off says
    `fastrank.benchmarks.networks.truth`.
    """
    bad: dict[str, str] = {}
    refused: dict[str, str] = {}
    ends = forms.ends(x)
    for kind, network in plain.items():
        truth, bound = forms.truth(network, x)
        for name in [each for each in calls if each.startswith("dense") == (kind == "dense")]:
            try:
                error = apart([each[ends] for each in tensors(calls[name](x))], truth)
            except (RuntimeError, ValueError) as problem:
                by_kernel = name.removeprefix("fused ") in KERNELS
                (refused if by_kernel else bad)[name] = str(problem).partition("\n")[0]
                continue
            if not (error <= bound < math.inf):
                bad[name] = f"it is off by {error:.1e}, where {bound:.1e} is allowed"
    return bad, refused


def eager(calls: Mapping[str, timing.Thunk], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each call, in turns for about so many seconds, every round in another order."""
    return timing.for_seconds(calls, seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS, least_us=0.0)


def timed(networks: Mapping[str, Network], x: Any, seconds: float, graphs: bool) -> dict[str, dict[str, Any]]:
    """Quantiles by way: "eager" wall time, and "graph" where asked (a CUDA graph of calls on two inputs)."""
    calls = {name: partial(network, x) for name, network in networks.items()}
    found = {"eager": {name: timing.Quantiles.of(us).as_dict() for name, us in eager(calls, seconds).items()}}
    if graphs:
        both = {name: [partial(network, one) for one in (x, torch.randn_like(x))] for name, network in networks.items()}
        quantiles = timing.long_graph_times(both, least_us=GRAPH_US, repeats=12)
        found["graph"] = {name: each.as_dict() for name, each in quantiles.items()}
    return found


def settings(x: Tensor) -> dict[str, Any]:
    last, dtype = x.is_contiguous(memory_format=torch.channels_last), str(x.dtype).removeprefix("torch.")
    return {"batch": x.shape[0], "size": x.shape[-1], "dtype": dtype, "channels_last": last}


def images(batch: int, size: int, *, exact: bool = False, channels_last: bool = GPU) -> Tensor:
    """`fastrank.benchmarks.networks.images` where and as contenders want them; float32 where exact is set."""
    dtype = torch.bfloat16 if GPU and not exact else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = forms.images(batch, size)
    return x.to(timing.DEVICE, dtype, memory_format=layout)


class Prepared:
    """The contenders of a row, ready to be measured at any batch."""

    def __init__(self, row: Row, size: int | None = None) -> None:
        self.row, self.size = row, size or row.size
        torch.manual_seed(0)
        x = images(EXAMPLES, min(self.size, 64), exact=True).cpu()
        dense, small = (alive(row.build(compressed), x) for compressed in (False, True))
        self.networks = contenders(dense, small, x[:1])
        self.facts: dict[str, Any] = {"network": row.network, "rank": row.rank, "compress_rate": row.rates}
        self.facts |= {"source": row.source, **counted(*row.costs())}

    @torch.no_grad()
    def measure(
        self, batch: int, seconds: float, *, compiled: bool = False, channels_last: bool = GPU
    ) -> dict[str, Any]:
        """A JSON-able record: the row, its counts, times by way and contender, and who was left out and why."""
        x = images(batch, self.size, channels_last=channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        networks = {name: each.to(x.device, x.dtype, memory_format=layout) for name, each in self.networks.items()}
        calls: dict[str, Network] = dict(networks)
        if compiled:
            torch.compiler.reset()
            calls = {name: torch.compile(networks[name], dynamic=False) for name in COMPILED}
        bad, refused = wrong(calls, {name: networks[name] for name in PLAIN}, x)
        ready = {name: call for name, call in calls.items() if name not in bad | refused}
        times = timed(ready, x, seconds, GPU) if ready else {}
        kernels = {"op": OP} if any(name.removeprefix("fused ") in KERNELS for name in ready) else {}
        how = {"compiled": compiled, "times": times, "wrong": bad, "left_out": refused}
        return {**self.facts, **settings(x), **kernels, **how}


def counted(dense: complexity.Complexity, small: complexity.Complexity) -> dict[str, Any]:
    """Multiply-adds and parameters as the README counts them, and how many times fewer multiply-adds."""
    counts = {"dense_macs": dense.macs, "macs": small.macs, "dense_params": dense.params, "params": small.params}
    return {**counts, "fewer_macs": dense.macs / small.macs}


def with_body(detector: Any, body: nn.Module) -> nn.Module:
    """The detector over another ResNet; all else is shared."""
    parts = detector.transform, detector.backbone.fpn, detector.rpn, detector.roi_heads
    # deepcopy takes what the memo has for a module.
    memo = {id(part): part for part in parts} | {id(detector.backbone.body): body}
    return copy.deepcopy(detector, memo)


def detectors(image: int) -> tuple[Any, Any]:
    """Faster R-CNN (dense, compressed) for square images, whose stages behind the pyramid are the same modules.

    Box regression and classes are blank. So the proposals are anchors, by a random objectness; as many as the RPN lets
    through at most go to the head; and no class is likely enough to be reported.
    """
    torch.manual_seed(0)
    rank, rates = BACKBONE
    sizes = {"min_size": image, "max_size": image}
    dense: Any = models.build(DETECTOR, **sizes).requires_grad_(False).eval()
    small: Any = models.build(DETECTOR, rank=rank, compress_rate=rates, **sizes).requires_grad_(False).eval()
    for each in (dense, small):
        alive(each.backbone.body, images(EXAMPLES, 64, exact=True).cpu())
    for blank in (dense.rpn.head.bbox_pred, dense.roi_heads.box_predictor.cls_score):
        nn.init.zeros_(blank.weight)
        nn.init.zeros_(blank.bias)
    small.rpn, small.roi_heads = dense.rpn, dense.roi_heads
    return dense, small


def proposals(detector: Any, frame: Tensor) -> tuple[int, int]:
    """(proposals that reach the box head, detections) of one frame."""
    seen: list[int] = []
    handle = detector.roi_heads.box_head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    (found,) = detector([frame])
    handle.remove()
    return seen[0], len(found["boxes"])


@torch.no_grad()
def detection(image: int, seconds: float, *, part: str, channels_last: bool = GPU) -> dict[str, Any]:
    """The record of a part, "backbone" (the ResNet alone) or "detector", on one frame of image × image pixels."""
    dense, small = detectors(image)
    x = images(1, image, exact=True, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    bodies = dense.backbone.body, small.backbone.body
    costs = [count(each, image) for each in (bodies if part == "backbone" else (dense, small))]
    facts = {"network": DETECTOR, "part": part, "rank": BACKBONE[0], "compress_rate": BACKBONE[1]}
    networks = contenders(*bodies, images(1, 64, exact=True).cpu())
    networks = {name: each.to(x.device, memory_format=layout) for name, each in networks.items()}
    bad, refused = wrong(networks, {name: networks[name] for name in PLAIN}, x)
    ready: dict[str, Network] = {name: each for name, each in networks.items() if name not in bad | refused}
    if part == "detector":
        hosts = {name: (dense if name.startswith("dense") else small).to(x.device) for name in ready}
        ready = {name: with_body(hosts[name], networks[name]).to(memory_format=layout) for name in ready}
        wanted = dense.rpn.post_nms_top_n(), 0
        facts["proposals"] = wanted[0]
        found = {name: proposals(each, x[0]) for name, each in ready.items()}
        told = "it has {} proposals and {} detections, not {} and {}"
        bad |= {name: told.format(*got, *wanted) for name, got in found.items() if got != wanted}
    ready = {name: each for name, each in ready.items() if name not in bad}
    given, graphs = (x, GPU) if part == "backbone" else ([x[0]], False)
    times = timed(ready, given, seconds, graphs) if ready else {}
    return {**facts, **settings(x), **counted(*costs), "times": times, "wrong": bad, "left_out": refused}


def batches(row: Row) -> tuple[int, ...]:
    """The batch sizes of a row."""
    if GPU:
        return GPU_BATCHES
    return (1, 4) if row.network == "resnet_50" else (1, 16)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every record that was asked for, as it is measured."""
    wanted = options.only.split(",") if options.only else [*NAMES, DETECTOR]
    for row in rows():
        if row.network in wanted:
            prepared = Prepared(row)
            for batch, compiled in [(each, way) for way in ((False, True) if options.compiled else (False,))
                                    for each in batches(row)]:  # fmt: skip
                yield prepared.measure(batch, options.seconds, compiled=compiled, channels_last=options.channels_last)
    if DETECTOR in wanted:
        for part in ("backbone", "detector"):
            yield detection(options.image, 4 * options.seconds, part=part, channels_last=options.channels_last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the records, as JSON, written anew after each")
    parser.add_argument("--seconds", type=float, default=6.0, help="for a network at a batch; detector: 4×")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help=f"some of {','.join((*NAMES, DETECTOR))}")
    parser.add_argument("--image", type=int, default=800, help="side of the detector's image, from 320")
    parser.add_argument("--channels-last", action="store_true", default=GPU)
    parser.add_argument("--compiled", action="store_true", help="torch.compile's networks too (minutes each)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for record in run(options):
        found.append(record)
        us = {name: round(each["p50_us"]) for name, each in record["times"].get("eager", {}).items()}
        what = record["network"], record["rank"], record["compress_rate"], record.get("part", ""), record["batch"]
        print(*what, f"{record['fewer_macs']:.2f}×", us, record["wrong"] or "", flush=True)
        if options.out:
            gpu.write(options.out, {"environment": timing.environment() | tune.environment(), "rows": found})
    return int(any(record["wrong"] for record in found))


if __name__ == "__main__":
    sys.exit(main())
