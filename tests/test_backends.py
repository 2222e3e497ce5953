"""The choice of a backend is a pure function of facts, and every refusal says why in one sentence."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastrank import _backends
from fastrank._backends import AUTO, BACKENDS, NAMES, Facts, Verdict, choose, explain, facts

READY = Facts(
    "gated_factor", "cuda", torch.float32, interpreter=False, missing_triton="", missing_cuda="", missing_host=""
)
HOST = replace(READY, device="cpu")
INTERPRETED = replace(HOST, interpreter=True)
OPS = sorted(BACKENDS)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_a_backend_that_runs_everywhere(op):
    for device, dtype in itertools.product(("cpu", "cuda", "meta"), (torch.float64, torch.float32, torch.bfloat16)):
        here = Facts(op, device, dtype, False, "no triton", "no cuda", "no host")
        chosen = choose(here, "auto")
        assert chosen in (BACKENDS[op][0], AUTO.get((op, device)))
        assert explain(here)[chosen] == Verdict(True)


@pytest.mark.parametrize("op", OPS)
def test_every_backend_is_explained_and_what_is_refused_is_never_replaced(op):
    for here in (
        replace(f, op=op)
        for f in (READY, HOST, INTERPRETED, replace(READY, missing_cuda="not built", missing_triton="not there"))
    ):
        verdicts = explain(here)
        assert set(verdicts) == set(NAMES) - {"auto"}
        for name, verdict in verdicts.items():
            assert bool(verdict) == (verdict.reason == "")
            if verdict:
                assert name in BACKENDS[op]
                assert choose(here, name) == name
                continue
            with pytest.raises(ValueError, match=f"^backend='{name}' cannot run {op} here: ") as caught:
                choose(here, name)
            assert str(caught.value).endswith(f"here: {verdict.reason}")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "here", "reason"),
    [
        ("triton", READY, ""),
        ("triton", INTERPRETED, ""),
        ("triton", replace(READY, missing_triton="gone"), "gone"),
        ("triton", HOST, "the tensor is on cpu and TRITON_INTERPRET is off"),
        ("triton", replace(READY, interpreter=True), "the tensor is on cuda and TRITON_INTERPRET is on"),
        ("triton", replace(INTERPRETED, dtype=torch.bfloat16), "Triton's interpreter computes bfloat16 wrongly"),
        (
            "triton",
            replace(READY, dtype=torch.float64),
            "the Triton kernels take float32, float16 and bfloat16, not torch.float64",
        ),
        ("cuda", READY, ""),
        ("cuda", HOST, "the tensor is on cpu, not on a CUDA device"),
        ("cuda", replace(READY, missing_cuda="unbuilt"), "unbuilt"),
        (
            "cuda",
            replace(READY, dtype=torch.float64),
            "the CUDA kernels take float32, float16 and bfloat16, not torch.float64",
        ),
        ("host", HOST, ""),
        ("host", READY, "the tensor is on cuda; the host build of the kernels reads CPU memory"),
        ("host", replace(HOST, missing_host="unbuilt"), "unbuilt"),
        ("host", replace(HOST, dtype=torch.float16), "the host build of the kernels takes float32, not torch.float16"),
        ("sequence", READY, "gated_factor has no sequence backend"),
        ("reference", replace(READY, dtype=torch.float64), ""),
    ],
)
def test_each_reason(name, here, reason):
    assert explain(here)[name] == Verdict(reason == "", reason)


def test_facts_hold_nothing_of_the_values():
    x = torch.zeros(2, dtype=torch.float16)
    assert facts("svd", x) == facts("svd", torch.ones(5, 5, dtype=torch.float16))
    assert (facts("svd", x).device, facts("svd", x).dtype, facts("svd", x).op) == ("cpu", torch.float16, "svd")


def test_the_interpreter_is_read_at_the_call(monkeypatch):
    for value, wanted in (("1", True), ("0", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert facts("svd", torch.zeros(1)).interpreter is wanted
    monkeypatch.delenv("TRITON_INTERPRET")
    assert _backends.interpreting() is False


def test_names_that_are_no_backend():
    with pytest.raises(ValueError, match=r"^backend must be one of .*got 'refrence' \(did you mean 'reference'\?\)"):
        choose(HOST, "refrence")
    with pytest.raises(TypeError, match=r"^backend must be one of .*got int"):
        choose(HOST, 1)
