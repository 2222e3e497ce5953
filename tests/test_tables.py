"""The choice of a convolution's backend: which table is asked, what a model says, and what happens to bad files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastrank import _backends, _tables, ops
from fastrank._backends import Facts, fastest
from fastrank._tables import LIBRARY, ConvWork, Estimate, Key, Step, Table, _model, _store, steps
from fastrank._tables._work import vendor_serves

WORK = ConvWork(2, 16, 32, (9, 7), (3, 3), (4, 8), (1, 1), (1, 1), (1, 1), False, "inference")
HERE = Facts("tucker2_conv2d", "cpu", torch.float32, False, "no triton", "no cuda", "no host", WORK, "cpu-x", 2)
OTHER = replace(WORK, ranks=(5, 8))


def key(work=WORK, dtype="float32", threads=2, op="tucker2_conv2d"):
    return Key(op, dtype, threads, work)


def flat_model(**times):
    """A model by which every step of a kind takes the same time; kinds that are not named take 1."""
    kinds = [f"{kind}{suffix}" for kind in ("convolution", "depthwise", "sum", "merge") for suffix in ("", "-backward")]
    names = [kind + rest for kind in kinds for rest in ("", " 1x1", " small", " 1x1 small")]
    groups = {name: _model.Group((times.get(name, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0), (), ()) for name in names}
    calls = ("inference", "forward", "backward")
    labels = [f"{op} {name} {call}" for op, names in LIBRARY.items() for name in names for call in calls]
    return _tables.Model(groups, dict.fromkeys(labels, 1.0))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Puts tables into an empty cache and an empty set of shipped ones: tables(mine=Table, theirs=Table)."""
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_store, "SHIPPED", tmp_path)
    _tables.forget()

    def put(mine=None, theirs=None):
        if mine is not None:
            _tables.save(mine)
        if theirs is not None:
            _tables.save(theirs, tmp_path / f"{'cpu' if theirs.device.startswith('cpu') else theirs.device}.json")

    yield put
    _tables.forget()


def test_nothing_known_is_the_sequence(tables):
    assert fastest(HERE) == _backends.Choice("sequence", _tables.Estimate())
    assert fastest(HERE).estimate.source == "nothing known"


def test_the_users_row_goes_before_the_shipped_one_and_rows_before_models(tables):
    shipped = Table("cpu", rows={key(): {"dense": 1.0, "sequence": 2.0}}, models={("float32", False, 2): flat_model()})
    tables(theirs=shipped)
    assert (fastest(HERE).backend, fastest(HERE).estimate.source) == ("dense", "shipped table")
    tables(mine=Table("cpu-x", rows={key(): {"dense": 3.0, "sequence": 2.0}}))
    assert (fastest(HERE).backend, fastest(HERE).estimate.source) == ("sequence", "measured here")
    assert fastest(HERE).estimate.us == {"dense": 3.0, "sequence": 2.0}
    assert fastest(replace(HERE, machine="cpu-y")).estimate.source == "shipped table"


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float64},
        {"threads": 3},
        {"op": "cp_conv2d"},
        {"work": replace(WORK, call="forward")},
        {"work": replace(WORK, channels_last=True)},
        {"work": replace(WORK, batch=3)},
        {"work": replace(WORK, kernel=(1, 3))},
    ],
)
def test_a_row_is_of_one_work_alone(tables, other):
    tables(mine=Table("cpu-x", rows={key(): {"dense": 1.0, "sequence": 2.0}}))
    assert fastest(HERE).estimate.source == "measured here"
    assert fastest(replace(HERE, **other)).estimate.source != "measured here"


def test_training_is_both_passes_and_a_gradient_by_the_operator_computes_maps_again(tables):
    def at(call):
        return replace(WORK, call=call)

    op = "cp_conv2d"
    here = replace(HERE, op=op)
    forward = {"sequence": 5.0, "depthwise": 4.0, "dense": 3.0, "triton": 1.0}
    backward = {"sequence": 5.0, "depthwise": 5.0, "dense": 8.0, "cuda": 9.0}
    tables(theirs=Table("cpu", rows={key(at("forward"), op=op): forward, key(at("backward"), op=op): backward}))
    training, gradient = (fastest(replace(here, work=at(call))) for call in ("training", "gradient"))
    assert training.estimate == Estimate({"sequence": 10.0, "depthwise": 9.0, "dense": 11.0}, "shipped table")
    assert gradient.estimate.us == {"sequence": 10.0, "depthwise": 9.0, "dense": 8.0, "cuda": 9.0}
    assert (training.backend, gradient.backend) == ("depthwise", "dense")
    assert fastest(replace(here, work=at("training"), dtype=torch.float64)) == _backends.Choice("sequence", Estimate())


