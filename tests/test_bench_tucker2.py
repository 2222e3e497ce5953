"""The benchmarks of the Tucker-2 convolution, dry: contenders, floors and bytes are right, graphs made to measure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from bench_modules import BENCH, FakeBenchmark, load

from fastrank import _backends, _native
from fastrank.nn import FusedTucker2Conv
from fastrank.ops import _tucker2_kernels

needs_host = pytest.mark.skipif(bool(_native.why_missing("_host")), reason=_native.why_missing("_host") or "built")
pytestmark = pytest.mark.usefixtures("poison")
H200 = (True, 132, 227 * 1024)


@pytest.fixture
def bench() -> Any:
    return load("test_tucker2")


def tiny(bench: Any, *, epilogue: bool, dtype: torch.dtype = torch.float16, stride: int = 1, channels: int = 16) -> Any:
    layer = bench.Layer("tiny", channels, 16, stride, 6, (5, 9), {"ResNet-18": 1})
    return bench.contenders.problem(
        layer, 2, epilogue=epilogue, dtype=dtype, device="cpu", memory_format=torch.channels_last
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@needs_host
@pytest.mark.parametrize("name", ["dense", "sequence", "padded", "cuda", "triton", "auto", "compiled"])
@pytest.mark.parametrize("epilogue", [False, True])
@pytest.mark.parametrize(("stride", "channels"), [(1, 16), (2, 8)])
def test_contenders_compute_the_layer(bench, name, epilogue, stride, channels, monkeypatch) -> None:
    contenders = bench.contenders
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    p = tiny(bench, epilogue=epilogue, stride=stride, channels=channels)
    assert (p.residual is not None) is (epilogue and stride == 1)
    before = [t.clone() for t in p.tensors()]
    build = contenders.compiled() if name == "compiled" else contenders.CONTENDERS[name]
    with torch.no_grad():
        call, wanted = build(p), bench.reference_output(p)
        for _ in range(2):  # what a call leaves does not change the next
            found = call()
            # Two maps, the merged kernel and the epilogue are rounded, each by half of eps of some times its size.
            assert error(found, wanted) <= 8 * torch.finfo(torch.float16).eps
        assert found.is_contiguous(memory_format=torch.channels_last)
        again = build(p.copied())
        assert torch.equal(again(), found)
    assert all(torch.equal(a, b) for a, b in zip(before, p.tensors(), strict=True))
    assert not epilogue or float(found.min()) >= 0


@needs_host
@pytest.mark.parametrize("name", ["host", "triton", "auto"])
def test_trained_contenders_give_the_gradients_of_three_convolutions(bench, name) -> None:
    p = tiny(bench, epilogue=False)
    wanted = bench.contenders.training("sequence")(p.wide())()
    found = bench.contenders.training(name)(p)()
    assert len(found) == len(wanted) == 4
    assert all(error(a, b) <= 16 * torch.finfo(torch.float16).eps for a, b in zip(found, wanted, strict=True))


def test_every_kernel_is_compiled_by_some_process(bench, monkeypatch) -> None:
    """Shares cover all cases once, and run what the benchmarks run."""
    warm, ran = load("tucker2_warm"), []
    small = bench.Layer("tiny", 16, 16, 1, 6, (5, 9), {})
    monkeypatch.setattr(warm, "RESNET18", (small, small))
    monkeypatch.setattr(warm.contenders, "refusals", lambda p, call: {})
    for kind in ("triton", "training"):
        real = getattr(warm.contenders, kind)
        monkeypatch.setattr(warm.contenders, kind, lambda *a, kind=kind, real=real: ran.append(kind) or real(*a))
    monkeypatch.setattr(warm, "FORWARD_BATCHES", (1, 2))
    monkeypatch.setattr(warm, "TRAINED_BATCHES", (2,))
    assert [warm.share(index, 3, "cpu", torch.float16) for index in range(3)] == [2, 1, 1]
    assert (ran.count("triton"), ran.count("training")) == (8, 2)
    commands: list[list[str]] = []

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert env["PYTHONPATH"]
            commands.append(command[1:])

        def wait(self, seconds: float = 0.0) -> None:
            if seconds:
                raise subprocess.TimeoutExpired("", seconds)

        def kill(self) -> None:
            commands.append(["killed"])

    monkeypatch.setattr(warm.subprocess, "Popen", Child)
    monkeypatch.setattr(warm.os, "cpu_count", lambda: 2)
    warm.warm()
    script = str(BENCH / "tucker2_warm.py")
    assert commands == [[script, "0", "2"], [script, "1", "2"], ["killed"], ["killed"]]


def test_saved_bytes_are_those_of_the_maps(bench) -> None:
    p, kept = tiny(bench, epilogue=False, dtype=torch.float32), {}
    for name in ("sequence", "auto", "dense"):
        leaves, forward = bench.contenders.trained(name, p)
        kept[name] = bench.contenders.saved_bytes(forward, leaves[1:])
    pixels = 2 * 6 * 6 * 4
    maps = pixels * (16 + 5 + 9)
    assert kept == {"sequence": maps, "auto": maps, "dense": pixels * 16}  # the last is the operator's


def test_what_is_wrong_is_told_and_not_timed(bench) -> None:
    p, right = tiny(bench, epilogue=False), torch.ones(4, dtype=torch.float64)

    def gives(*outs: torch.Tensor) -> Any:
        return lambda p: lambda: outs

    def breaks(p: Any) -> Any:
        raise RuntimeError("no room\nmore of it")

    builders = {"dense": gives(right, right + 1e-3), "sequence": gives(right, right)}
    library = ["dense", "sequence"]
    assert bench.wrong(builders | {"cuda": gives(right, right + 1.9e-3)}, p, [right, right], library) == {}
    for off, said in ((right + 2.1e-3, "2.10e-03"), (right * torch.nan, "nan")):
        found = bench.wrong(builders | {"cuda": gives(right, off), "triton": breaks}, p, [right, right], library)
        assert found == {
            "cuda": f"output 1 is off by {said}, at most 2.00e-03 is right",
            "triton": "RuntimeError: no room",
        }
    # A sum of so many terms may round at every one of them.
    off = gives(right + 1e-5)
    assert "cuda" in bench.wrong({"cuda": off, "sequence": gives(right)}, p, [right], library)
    assert bench.wrong({"cuda": off, "sequence": gives(right)}, p, [right], library, terms=10_000) == {}


def test_a_wrong_contender_fails_the_row_after_the_others_are_timed(bench, monkeypatch) -> None:
    layer, benchmark = bench.Layer("tiny", 4, 4, 1, 3, (2, 3), {}), FakeBenchmark()
    with pytest.raises(AssertionError, match=r"'compiled': 'output 0 is off by "):
        bench.run_forward(
            benchmark,
            layer,
            1,
            {"compiled": lambda p: lambda: bench.contenders.sequence(p)() + 1},
            ["dense", "sequence"],
        )
    assert set(benchmark.extra_info["plain"]["eager"]) == {"dense", "sequence"}


def test_who_cannot_run_is_left_out_with_the_reason(bench, monkeypatch) -> None:
    found = bench.contenders.refusals(tiny(bench, epilogue=False), "inference")
    assert found["triton"] == "Triton's interpreter is no contender"
    assert "not on a CUDA device" in found["cuda"]
    assert "padded" not in found
    monkeypatch.setattr(_backends, "interpreting", lambda: False)
    even = bench.contenders.problem(
        bench.LAYERS["64, 56x56"],
        1,
        epilogue=True,
        dtype=torch.float32,
        device="cpu",
        memory_format=torch.channels_last,
    )
    found = bench.contenders.refusals(even, "inference")
    assert found["padded"] == "the ranks are multiples of 8 as given"
    assert "TRITON_INTERPRET is off" in found["triton"]


def test_the_layers_are_those_of_the_networks(bench) -> None:
    counts: dict[str, int] = {}
    for layer in bench.LAYERS.values():
        made = FusedTucker2Conv(
            layer.in_channels, layer.out_channels, 3, layer.ranks, stride=layer.stride, padding=1, device="meta"
        )
        assert sum(stage.macs for stage in made.conv_stages((layer.size, layer.size))) == layer.macs
        work = layer.work(4, True, "inference")
        assert work.out_size == (layer.out_size, layer.out_size)
        for stack, count in layer.counts.items():
            counts[stack] = counts.get(stack, 0) + count
    assert counts == {"ResNet-18": 16, "ResNet-18, half ranks": 16, "ResNet-50": 16, "VGG-16": 12}
    stack = [(layer.counts["ResNet-18"], layer) for layer in bench.RESNET18]
    # All but the strided ones, which are half of it, have the work of the first.
    dense = sum(n * layer.dense_macs for n, layer in stack)
    assert dense == (13 + 3 / 2) * bench.RESNET18[0].dense_macs
    assert dense / sum(n * layer.macs for n, layer in stack) == pytest.approx(2.63, abs=0.02)  # the goals' model


def test_floors_are_what_takes_longest(bench) -> None:
    layer = bench.LAYERS["64, 56x56"]
    maps, factors = 2 * 128 * 64 * 56**2, 2 * 64 * 32 + 9 * 32**2
    floor = bench.floor_us(layer, 128, 2, False, (790e12, 4.3e12))
    assert floor == pytest.approx(1e6 * 2 * (maps + factors) / 4.3e12)
    assert bench.floor_us(layer, 128, 2, True, (790e12, 4.3e12)) == pytest.approx(1.5 * floor, rel=1e-3)
    assert bench.floor_us(layer, 128, 2, False, (1e12, 4.3e12)) == pytest.approx(2 * 128 * layer.macs / 1e12 * 1e6)


class FakeGraph:
    """Replays calls as they are."""

    def __init__(self, thunks: list[Any], calls: int) -> None:
        self.thunks, self.calls = thunks, calls

    def replay(self) -> None:
        for i in range(self.calls):
            self.thunks[i % len(self.thunks)]()


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def fake_gpu(bench, monkeypatch) -> Iterator[list[FakeGraph]]:
    """Graphs that are none, for the code that makes and times them; the list of those that were made."""
    made: list[FakeGraph] = []

    def capture(thunks: list[Any], calls: int) -> FakeGraph:
        made.append(FakeGraph(thunks, calls))
        return made[-1]

    monkeypatch.setattr(bench.timing, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(bench, "GPU", True)
    monkeypatch.setattr(bench, "GRAPH_US", 1.0)
    monkeypatch.setattr(bench, "peaks", lambda: (790e12, 4.3e12))
    return made


def test_a_row_times_everyone_cold_warm_and_eager(bench, fake_gpu, monkeypatch) -> None:
    monkeypatch.setattr(bench.timing, "copies", lambda size, at_most: 3)
    layer = bench.Layer("tiny", 16, 16, 1, 6, (5, 9), {})
    names = ("dense", "sequence", "padded", "auto")
    found = bench.compare(layer, 2, True, {name: bench.contenders.CONTENDERS[name] for name in names})
    for way in ("eager", "cold_graph", "warm_graph"):
        assert set(found[way]) == set(names)
        assert all(0 < each["p20_us"] <= each["p50_us"] <= each["p80_us"] for each in found[way].values())
    cold, warm = fake_gpu[: len(names)], fake_gpu[len(names) :]
    assert all(len(graph.thunks) == 3 and graph.calls % 3 == 0 for graph in cold)
    assert all(len(graph.thunks) == 1 for graph in warm)
    assert set(found["roofline"]) == set(names)
    assert found["roofline"]["auto"] == pytest.approx(found["floor_us"] / found["cold_graph"]["auto"]["p50_us"])
    assert found["bytes"] == 4 * layer.elements(2, True)


def test_rows_from_end_to_end(bench, fake_gpu, monkeypatch, tmp_path) -> None:
    """What the rows write is what the table of goals reads."""
    goals, modes = load("goals"), []
    layer = bench.Layer("64, tiny", 4, 4, 1, 3, (2, 3), {"ResNet-18": 16})
    monkeypatch.setattr(bench, "LAYERS", {"64, 56x56": layer})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(bench.timing, "host_times", partial(bench.timing.host_times, burst=2, rounds=3))
    rows = []
    for run, group, cases in (
        (bench.test_forward, "tucker2 forward", [(layer, 8), (layer, 32)]),
        (bench.test_training, "tucker2 forward and backward", [(layer, 128)]),
        (bench.test_compiled, "tucker2 compiled", [(layer, 1)]),
        (bench.test_host, "tucker2 host", [()]),
    ):
        for case in cases:
            benchmark = FakeBenchmark()
            run(benchmark, *case)
            assert benchmark.rounds
            assert "not on a CUDA device" in benchmark.extra_info["left_out"]["cuda"]
            rows.append(json.dumps({"name": "row", "group": group, "extra_info": benchmark.extra_info}))
    assert modes == ["error", "default"]  # around the one contender of fastrank that runs here
    (tmp_path / "bench_tucker2.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = {goal.what: goal for goal in goals.table(tmp_path)}
    measured = {what for what, goal in found.items() if goal.met is not None}
    assert measured == {
        "every layer, auto over dense, to 3 % of noise",
        "every layer, auto over the best backend",
        "ResNet-18's stack, auto over dense, N=8",
        "ResNet-18's stack, auto over dense, N=32",
        "auto over torch.compile, N=1, geometric mean",
        "host time of an eager call, auto",
    }
    assert found["ResNet-18's stack, auto over dense, N=8"].roofline is not None


def test_graphs_of_rotating_inputs(bench, fake_gpu) -> None:
    seen: list[int] = []
    x = torch.ones(3, requires_grad=True)
    for cold, addresses in ((True, 2), (False, 1)):
        seen.clear()
        call = {"call": lambda tensors: seen.append(tensors[0].data_ptr())}
        found = bench.timing.graph_times(call, [x], cold=cold, calls=4, repeats=3)
        assert len(set(seen)) == addresses
        assert len(seen) == 4 * (1 + 3)
        assert found["call"].samples == 3
    assert all(copy[0].requires_grad for copy in bench.timing.rotation([x]))


def test_graphs_last_about_as_long_as_asked(bench, fake_gpu) -> None:
    found = bench.timing.long_graph_times({"nap": [lambda: time.sleep(1e-3)] * 2}, least_us=10_000.0, repeats=3)
    (graph,) = fake_gpu
    assert 4 <= graph.calls <= 10
    assert graph.calls % 2 == 0
    assert found["nap"].p50_us >= 1000


def test_time_of_the_host_is_that_of_one_call(bench) -> None:
    calls = {"nap": lambda: time.sleep(1e-4), "nothing": lambda: None}
    found = bench.timing.host_times(calls, burst=8, rounds=3)
    assert found["nap"].p20_us >= 100
    assert found["nothing"].p50_us < found["nap"].p50_us


def test_networks_are_compared_dry(bench, fake_gpu, monkeypatch) -> None:
    networks = load("test_networks")
    x = torch.randn(1, 3, 4, 4)
    calls = {name: (lambda x, k=k: k * x) for name, k in (("dense", 2.0), ("sequence", 3.0), ("auto", 3.0))}
    assert networks.wrong(calls, x) == {}

    def breaks(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no room\nmore of it")

    others = {"auto": lambda x: 4 * x, "fused dense": lambda x: 3 * x, "fused cuda": breaks}
    assert networks.wrong(calls | others, x) == {
        "auto": "it is off by 3.3e-01",
        "fused dense": "it is off by 5.0e-01",
        "fused cuda": "no room",
    }
    monkeypatch.setattr(networks, "GPU", True)
    monkeypatch.setattr(networks.timing, "capture", bench.timing.capture)
    found = networks.timed(calls, x)
    assert set(found["cold_graph"]) == set(found["eager"]) == set(calls)


@needs_host
def test_the_workload_takes_every_way_on_an_h200() -> None:
    workload = load("tucker2_workload")
    plans: dict[str, dict[int, Any]] = {}
    for name, case in workload.CASES.items():
        x, shape = (case.batch, case.channels, *case.size), (*case.ranks, *case.kernel)
        listed = _tucker2_kernels.sizes(x, shape, case.out_channels, case.geometry)
        splits = workload.ways(case, case.batch, H200)
        best = _tucker2_kernels.best_split(x, shape, case.out_channels, case.geometry, H200)
        assert splits[best] == ""
        able = [split for split, refusal in splits.items() if not refusal]
        plans[name] = {split: _native.host().tucker2_plan(listed, split, *H200) for split in able}
    assert plans["several passes"][1]["passes"] > 1
    assert plans["resident weights"][1]["resident"]
    assert plans["images in one tile"][1]["images"] > 1
    assert plans["several column tiles"][1]["slots"] > plans["several column tiles"][1]["ring"]
    everything = [plan for found in plans.values() for plan in found.values()]
    assert {split for found in plans.values() for split in found} >= {1, 2, 4, 8}
    assert {plan["cluster"] for plan in everything} >= {1, 2, 4, 8}
    assert {plan["padded_ranks"][1] for plan in everything} >= {32, 64, 96, 128, 224}


@needs_host
def test_the_workload_runs_without_a_gpu(monkeypatch, capsys) -> None:
    workload = load("tucker2_workload")
    monkeypatch.setattr(workload, "CASES", {name: workload.CASES[name] for name in ("odd sizes", "the widest")})
    monkeypatch.setattr(workload, "TRITON", ("odd sizes",))
    monkeypatch.setattr(_backends, "HOST_CARD", (False, 4, 163 * 1024))
    _backends.card.cache_clear()
    monkeypatch.setattr(sys, "argv", ["tucker2_workload.py", "--device", "cpu"])
    try:
        workload.main()
    finally:
        _backends.card.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if line.startswith("host, the widest, a tile in 1: R_out is above ")]
    assert len(refused) == 2
    assert lines == [*["host, odd sizes, a tile in 1: ran"] * 2, *refused, "triton, odd sizes: ran"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tucker2_workload.py"])
    with pytest.raises(SystemExit, match=r"^the Tucker-2 kernels cannot run: torch sees no NVIDIA GPU$"):
        workload.main()
