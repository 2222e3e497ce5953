"""Measuring for the dispatcher: what is measured, where it goes, and how the commands show it. Times are made up."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrank
from fastrank import _backends, _tables, cli, tune
from fastrank._tables import _store
from fastrank.nn import FusedCPConv, FusedTucker2Conv, SVDConv
from fastrank.tune import _calibrate, _measure


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = FusedTucker2Conv(3, 8, 3, (2, 4), stride=2, padding=1)
        self.second = FusedCPConv(8, 6, 3, 2, padding="same", padding_mode="reflect")
        self.third = SVDConv(6, 4, 3, 2)
        self.again = self.first

    def forward(self, x):
        x = self.first(x)
        return self.third(self.second(x) + self.second(x))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no shipped table."""
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_store, "SHIPPED", tmp_path)
    _tables.forget()
    yield tmp_path / "cache"
    _tables.forget()


@pytest.fixture
def clock(monkeypatch):
    """Every call runs once and takes what stands here under its name."""
    times = {"dense": 10.0, "sequence": 20.0, "depthwise": 15.0, "call": 5.0}

    def in_turns(calls, device, samples=1):
        for call in calls.values():
            call()
        return tune.Timing({name: times[name] for name in calls}, 0.01)

    monkeypatch.setattr(_measure, "in_turns", in_turns)
    monkeypatch.setattr(_calibrate, "in_turns", in_turns)
    return times


def test_the_cases_of_a_model_are_the_calls_of_its_fused_layers():
    model = Net().train()
    found = tune.cases(model, torch.zeros(2, 3, 12, 10).contiguous(memory_format=torch.channels_last))
    ops = [("first", "tucker2_conv2d"), ("second", "cp_conv2d"), ("third", "channel_svd_conv2d")]
    assert [(case.name, case.op) for case in found] == ops
    first, second, third = (case.work for case in found)
    assert (third.size, third.ranks) == (second.out_size, (2, 2))
    assert (first.batch, first.size, first.ranks, first.stride, first.channels_last) == (
        2,
        (12, 10),
        (2, 4),
        (2, 2),
        True,
    )
    assert (second.size, second.padding, second.ranks) == ((8, 7), (0, 0), (2, 2))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"^model must be one with compressed layers"):
        tune.cases(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4))


def test_a_dense_model_as_if_it_were_compressed():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, (3, 5), 2, 1),
        nn.Conv2d(32, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
    )
    (case,) = tune.cases_as_if(model, torch.zeros(4, 3, 9, 9), 0.5)
    assert case.name == "1"
    assert case.work == _backends.ConvWork(
        4, 16, 32, (9, 9), (3, 5), (8, 16), (2, 2), (1, 1), (1, 1), False, "inference"
    )
    macs = 4 * 5 * 4 * 15 * 16 * 32
    assert tune.cases_as_if(model, torch.zeros(4, 3, 9, 9), 0.5, largest=macs) == [case]
    assert tune.cases_as_if(model, torch.zeros(4, 3, 9, 9), 0.5, largest=macs - 1) == []
    (cp,) = tune.cases_as_if(model, torch.zeros(4, 3, 9, 9), 0.5, cp_rank=20)
    assert (cp.op, cp.work) == ("cp_conv2d", replace(case.work, ranks=(15, 15)))
    narrow = nn.Sequential(nn.Conv2d(64, 2, 3, padding=1))
    (case,) = tune.cases_as_if(narrow, torch.zeros(1, 64, 5, 5), 1.0)
    assert case.work.ranks == (18, 2)
    with pytest.raises(ValueError, match=r"^share must be a finite number in \(0, 1\], got 0"):
        tune.cases_as_if(model, torch.zeros(1, 3, 9, 9), 0)