def test_a_model_serves_what_is_no_row_at_the_nearest_number_of_threads(tables):
    slow, fast = flat_model(convolution=10.0), flat_model(convolution=0.5)
    tables(theirs=Table("cpu", models={("float32", False, 1): slow, ("float32", False, 8): fast}))
    for threads, backend, source in (
        (1, "sequence", "model (shipped table, 1 thread)"),
        (2, "sequence", "model (shipped table, 1 thread)"),
        (3, "dense", "model (shipped table, 8 threads)"),
        (64, "dense", "model (shipped table, 8 threads)"),
    ):
        # dense is the convolution; the sequence is one too, between two pointwise ones of 1 µs each
        choice = fastest(replace(HERE, threads=threads))
        assert choice.estimate.source == source
        wanted = {"dense": 10.0, "sequence": 12.0} if backend == "sequence" else {"dense": 0.5, "sequence": 2.5}
        assert choice.estimate.us == wanted
    assert fastest(replace(HERE, dtype=torch.float64)).estimate.source == "nothing known"
    assert fastest(replace(HERE, work=replace(WORK, channels_last=True))).estimate.source == "nothing known"
    assert fastest(replace(HERE, work=replace(WORK, batch=0))).estimate.source == "nothing known"


def test_the_users_model_goes_before_the_shipped_one(tables):
    setup = ("float32", False, 2)
    tables(
        Table("cpu-x", models={setup: flat_model(convolution=3.0)}),
        Table("cpu", models={setup: flat_model(convolution=9.0)}),
    )
    assert fastest(HERE).estimate == _tables.Estimate({"sequence": 5.0, "dense": 3.0}, "model (here, 2 threads)")


def test_the_scale_of_a_backend_moves_the_choice(tables):
    model = flat_model(convolution=3.0)
    tables(theirs=Table("cpu", models={("float32", False, 2): model}))
    assert fastest(HERE).backend == "dense"
    scaled = _tables.Model(model.groups, {**model.scale, "tucker2_conv2d dense inference": 2.0})
    tables(theirs=Table("cpu", models={("float32", False, 2): scaled}))
    assert fastest(HERE).backend == "sequence"
    assert fastest(HERE).estimate.us["dense"] == 6.0


def test_a_kernel_is_taken_only_where_it_was_measured_on_that_device_and_can_run(tables, monkeypatch):
    monkeypatch.setitem(_backends.BACKENDS, "tucker2_conv2d", ("sequence", "dense", "reference", "triton", "cuda"))
    monkeypatch.setitem(_backends._PREDICATES, "triton", lambda facts: _backends.Verdict(True))
    able = {"cuda": True}
    monkeypatch.setitem(
        _backends._PREDICATES, "cuda", lambda facts: _backends.Verdict(able["cuda"], "" if able["cuda"] else "no")
    )
    gpu = replace(HERE, device="cuda", dtype=torch.bfloat16, machine="nvidia-h200", threads=0)
    times = {"cuda": 1.0, "triton": 2.0, "sequence": 3.0, "dense": 4.0}
    tables(theirs=Table("nvidia-h200", rows={key(dtype="bfloat16", threads=0): times}))
    assert fastest(gpu).backend == "cuda"
    assert fastest(replace(gpu, machine="nvidia-a100")).backend == "sequence"
    assert fastest(replace(gpu, dtype=torch.float16)).backend == "sequence"
    able["cuda"] = False
    _tables.forget()
    assert fastest(gpu).backend == "triton"
    assert _backends.choose(gpu, "dense") == "dense"


