"""The lifecycle of a compressed network in random orders; `fuzz.py` runs many more of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from lifecycle import Lifecycle
from small_networks import Block, Spec

TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=30,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

SAME: dict[str, Any] = {"kernel_size": (3, 3), "padding": "same", "dilation": (1, 1), "bias": False}


def test_a_grouped_network_in_channels_last_is_saved_and_loaded() -> None:
    twice = Block("twice", {"in_channels": 4, "out_channels": 4, "groups": 2, **SAME}, False, "relu", False)
    plain = Block(
        "plain", {"in_channels": 4, "out_channels": 2, "kernel_size": (3, 3), "groups": 2}, False, "relu", False
    )
    life = Lifecycle()
    life.start(spec=Spec(4, (5, 5), (twice, plain), torch.float32, True, 0))
    life.save_and_load(train=False, input_size=False)
    life.teardown()


def test_a_shared_layer_is_compressed_trained_and_brought_back() -> None:
    twice = Block("twice", {"in_channels": 4, "out_channels": 4, **SAME}, True, "silu", True)
    life = Lifecycle()
    life.start(spec=Spec(4, (8, 6), (twice, twice), torch.float64, False, 1))
    for method in ("trp-channel", "norton"):
        life.make_plan(method=method, knob=0.9, example=True, budget=None)
        life.compress(inplace=False, guard=True, method=method)
        life.train_steps(penalty="projection", steps=2, momentum=0.9)
        life.save_and_load(train=True, input_size=True)
    life.to_dense()
    life.factorize(form="tucker2")
    life.train_steps(penalty="funnel", steps=2, momentum=0.0)
    life.prune(threshold=0.05, example=True)
    life.fuse(now=True)
    life.count(convention="conv_fc")
    life.teardown()
