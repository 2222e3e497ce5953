"""The registry of benchmarks: what it lists, what names it takes, and how its times come about."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from fastrank import _backends, benchmarks
from fastrank.benchmarks import Work, _peers, timing
from fastrank.benchmarks._registry import refusals

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", benchmarks.FAMILIES)
def test_every_family_lists_its_rows(family) -> None:
    found = benchmarks.cases(family, "cpu")
    assert len({str(case) for case in found}) == len(found) >= 4
    for case in found:
        assert (case.family, case.device, case.dtype) == (family, "cpu", torch.float32)
        names = [each.name for each in case.contenders]
        assert len(set(names)) == len(names)
        assert "auto" in names
        assert set(case.baselines) <= set(names)
        assert {each.peer for each in case.contenders} <= {"", *benchmarks.PEERS}


@pytest.mark.parametrize("family", benchmarks.FAMILIES)
def test_a_gpu_has_more_rows(family, monkeypatch) -> None:
    monkeypatch.setattr(import_module(f"fastrank.benchmarks._{family}"), "refusals", lambda *args: {})
    found = benchmarks.cases(family, "cuda")
    assert len({str(case) for case in found}) == len(found)
    kind = torch.float32 if family in ("linalg", "gates") else torch.bfloat16
    assert {(case.device, case.dtype) for case in found} == {("cuda", kind)}
    names = {each.name for case in found for each in case.contenders}
    assert all(set(case.baselines) <= {each.name for each in case.contenders} for case in found)
    # Cold graphs, but of loops over SVDs, which wait for the device.
    assert all((case.copied is not None) == (family != "linalg") for case in found)
    assert all(case.work is not None for case in found)
    wanted = {
        "tucker2": {"cuda", "triton", "compile"},
        "cp": {"triton", "compile"},
        "linalg": {"cuda", "polar", "svd loop, gesvd", "svd loop, gesvdj", "svd loop, gesvda, tall"},
        "gates": {"cuda", "triton"},
        "networks": {"fused cuda", "fused triton", "dense compiled", "sequence compiled"},
    }
    assert wanted[family] <= names


def test_every_peer_is_somewhere() -> None:
    rows = [case for family in benchmarks.FAMILIES for case in benchmarks.cases(family, "cpu")]
    assert {each.peer for case in rows for each in case.contenders} == {"", *benchmarks.PEERS}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^family must be one of \['tucker2', .*\], got 'tucker3'"):
        benchmarks.cases("tucker3")
    with pytest.raises(ValueError, match=r"^--compare must name some of dense, sequence, .*, got tltroch, x$"):
        benchmarks.names("--compare", "x, dense,tltroch", benchmarks.PEERS)
    assert benchmarks.names("--family", "gates, cp", benchmarks.FAMILIES) == ["cp", "gates"]
    assert benchmarks.names("--family", "", benchmarks.FAMILIES) == list(benchmarks.FAMILIES)


def test_only_named_peers_are_compared() -> None:
    (case, *_) = benchmarks.cases("tucker2", "cpu")
    names = {each.name for each in benchmarks.compared(case, ["tltorch"])}
    assert names == {"auto", "cuda", "triton", "tltorch factorized", "tltorch reconstructed"}
    assert {each.name for each in benchmarks.compared(case, None)} == {each.name for each in case.contenders}


def test_a_missing_package_is_a_reason() -> None:
    assert _peers.missing("no_such_package") == "no_such_package is not installed"
    assert _peers.missing("no_such_package.part") == "no_such_package is not installed"
    assert _peers.missing("math") == ""


def test_kernels_that_cannot_run_are_reasons(monkeypatch) -> None:
    monkeypatch.setattr(_backends, "interpreting", lambda: True)
    found = refusals("cp_conv2d", "cpu")
    assert found == {"triton": "Triton's interpreter is no contender"}
    monkeypatch.setattr(_backends, "interpreting", lambda: False)
    assert "TRITON_INTERPRET is off" in refusals("tucker2_conv2d", "cpu")["triton"]
    assert "not on a CUDA device" in refusals("svd", "cpu")["cuda"]


def test_work_tells_how_many_multiplies_are_saved() -> None:
    assert Work(1.0, 1.0, 10, 25).fewer_macs == 2.5
    assert Work(1.0, 1.0).fewer_macs is None


def test_contenders_take_turns_in_every_order() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    moves: list[int] = []
    times = timing.for_seconds(calls, 1e-9, least=20, least_us=0.0, before=lambda: moves.append(len(seen)))
    assert all(len(us) == 20 and min(us) > 0 for us in times.values())
    rounds = ["".join(seen[i : i + 3]) for i in range(6, len(seen), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert moves == list(range(6, 66, 3))  # ahead of each round, behind two that are not kept


def test_short_calls_are_repeated_and_seconds_are_kept(monkeypatch) -> None:
    clock, count = [0.0], [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> None:
        clock[0] += seconds
        count[0] += 1

    us = timing.for_seconds({"short": lambda: takes(50e-6)}, 1e-9, least=3, least_us=1000.0)["short"]
    assert us == pytest.approx([50.0] * 3)
    assert count == [1 + 1 + 3 * (1 + 20)]  # to warm up, to see how long one takes, and 20 a round behind one more
    naps = timing.for_seconds({"nap": lambda: takes(0.01)}, 0.06, least=1, least_us=0.0)["nap"]
    assert naps == pytest.approx([10_000.0] * 6)
    assert len(timing.for_seconds({"nap": lambda: takes(0.01)}, 60.0, most=7)["nap"]) == 7


def test_a_short_call_does_not_pay_for_what_a_long_one_left(monkeypatch) -> None:
    clock, last = [0.0], [""]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(name: str, seconds: float) -> None:
        clock[0] += seconds + (0.01 if name == "short" and last[0] == "long" else 0.0)
        last[0] = name

    calls = {"long": lambda: takes("long", 1.0), "short": lambda: takes("short", 1e-4)}
    us = timing.for_seconds(calls, 1e-9, least=4)
    assert us["short"] == pytest.approx([100.0] * 4)
    assert us["long"] == pytest.approx([1e6] * 4)
    us = timing.for_seconds(calls, 1e-9, least=4, least_us=0.0, led_us=1000.0)
    assert us["short"] == pytest.approx([100.0] * 4)
    us = timing.for_seconds(calls, 1e-9, least=4, least_us=0.0)
    assert max(us["short"]) == pytest.approx(10_100.0)


def test_the_environment_tells_what_figures_depend_on() -> None:
    found = benchmarks.environment()
    assert {"commit", "torch", "triton", "cpu", "cpu_mhz", "cpu_threads", "tf32_cudnn", "peers"} <= set(found)
    assert set(found["cpu_mhz"]) == {"now", "max"}
    assert found["torch"] == torch.__version__