def test_rows_nearby_say_which_backend_is_how_much_faster(tables):
    def row(rank, dense):
        return key(replace(WORK, ranks=(rank, rank)), threads=0), {"dense": dense, "sequence": 10.0, "cuda": 2.0}

    gpu = replace(HERE, device="cuda", machine="gpu", threads=0)
    tables(theirs=Table("gpu", rows=dict([row(2, 40.0), row(8, 5.0)])))
    near_low = fastest(replace(gpu, work=replace(WORK, ranks=(3, 2))))
    near_high = fastest(replace(gpu, work=replace(WORK, ranks=(7, 8))))
    assert near_low.estimate.source == "nearest rows (shipped table)"
    assert near_low.backend == "sequence"  # the compiled kernel is not there, so it is passed over
    assert near_high.backend == "dense"
    assert 0.5 <= near_high.estimate.us["dense"] < 1 < near_low.estimate.us["dense"] <= 4
    assert near_low.estimate.us["cuda"] == pytest.approx(0.2)
    far = replace(WORK, ranks=(4, 8), batch=WORK.batch * 64)
    assert fastest(replace(gpu, work=far)).estimate.source == "nothing known"
    assert fastest(replace(gpu, work=replace(WORK, stride=(2, 2)))).estimate.source == "nothing known"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "fastrank-table"}', "is damaged"),
        ('{"format": "photo", "version": 1}', "is no table of fastrank"),
        ('{"format": "fastrank-table", "version": 2}', "is of version 2, and this fastrank reads version 1"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("negative", "is damaged"),
        ("extra", "is damaged"),
    ],
)
def test_a_bad_file_in_the_cache_is_ignored_with_one_warning(tables, text, reason):
    table = Table("cpu-x", rows={key(): {"dense": 1.0, "sequence": 2.0}})
    if text in ("negative", "extra"):
        document = json.loads(table.dumps())
        target = document["rows"][0]["us"] if text == "negative" else document["rows"][0]["work"]
        target["dense"] = -1.0
        text = json.dumps(document)
    path = _tables.cache_file("cpu-x")
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=rf"^the table .*cpu-x\.json {reason}: it is ignored") as caught:
        assert fastest(HERE).backend == "sequence"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastest(replace(HERE, work=OTHER)).backend == "sequence"
    _tables.save(table)
    assert fastest(HERE).backend == "dense"


def test_a_table_survives_its_file(tables):
    point = (1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    group = _model.Group((1.0, 0.0, 2.5e-7, 0.0, 0.0, 0.0), (point,), (0.25,))
    table = Table(
        "cpu-x",
        {"torch": "2"},
        {key(): {"dense": 1.5}, key(OTHER): {"sequence": 2.0, "dense": 1.0}},
        {("float32", True, 4): _tables.Model({"merge": group}, {"cp_conv2d dense forward": 1.25})},
        [{"p95": 1.0}],
    )
    assert Table.loads(table.dumps()) == table
    backwards = replace(table, rows=dict(reversed(table.rows.items())))
    assert backwards.dumps() == table.dumps()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASTRANK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _tables.cache_file("d") == tmp_path / ".cache" / "fastrank" / "d.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _tables.cache_file("d") == tmp_path / "xdg" / "fastrank" / "d.json"
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path / "own"))
    assert _tables.cache_file("d") == tmp_path / "own" / "d.json"


def test_a_cpu_takes_the_table_of_its_vector_unit(tables, tmp_path):
    tables(theirs=Table("cpu", rows={key(): {"dense": 1.0, "sequence": 2.0}}))
    wide = Table("cpu-x-avx2", rows={key(): {"dense": 2.0, "sequence": 1.0}})
    _tables.save(wide, tmp_path / "cpu-avx2.json")
    assert fastest(replace(HERE, machine="cpu-y-avx2")).backend == "sequence"
    assert fastest(replace(HERE, machine="cpu-y-avx512")).backend == "dense"


def test_devices_have_names_that_are_file_names(monkeypatch):
    assert _tables.device_name("cpu", None).startswith("cpu-")
    assert _tables.device_name("meta", None) == "meta"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H200 (number {index})")
    assert _tables.device_name("cuda", 7) == "nvidia-h200-number-7"


