"""bench/norton.py and its page: the rows are the README's, wrong contenders are refused, records become tables."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bench_modules import load
from torch import nn

from fastrank.nn import FusedCPConv

# (network, rank, rates) -> multiply-adds dense and compressed, parameters; as the NORTON code counts them.
EXACT = {
    ("vgg_16_bn", 1, "[0.6]*6+[0.8]*7"): (314_694_666, 4_582_498, 150_667),
    ("vgg_16_bn", 2, None): (314_694_666, 74_138_634, 3_601_162),
    ("vgg_16_bn", 8, "[0.21]*7+[0.75]*5"): (314_694_666, 126_490_634, 2_588_582),
    ("resnet_56", 1, "[0.]+[0.18]*29"): (127_087_242, 14_477_450, 87_633),
    ("resnet_56", 7, "[0.]+[0.18]*29"): (127_087_242, 93_346_442, 588_387),
    ("resnet_50", 1, "[0.]+[0.1]*2+[0.4]*5+[0.75]*12"): (4_121_925_096, 923_650_408, 5_885_736),
}
CONTENDERS = {"dense", "dense fused", "four ops", "auto", "fused"}


@pytest.fixture
def norton() -> Any:
    return load("norton")


@pytest.fixture
def page() -> Any:
    return load("norton_page")


def test_rows_are_those_of_the_readme(norton) -> None:
    rows = norton.rows()
    assert {(row.network, row.rank, row.rates) for row in rows if row.exact} == set(EXACT)
    assert [row.exact for row in rows] == sorted((row.exact for row in rows), reverse=True)
    # The README's table and its ablation of the rank on VGG-16-BN, whose ranks 1 and 2 are in both.
    assert {(row.network, row.rank) for row in rows if row.rates is None} == {
        *(("vgg_16_bn", rank) for rank in range(1, 9)),
        ("resnet_56", 2),
    }
    assert len(rows) == len({(row.network, row.rank, row.rates) for row in rows}) == 17
    for row in rows:
        if row.exact:
            dense, small = row.costs()
            assert (dense.macs, small.macs, small.params) == EXACT[row.network, row.rank, row.rates]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Maps this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(one_thread) -> Any:
    norton = load("norton")
    row = norton.Row("resnet_20", 3, "[0.]+[0.4]*11")  # shallow; the rows themselves are costly
    return norton.Prepared(row, size=8)


def test_a_record(prepared, poison) -> None:
    record = prepared.measure(3, 0.0)
    assert json.loads(json.dumps(record)) == record
    assert (record["batch"], record["size"], record["dtype"]) == (3, 8, "float32")
    assert record["wrong"] == record["left_out"] == {}
    times = record["times"]["eager"]
    assert set(times) == CONTENDERS
    assert all(0 < each["p20_us"] <= each["p50_us"] <= each["p80_us"] for each in times.values())
    assert record["fewer_macs"] == record["dense_macs"] / record["macs"] > 1


def test_contenders_are_what_they_are_called(prepared) -> None:
    kinds = {
        name: {type(module) for module in network.modules()} & {FusedCPConv, nn.BatchNorm2d}
        for name, network in prepared.networks.items()
    }
    assert kinds == {
        "dense": {nn.BatchNorm2d},
        "dense fused": set(),
        "four ops": {nn.BatchNorm2d},
        "auto": {FusedCPConv, nn.BatchNorm2d},
        "fused": {FusedCPConv},
    }


def blunder(kind: str, network: nn.Module) -> Any:
    """A contender with one mistake."""
    twin = copy.deepcopy(network)
    if kind == "weight":  # of the first layer, which all others hide
        first = next(module for module in twin.modules() if isinstance(module, FusedCPConv))
        first.vertical[0, 0, 0] *= 1.1
        return twin
    if kind == "raises":

        def refuse(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such layer\nand more")

        return refuse
    change = {
        "last image": lambda out: torch.cat([out[:-1], out[:1]]),
        "nan": lambda out: out.where(out != out.flatten()[-1], math.nan),
        "shape": lambda out: out[:, :-1],
        "zero": torch.zeros_like,
    }[kind]
    return lambda x: change(network(x))


@pytest.mark.parametrize("kind", ["weight", "last image", "nan", "shape", "zero", "raises"])
@torch.no_grad()
def test_a_wrong_contender_is_refused(norton, prepared, kind) -> None:
    networks = prepared.networks
    calls = {**networks, "auto": blunder(kind, networks["auto"])}
    x = norton.images(2, 8, exact=True)
    bad, refused = norton.wrong(calls, {name: networks[name] for name in norton.PLAIN}, x)
    assert list(bad) == ["auto"]
    assert refused == {}
    assert bad["auto"] == "no such layer" if kind == "raises" else bad["auto"].startswith("it is off by ")


@torch.no_grad()
def test_a_kernel_may_refuse(norton, prepared) -> None:
    networks = prepared.networks
    calls = {**networks, "fused cuda": blunder("raises", networks["auto"])}
    plain = {name: networks[name] for name in norton.PLAIN}
    assert norton.wrong(calls, plain, norton.images(1, 8, exact=True)) == ({}, {"fused cuda": "no such layer"})


def test_contenders_run_in_turns_in_every_order(norton) -> None:
    seen: list[str] = []
    times = norton.eager({name: lambda name=name: seen.append(name) for name in "abc"}, 1e-9)
    assert all(len(us) == norton.LEAST_ROUNDS and min(us) > 0 for us in times.values())
    rounds = ["".join(seen[i : i + 3]) for i in range(6, len(seen), 3)]  # behind two of each that are not kept
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1


@pytest.fixture(scope="module")
def pair(one_thread) -> Any:
    dense, small = load("norton").detectors(64)
    # So small an image has few anchors: fewer may pass, which both read from the one module.
    dense.rpn._post_nms_top_n = {"training": 50, "testing": 50}
    return dense, small


@pytest.mark.slow
@pytest.mark.parametrize("part", ["backbone", "detector"])
def test_the_detector(norton, pair, part, monkeypatch) -> None:
    monkeypatch.setattr(norton, "detectors", lambda image: copy.deepcopy(pair))
    record = norton.detection(64, 0.0, part=part)
    assert record["wrong"] == {}
    assert set(record["times"]["eager"]) == CONTENDERS
    assert record["dense_macs"] > record["macs"]
    assert record.get("proposals") == (50 if part == "detector" else None)


@pytest.mark.slow
def test_detectors_with_other_work_are_not_timed(norton, pair, monkeypatch) -> None:
    dense, small = copy.deepcopy(pair)
    small.rpn = copy.deepcopy(dense.rpn)
    small.rpn._post_nms_top_n = {"training": 40, "testing": 40}
    monkeypatch.setattr(norton, "detectors", lambda image: (dense, small))
    record = norton.detection(64, 0.0, part="detector")
    assert record["wrong"] == dict.fromkeys(
        ("four ops", "auto", "fused"), "it has 40 proposals and 0 detections, not 50 and 0"
    )
    assert set(record["times"]["eager"]) == {"dense", "dense fused"}


def record(
    network: str, rank: int, rates: str | None, batch: int, *, way: str = "eager", **more: Any
) -> dict[str, Any]:
    def spread(us: float) -> dict[str, float]:
        return {"p20_us": us * 0.8, "p50_us": us, "p80_us": us * 1.2}

    times = {"dense": 400.0, "dense fused": 300.0, "four ops": 800.0, "auto": 200.0, "fused": 100.0}
    return {
        "network": network, "rank": rank, "compress_rate": rates, "batch": batch, "size": 320, "dtype": "float32",
        "channels_last": False, "macs": 250, "dense_macs": 1000, "fewer_macs": 4.0, "compiled": False,
        "times": {way: {name: spread(us) for name, us in times.items()}},
    } | more  # fmt: skip


def test_records_become_the_table(page) -> None:
    result = {
        "environment": {"cpu_threads": 2, "torch": "2.11", "device": "a CPU"},
        "rows": [
            record("resnet_56", 1, "[0.]+[0.18]*29", 16),
            record("vgg_16_bn", 2, None, 1),
            record("fasterrcnn", 1, None, 1, part="backbone"),
        ],
    }
    told = "4.00× | 0.50× (0.33–0.75) | 2.00× (1.33–3.00) | 3.00× (2.00–4.50) |"
    assert page.classifiers(result).splitlines()[2:] == [
        f"| VGG-16-BN, R = 2 | 1 | 250 | 2.5e+03 | {told}",
        f"| ResNet-56, R = 1, `[0.]+[0.18]*29` | 16 | 250 | 4e+04 | {told}",
        "",
        "float32, NCHW, 2 threads, a CPU, torch 2.11, eager.",
    ]
    assert page.detector(result, None).splitlines()[2:] == [
        f"| backbone, CPU | 320² | 1K → 250 | 2.5e+03 | {told}",
        f"| detector, CPU | {' | '.join(['not yet measured'] * 7)} |",
        "",
        "Not yet measured on a GPU.",
    ]


def test_a_gpu_run_fills_its_cells(page, tmp_path) -> None:
    assert page.classifiers_on_gpu(None) == "Not yet measured on a GPU."
    (tmp_path / "empty").mkdir()
    blank = page.classifiers_on_gpu(tmp_path / "empty")
    assert len(blank.splitlines()) == 2 + len(EXACT) * 3
    assert blank.count("not yet measured") == len(EXACT) * 3 * 7
    assert "| VGG-16-BN, R = 2 | 32 | not yet measured | 4.24× |" in blank
    rows = [
        record("vgg_16_bn", 2, None, 32, way="graph"),
        record("vgg_16_bn", 2, None, 32, way="graph", compiled=True),
        record("fasterrcnn", 1, None, 1, part="detector"),
    ]
    lines = [json.dumps({"name": "n", "group": "NORTON", "extra_info": each}) + "\n" for each in rows]
    (tmp_path / "bench_norton.jsonl").write_text("".join(lines) + '{"name": "stop', encoding="utf-8")
    filled = page.classifiers_on_gpu(tmp_path)
    assert blank.count("not yet measured") - filled.count("not yet measured") == 5
    ratio = "3.00× (2.00–4.50)"
    (line,) = [line for line in filled.splitlines() if ratio in line]
    assert line == (
        "| VGG-16-BN, R = 2 | 32 | 8e+04 | 4.24× | not yet measured | not yet measured | 0.50× (0.33–0.75) | "
        f"2.00× (1.33–3.00) | {ratio} | {ratio} |"
    )
    shown = page.detector({"rows": []}, tmp_path)
    assert "| detector, GPU | 320² | 1K → 250 | 2.5e+03 | 4.00× |" in shown
