"""bench: what each backend of the compressed layers takes here, and how `auto` is taught to choose among them."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fastrank import report, tune
from fastrank.cli import _bench_families
from fastrank.cli._common import Input, Json, app, blank, network_of, out, print_json, size_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STANDARD = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg16")
# Layers whose CP forms are standard too (NORTON's networks of 32² pixels, and one of 224²), and the ranks of these.
STANDARD_CP, CP_RANKS = ("vgg_16_bn", "resnet_56", "torchvision:resnet18"), (1, 2, 4, 8)
# A dense convolution of more takes a second on a core: there is no doubt which backend wins, and nothing to wait for.
STANDARD_MACS = 3e9
BACKENDS = ("dense", "sequence", "depthwise", "triton", "cuda")


@app.command(
    epilog="Example: fastrank bench small.safetensors --input 3,224,224 --batch 1,8 --tune, "
    "or fastrank bench --family tucker2,cp --compare dense,sequence,tltorch"
)
def bench(
    model: Annotated[str | None, typer.Argument(help="A compressed model; the standard layers by default.")] = None,
    arch: Annotated[str | None, typer.Option(help="A dense architecture, as if compressed; see --share.")] = None,
    input_size: Input = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.", metavar="N,N,...")] = "1,8,32",
    share: Annotated[float, typer.Option(help="Ranks over channels of --arch and of the standard layers.")] = 0.4,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Inputs in channels_last.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda or cuda:N.")] = None,
    do_tune: Annotated[bool, typer.Option("--tune", help="Let auto choose by what is measured from now on.")] = False,
    threads: Annotated[str | None, typer.Option(help="With --tune: CPU threads to measure at.", metavar="N,N")] = None,
    effort: Annotated[float, typer.Option(help="With --tune: a factor to the number of calls measured.")] = 1.0,
    save_to: Annotated[Path | None, typer.Option("--out", help="With --tune: a file instead of your cache.")] = None,
    family: _bench_families.Family = None,
    compare: _bench_families.Compare = None,
    seconds: _bench_families.Seconds = 1.0,
    as_json: Json = False,
) -> None:
    """Time dense, sequence and kernels of every compressed layer on this machine, in turns; or, with --family, the
    benchmarks of whole families of operations against what one would call instead.

    Without a model, --tune measures standard layers in both layouts, as Tucker-2 and as CP, and a cost model of this
    CPU too, by which layers are served that were never measured.
    """
    if family is not None:
        if model is not None or arch is not None or do_tune:
            raise ValueError("--family must stand without a model, --arch and --tune, got one of them")
        raise typer.Exit(_bench_families.show(family, compare, seconds, device, as_json=as_json))
    if compare is not None:
        raise ValueError("--compare must go with --family, got it alone")
    if model is not None and arch is not None:
        raise ValueError("a model or --arch must be given, and not both, got both")
    if not do_tune and (save_to is not None or threads is not None):
        raise ValueError("--out and --threads must go with --tune, got one without it")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {list(DTYPES)}, got {dtype!r}")
    batches, place = _numbers("--batch", batch), torch.device(device or "cpu")
    counts = _numbers("--threads", threads) if threads else [torch.get_num_threads()]
    table = tune.empty_table(place) if save_to is not None else tune.table_of(place)
    a_cpu = do_tune and model is None and arch is None and place.type == "cpu"  # as a whole
    layouts = (False, True) if a_cpu else (channels_last,)
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for count in counts if place.type == "cpu" else [before]:
            torch.set_num_threads(count)
            for layout in layouts:
                found = _cases(model, arch, input_size, batches, share, DTYPES[dtype], layout, place)
                found += _cp_cases(input_size, batches, DTYPES[dtype], layout) if a_cpu else []
                for case, timing in tune.add_rows(table, found, place):
                    rows.append(_row(case, place, timing))
    finally:
        torch.set_num_threads(before)
    fits: list[dict[str, Any]] = []
    if a_cpu:
        for setup in tune.setups(counts):
            regret = tune.calibrate(table, setup, effort=effort)
            label = f"{str(setup.dtype).removeprefix('torch.')}, {'NHWC' if setup.channels_last else 'NCHW'}"
            fits.append({"setup": f"{label}, {setup.threads} threads", **asdict(regret)})
            if not as_json:
                out.print(f"{fits[-1]['setup']}: chosen over best {regret.p95:.3f} at p95 of {regret.layers} layers")
    path = tune.save(table, save_to) if do_tune else None
    busy = sum(row["spread"] > tune.BUSY for row in rows)
    if as_json:
        print_json({"environment": tune.environment(place), "layers": rows, "models": fits, "out": path})
        return
    _show(rows, tune.environment(place))
    if busy:
        out.print(f"{busy} of {len(rows)} layers varied by more than {tune.BUSY:.0%}: the machine was not quiet")
    if path is not None:
        out.print(f"Written to {path}; auto goes by it from now on" if save_to is None else f"Written to {path}")


def explain_layers(network: nn.Module, size: tuple[int, int, int], batch: int) -> list[dict[str, Any]]:
    """One JSON-able row a compressed layer: the chosen backend, what is known of each and whence, what cannot run."""
    x = blank(network, size)
    return [
        _explained(tune.explain(case, x.device))
        for case in tune.cases(network, x.expand(batch, -1, -1, -1).contiguous())
    ]


def show_explained(rows: list[dict[str, Any]], title: str) -> None:
    """`explain_layers` as a table, and below it why kernels cannot run."""
    cells = [
        [row["layer"], row["backend"], row["source"], row["work"], *(_us(row["us"].get(name)) for name in BACKENDS)]
        for row in rows
    ]
    columns = ["layer", "chosen", "known from", "work", *(f"{name} µs" for name in BACKENDS)]
    out.print(report.table(columns, cells, title=title, left=4))
    for name, reason in sorted({(name, reason) for row in rows for name, reason in row["refused"].items()}):
        out.print(f"{name}: {reason}")


def _explained(found: tune.Explanation) -> dict[str, Any]:
    return {
        "layer": found.case.name,
        "op": found.case.op,
        "work": _work(found.case),
        "backend": found.backend,
        "source": found.source,
        "us": found.us,
        "refused": found.refused,
    }


def _cases(
    model: str | None,
    arch: str | None,
    input_size: str | None,
    batches: list[int],
    share: float,
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device,
) -> list[tune.Case]:
    found: list[tune.Case] = []
    limit = float("inf") if model or arch else STANDARD_MACS
    for name in (model or arch,) if model or arch else STANDARD:
        network = network_of(str(name)).to(dtype).eval()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = blank(network, size_of(input_size, network))
        for batch in batches:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            x = image.expand(batch, -1, -1, -1).contiguous(memory_format=layout)
            if model is None:
                some = tune.cases_as_if(network, x, share, channels_last=channels_last, largest=limit)
                known = {(case.op, case.work) for case in found}
                found += [case for case in some if (case.op, case.work) not in known]
            else:
                found += tune.cases(network.to(device), x.to(device))
    return found


def _cp_cases(input_size: str | None, batches: list[int], dtype: torch.dtype, channels_last: bool) -> list[tune.Case]:
    """The standard layers as CP filters, on a CPU."""
    found: dict[Any, tune.Case] = {}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for name in STANDARD_CP:
        network = network_of(name).to(dtype).eval()
        image = blank(network, size_of(input_size, network))
        for rank, batch in itertools.product(CP_RANKS, batches):
            x = image.expand(batch, -1, -1, -1).contiguous(memory_format=layout)
            options: dict[str, Any] = {"channels_last": channels_last, "largest": STANDARD_MACS / 2}
            found |= {case.work: case for case in tune.cases_as_if(network, x, 1.0, cp_rank=rank, **options)}
    return list(found.values())


def _row(case: tune.Case, device: torch.device, timing: tune.Timing) -> dict[str, Any]:
    fastest = min(timing.us, key=lambda name: timing.us[name])
    return {
        "layer": case.name,
        "op": case.op,
        "work": _work(case),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "us": timing.us,
        "spread": timing.spread,
        "fastest": fastest,
        "auto_before": tune.explain(case, device).backend,
    }


def _show(rows: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    names = [name for name in BACKENDS if any(name in row["us"] for row in rows)]
    cells = [
        [row["layer"], row["work"], row["threads"], *(_us(row["us"].get(name)) for name in names), row["fastest"]]
        for row in rows
    ]
    title = f"Microseconds a call, medians; {environment['device']}, torch {environment['torch']}"
    columns = ["layer", "N×I×H×W -> O, ranks", "threads", *names, "fastest"]
    out.print(report.table(columns, cells, title=title, left=2))


def _work(case: tune.Case) -> str:
    work = case.work
    shape = report.by((work.batch, work.in_channels, *work.size))
    return f"{shape} -> {work.out_channels}, {report.ranks_text(work.ranks)}"


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be whole numbers above 0 joined by commas, got {text!r}")
    return [int(part) for part in parts]