def test_the_steps_of_every_call():
    def kinds(op, backend, call):
        return [step.kind for step in steps(op, backend, replace(WORK, call=call), torch.float32, 1)]

    conv, deep = "convolution", "depthwise"
    assert kinds("tucker2_conv2d", "dense", "inference") == [conv]
    assert kinds("tucker2_conv2d", "dense", "forward") == ["merge", conv]
    assert kinds("tucker2_conv2d", "dense", "backward") == [f"{conv}-backward", "merge-backward"]
    assert kinds("tucker2_conv2d", "sequence", "inference") == [conv] * 3
    assert kinds("tucker2_conv2d", "sequence", "backward") == [f"{conv}-backward"] * 3
    assert kinds("cp_conv2d", "sequence", "forward") == [conv, deep, deep, "sum"]
    assert kinds("cp_conv2d", "sequence", "backward") == [f"{conv}-backward", *[f"{deep}-backward"] * 2]
    assert kinds("channel_svd_conv2d", "sequence", "inference") == [conv, conv]
    assert kinds("spatial_svd_conv2d", "sequence", "backward") == [f"{conv}-backward"] * 2
    assert kinds("decoupled_svd_conv2d", "sequence", "inference") == [conv, deep, "sum"]
    for op in ("cp_conv2d", "decoupled_svd_conv2d"):
        assert kinds(op, "depthwise", "inference") == [conv, deep] * WORK.ranks[0] + ["sum"] * (WORK.ranks[0] - 1)
        assert kinds(op, "depthwise", "backward") == [f"{conv}-backward", f"{deep}-backward"] * WORK.ranks[0]


def test_the_steps_are_what_the_operators_count():
    """FLOPs of one operator, counted by torch, are twice the multiply-adds of its steps without sums and merges."""
    sizes = {"stride": WORK.stride, "padding": WORK.padding, "dilation": WORK.dilation}
    for op, shapes in {
        "tucker2_conv2d": [(4, 16), (8, 4, 3, 3), (32, 8)],
        "cp_conv2d": [(4, 32, 16), (4, 32, 3), (4, 32, 3)],
        "channel_svd_conv2d": [(4, 16, 3, 3), (32, 4, 1, 1)],
        "spatial_svd_conv2d": [(4, 16, 3, 1), (32, 4, 1, 3)],
        "decoupled_svd_conv2d": [(4, 32, 16), (4, 32, 3, 3)],
    }.items():
        with FlopCounterMode(display=False) as counter:
            getattr(ops, op)(torch.zeros(2, 16, 9, 7), *(torch.zeros(shape) for shape in shapes), **sizes)
        parts = steps(op, "sequence", WORK, torch.float32, 1)
        assert counter.get_total_flops() == 2 * sum(step.macs for step in parts if step.kind != "sum")


def test_multiply_adds_and_weights_of_the_steps():
    work = replace(WORK, stride=(2, 1), padding=(0, 1))
    first, core, last = steps("tucker2_conv2d", "sequence", work, torch.float32, 1)
    assert work.out_size == (4, 7)
    assert first.macs == 2 * 63 * 16 * 4
    assert core.macs == 2 * 28 * 9 * 4 * 8
    assert last.macs == 2 * 28 * 8 * 32
    assert (first.weights, core.weights, last.weights) == (64, 288, 256)
    _, vertical, horizontal, total = steps("cp_conv2d", "sequence", replace(work, ranks=(3, 3)), torch.float32, 1)
    assert (vertical.in_pixels, vertical.out_pixels, horizontal.out_pixels) == (63, 28, 28)
    assert vertical.weights == horizontal.weights == 3 * 96
    assert total.macs == 2 * 28 * 96


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (False, (1, 16, (8, 8), (3, 3), False, torch.float32, 8)),
        (True, (1, 16, (8, 8), (5, 5), False, torch.float32, 8)),
        (True, (2, 16, (8, 8), (3, 3), False, torch.float32, 1)),
        (True, (1, 21, (32, 32), (3, 3), False, torch.float32, 1)),
        (False, (2, 16, (8, 8), (1, 1), False, torch.float32, 1)),
        (True, (2, 16, (8, 8), (1, 1), False, torch.float32, 2)),
        (True, (16, 16, (8, 8), (1, 1), False, torch.float32, 1)),
        (True, (2, 16, (8, 8), (1, 1), True, torch.float32, 1)),
        (True, (1, 16, (8, 8), (1, 1), False, torch.bfloat16, 1)),
    ],
)
def test_which_convolutions_go_to_the_vendors_library(expected, arguments):
    assert vendor_serves(*arguments) is expected


