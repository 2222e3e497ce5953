"""Interleaved timing: the right number of calls in a fair order, modes restored, quantiles that are quantiles."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import nn

from fastrank import latency
from fastrank.latency import Latency, compare
from fastrank.nn import FusedTucker2Conv

X = torch.zeros(1, 3, 8, 8)


def test_a_slower_contender_measures_slower_and_quantiles_are_ordered():
    found = compare({"slow": lambda x: time.sleep(4e-3), "fast": lambda x: time.sleep(1e-3)}, X, rounds=9)
    assert set(found) == {"slow", "fast"}
    for entry, least in ((found["slow"], 4e3), (found["fast"], 1e3)):
        assert entry.samples == 9
        assert least <= entry.p20_us <= entry.p50_us <= entry.p80_us
    assert found["fast"].p50_us < found["slow"].p50_us


def test_percentiles_are_those_of_the_samples(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(latency, "_repeats", lambda *_: 1)
    monkeypatch.setattr(latency, "_seconds", lambda *_: next(clock) * 1e-6)
    found = compare({"only": lambda x: x}, X, rounds=101)["only"]
    assert found == Latency(p50_us=pytest.approx(50), p20_us=pytest.approx(20), p80_us=pytest.approx(80), samples=101)


def test_contenders_take_turns_in_a_rotating_order(monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "_repeats", lambda *_: 1)
    compare({name: (lambda x, name=name: calls.append(name)) for name in "abc"}, X, rounds=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    calls = []
    compare({"short": calls.append}, X, rounds=2, warmup=0)
    assert len(calls) > 100


def test_modules_run_in_eval_mode_without_gradients_and_get_their_mode_back():
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Dropout().eval()

        def forward(self, x):
            seen.append((self.training, self.inner.training, torch.is_grad_enabled()))

    probe = Probe()
    compare({"probe": probe, "layer": FusedTucker2Conv(3, 4, 3, 2)}, X, rounds=2)
    assert set(seen) == {(False, False, False)}
    assert (probe.training, probe.inner.training) == (True, False)

    def fails(x):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        compare({"probe": probe, "fails": fails}, X)
    assert (probe.training, probe.inner.training, torch.is_inference_mode_enabled()) == (True, False, False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare({}, X), ValueError, r"contenders must be at least one model, got none"),
        (lambda: compare([nn.Identity()], X), TypeError, r"contenders must be a mapping of names to models, got list"),
        (lambda: compare({"a": 3}, X), TypeError, r"contenders\['a'\] must be callable, got int"),
        (lambda: compare({"a": nn.Identity()}, [1.0]), TypeError, r"x must be a torch.Tensor, got list"),
        (lambda: compare({"a": nn.Identity()}, X, rounds=0), ValueError, r"rounds must be an int at least 1, got 0"),
        (lambda: compare({"a": nn.Identity()}, X, rounds=1.5), TypeError, r"rounds must be an int, got float"),
        (lambda: compare({"a": nn.Identity()}, X, warmup=-1), ValueError, r"warmup must be an int at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