@pytest.mark.parametrize("op", _tables.LIBRARY)
@pytest.mark.parametrize("call", ["inference", "forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_backend_of_a_case_computes_the_same(op, call, channels_last, clock, monkeypatch):
    results = {}

    def in_turns(calls, device, samples):
        results.update({name: call() for name, call in calls.items()})
        return tune.Timing(dict.fromkeys(calls, 1.0), 0.0)

    monkeypatch.setattr(_measure, "in_turns", in_turns)
    work = _backends.ConvWork(2, 5, 6, (7, 8), (3, 3), (2, 2), (2, 1), (1, 1), (1, 1), channels_last, call)
    assert tune.measure(tune.Case("", op, work, torch.float64)).us == dict.fromkeys(_tables.LIBRARY[op], 1.0)
    for name in _tables.LIBRARY[op]:
        for one, other in zip(results["dense"], results[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_times_are_medians_in_turns_and_a_busy_machine_gets_another_try(monkeypatch):
    order, clock = [], iter([1e-3, 1e-3] * 2 + [1e-3, 2e-3, 9e-3, 4e-3] * 2 + [2e-3] * 8)
    monkeypatch.setattr(_measure, "_seconds", lambda call, repeats, device: (call(), next(clock) * repeats)[1])
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = _measure.in_turns(calls, torch.device("cpu"), samples=4)
    assert found == tune.Timing({"a": 2000.0, "b": 2000.0}, 0.0)
    assert "".join(order) == "aabb" + "abbaabba" * 2


def test_a_measured_row_decides_at_once(cache, clock):
    layer = FusedTucker2Conv(3, 8, 3, (2, 4), padding=1)
    (case,) = tune.cases(layer, torch.zeros(1, 3, 8, 8))
    before = tune.explain(case)
    assert (before.backend, before.source, before.us) == ("sequence", "nothing known", {})
    table = tune.table_of()
    assert [timing.us for _, timing in tune.add_rows(table, [case])] == [{"dense": 10.0, "sequence": 20.0}]
    path = tune.save(table)
    assert path.startswith(str(cache))
    after = tune.explain(case)
    assert (after.backend, after.source, after.us) == ("dense", "measured here", {"dense": 10.0, "sequence": 20.0})
    assert after.refused["cuda"] == "the tensor is on cpu, not on a CUDA device"
    layer.eval().requires_grad_(False)
    layer(torch.zeros(1, 3, 8, 8))
    assert [backend for backend, *_ in layer._prepared._kept.stages] == ["dense"]
    clock["dense"] = 30.0
    table = tune.table_of()
    other = replace(case, work=replace(case.work, batch=2))
    tune.add_rows(table, [other])
    tune.save(table)
    assert tune.explain(case).backend == "dense"
    assert tune.explain(other).backend == "sequence"


def test_a_model_of_costs_is_made_and_goes_into_the_table(cache, clock, monkeypatch):
    monkeypatch.setattr(_calibrate, "POINTS", dict.fromkeys(_calibrate.POINTS, 8))
    monkeypatch.setattr(_calibrate, "LAYERS", dict.fromkeys(_calibrate.LAYERS, 8))
    monkeypatch.setattr(_calibrate, "LIMIT_MACS", 2e7)
    clock |= {"dense": 5.0, "sequence": 15.0, "depthwise": 150.0}
    table, said = tune.empty_table(), []
    threads = torch.get_num_threads()
    for setup in (tune.Setup(torch.float32, False, 1), tune.Setup(torch.bfloat16, True, 2)):
        regret = tune.calibrate(table, setup, effort=1, say=said.append)
        assert torch.get_num_threads() == threads
        assert (regret.p50, regret.p95, regret.worst) == (1.0, 1.0, 1.0)
        assert regret.layers == len(_calibrate.LAYERS) * 4
    assert len(said) == 4
    assert [entry["channels_last"] for entry in table.validation] == [False, True]
    groups = set(table.models["float32", False, 1].groups)
    assert groups >= {"convolution", "convolution 1x1", "convolution small", "convolution 1x1 small", "merge", "sum"}
    assert {"depthwise", "depthwise-backward", "merge-backward", "convolution-backward"} <= groups
    assert set(table.models["bfloat16", True, 2].groups) == {name for name in groups if "small" not in name}
    tune.save(table)
    work = _backends.ConvWork(3, 40, 50, (9, 9), (3, 3), (20, 20), (1, 1), (1, 1), (1, 1), False, "inference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = tune.explain(tune.Case("", "tucker2_conv2d", work, torch.float32))
    finally:
        torch.set_num_threads(before)
    # Every call of the library took 5 µs: one of them is dense, three are the sequence.
    assert found.source == "model (here, 1 thread)"
    assert found.us["dense"] == pytest.approx(5, rel=0.2)
    assert found.us["sequence"] == pytest.approx(15, rel=0.2)


@pytest.fixture(params=[True, False])
def serves_bfloat16(request, monkeypatch):
    monkeypatch.setattr(_calibrate, "_serves_bfloat16", lambda: request.param)
    return request.param


def test_the_setups_of_a_cpu(serves_bfloat16):
    assert len(tune.setups([1, 4])) == (8 if serves_bfloat16 else 4)
    assert {setup.threads for setup in tune.setups([1, 4])} == {1, 4}


@pytest.fixture
def command(capsys, monkeypatch):
    """(exit code, stdout, stderr) of `fastrank ARGS`."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastrank", *map(str, args)])
        try:
            code = cli.main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return run


@pytest.fixture
def saved(tmp_path):
    model = fastrank.models.build("lenet5_nrmf")
    plan = fastrank.make_plan(model, "nrmf", example_input=torch.zeros(1, 1, 28, 28), energy=0.5)
    fastrank.save(fastrank.compress(model, plan), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_bench_measures_shows_and_tunes_only_when_told(cache, clock, command, saved):
    size = ("--input", "1,16,16")
    code, text, _ = command("bench", saved, "--batch", "1,2", *size)
    assert code == 0
    assert "1×1×16×16" in text
    assert "fastest" in text
    assert not cache.exists()
    code, text, _ = command("bench", saved, "--batch", "2", *size, "--tune", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["out"].startswith(str(cache))
    assert {row["fastest"] for row in found["layers"]} == {"dense"}
    assert {row["auto_before"] for row in found["layers"]} == {"sequence"}
    code, text, _ = command("inspect", saved, "--explain", "--batch", 2, *size)
    assert code == 0
    assert text.count("measured here") == len(found["layers"])
    code, text, _ = command("inspect", saved, "--explain", *size, "--json")
    rows = json.loads(text)["layers"]
    assert {row["source"] for row in rows} == {"nearest rows (here)"}
    assert {row["backend"] for row in rows} == {"dense"}
    assert all(row["refused"]["cuda"] for row in rows)


def test_bench_of_an_architecture_as_if_compressed_into_a_file(cache, clock, command, tmp_path):
    path = tmp_path / "own.json"
    arguments = ("--arch", "lenet5_nrmf", "--input", "1,16,16", "--batch", 1, "--dtype", "bfloat16", "--channels-last")
    code, text, _ = command("bench", *arguments, "--tune", "--out", path, "--threads", "1,2", "--json")
    assert code == 0
    table = _tables.Table.loads(path.read_text())
    assert {(key.dtype, key.threads, key.work.channels_last) for key in table.rows} == {
        ("bfloat16", 1, True), ("bfloat16", 2, True)
    }  # fmt: skip
    assert json.loads(text)["models"] == []
    assert not cache.exists()


def test_bench_of_the_standard_layers_makes_a_model(cache, clock, command, serves_bfloat16, monkeypatch):
    from fastrank.cli import _bench

    monkeypatch.setattr(_bench, "STANDARD", ("lenet5_nrmf",))
    monkeypatch.setattr(_bench, "STANDARD_CP", ("resnet_20",))
    monkeypatch.setattr(_calibrate, "POINTS", dict.fromkeys(_calibrate.POINTS, 8))
    monkeypatch.setattr(_calibrate, "LAYERS", dict.fromkeys(_calibrate.LAYERS, 8))
    monkeypatch.setattr(_calibrate, "LIMIT_MACS", 2e7)
    code, text, _ = command("bench", "--tune", "--batch", "1", "--threads", "1", "--json")
    assert code == 0
    assert len(json.loads(text)["models"]) == (4 if serves_bfloat16 else 2)
    assert json.loads(text)["models"][0]["setup"] == "float32, NCHW, 1 threads"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--arch", "b"), "a model or --arch must be given, and not both, got both"),
        (("--threads", "1"), "--out and --threads must go with --tune, got one without it"),
        (("--out", "x.json"), "--out and --threads must go with --tune, got one without it"),
        (("--dtype", "int8"), "--dtype must be one of ['float32', 'float16', 'bfloat16'], got 'int8'"),
        (("--batch", "0"), "--batch must be whole numbers above 0 joined by commas, got '0'"),
        (
            ("lenet5_nrmf",),
            "model must be one with compressed layers (FusedTucker2Conv, FusedCPConv, SVDConv), got none of them",
        ),
    ],
)
def test_bad_input_is_one_sentence(cache, command, arguments, message):
    code, _, error = command("bench", *arguments)
    assert code == 2
    assert error == f"fastrank: {message}\n"