def some_steps(count):
    generator = torch.Generator().manual_seed(0)
    sizes = (2 ** (torch.rand(count, 3, generator=generator) * 6 + 2)).round().int().tolist()
    return [Step("convolution", 1, i, o, p, p, 9, 9 * i * o * p) for i, o, p in sizes]


def test_a_fitted_model_finds_the_costs_it_was_made_from_and_what_they_miss():
    def cost(step):
        return 5 + 2e-3 * step.in_channels * step.in_pixels + 1e-3 * step.weights

    known, fresh = some_steps(120)[:100], some_steps(120)[100:]
    group = _tables.fit([(step, cost(step)) for step in known])["convolution"]
    assert min(group.coefficients) >= 0
    assert max(abs(group.predict(step) / cost(step) - 1) for step in fresh) < 1e-3

    def bent(step):  # no sum of the summands: up to a third off
        return cost(step) * math.exp(0.3 * math.sin(math.log2(step.in_channels)))

    group = _tables.fit([(step, bent(step)) for step in known])["convolution"]
    errors = sorted(abs(math.log(group.predict(step) / bent(step))) for step in fresh)
    plain = sorted(abs(math.log(cost(step) / bent(step))) for step in fresh)
    assert errors[10] < 0.5 * plain[10]


def test_a_group_of_too_few_points_is_left_out_and_its_calls_are_not_predicted():
    groups = _tables.fit([(step, 1.0) for step in some_steps(5)])
    assert groups == {}
    assert _tables.Model(groups, {}).predict("", some_steps(1)) is None


CHOICES = """
import torch
from fastrank import _backends
from fastrank._tables import ConvWork
for ranks in range(8, 64, 4):
    for call in ("inference", "forward", "backward"):
        work = ConvWork(4, 64, 64, (28, 28), (3, 3), (ranks, ranks), (1, 1), (1, 1), (1, 1), False, call)
        print(_backends.choose(_backends.facts("tucker2_conv2d", torch.zeros(1), work), "auto"))
"""


@pytest.mark.slow
def test_every_process_chooses_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRANK_CACHE", str(tmp_path))
    answers = set()
    for seed in ("0", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        answers.add(subprocess.run([sys.executable, "-c", CHOICES], capture_output=True, text=True, check=True).stdout)
    assert len(answers) == 1


def test_a_backend_that_was_not_measured_is_not_chosen(tables):
    """A table of an older fastrank: its model of costs says nothing of backends that it did not know."""
    cp = replace(HERE, op="cp_conv2d")
    model = flat_model(sum=9.0)
    tables(theirs=Table("cpu", models={("float32", False, 2): model}))
    assert set(fastest(cp).estimate.us) == {"sequence", "depthwise", "dense"}
    old = {name: 1.0 for name in model.scale if "depthwise" not in name and "svd" not in name}
    tables(theirs=Table("cpu", models={("float32", False, 2): _tables.Model(model.groups, old)}))
    _tables.forget()
    assert set(fastest(cp).estimate.us) == {"sequence", "dense"}
    assert fastest(replace(HERE, op="channel_svd_conv2d")) == _backends.Choice("sequence", Estimate())


@pytest.mark.parametrize("device", ["cpu-whatever", "cpu-x-avx2"])
def test_the_shipped_tables_of_cpus_know_what_networks_run_in(device):
    _tables.forget()
    table = _tables.shipped(device)
    assert table is not None
    dtypes = ("float32",) if "avx2" in device else ("float32", "bfloat16")  # AVX2 has no bfloat16 to speak of
    assert {setup[:2] for setup in table.models} >= {(d, c) for d in dtypes for c in (False, True)}
    for op in ("tucker2_conv2d", "cp_conv2d"):
        for call in ("inference", "forward", "backward"):
            work = replace(WORK, call=call, ranks=(4, 4))
            found = _tables.estimate(op, work, torch.float32, device, 2)
            assert {"sequence", "dense"} <= set(found.us) <= set(LIBRARY[op])
            assert all(0 < us < math.inf for us in found.us.values())
