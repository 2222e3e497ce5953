"""Several regularisers on one optimizer in a loop by hand: the order against clipping and unscaling."""

from __future__ import annotations

import integration_loops as loops
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastrank import integrations
from fastrank.integrations import attach_all


def trained(how: str, clip_norm: float | None, scale: float | None) -> dict[str, Tensor]:
    """A training with hooks; how: "plain", "closure" (keyword), "positional", or "fused"."""
    model = loops.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=loops.LR, momentum=0.9, fused=how == "fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    regularizers = loops.penalties(model)
    x, y = loops.images()
    with attach_all(regularizers, optimizer, clip_norm=clip_norm):
        for epoch in range(loops.EPOCHS):
            for regularizer in regularizers:
                regularizer.start_epoch(epoch)
            for images, labels in zip(x.split(loops.BATCH), y.split(loops.BATCH), strict=True):

                def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model(images), labels)
                    scaler.scale(loss).backward()
                    return loss

                if how == "closure":
                    optimizer.step(closure=closure)
                elif how == "positional":
                    optimizer.step(closure)
                else:
                    closure()
                    scaler.step(optimizer)
                    scaler.update()
    return dict(model.state_dict())


@pytest.mark.parametrize("norm", [None, 0.05])
@pytest.mark.parametrize(
    ("how", "scale"), [("plain", None), ("plain", 256.0), ("fused", 256.0), ("closure", None), ("positional", None)]
)
def test_penalties_and_clipping_meet_unscaled_gradients(how: str, scale: float | None, norm: float | None) -> None:
    found, wanted = trained(how, norm, scale), loops.by_hand(loops.penalties, clip="all", norm=norm)
    for name, value in wanted.items():
        # Powers of two scale and unscale without rounding. A fused step rounds its own way, by an eps or two of a
        # weight of at most 1, and the seven steps behind it carry that on.
        tolerance = 64 * torch.finfo(torch.float32).eps if how == "fused" else 0.0
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def test_removal_ends_all_hooks() -> None:
    model = loops.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spies = [loops.Spy(model), loops.Spy(model)]
    handle = attach_all(spies, optimizer, clip_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-5, atol=0)
    handle.remove()
    handle.remove()
    model.get_parameter("0.weight").grad = None
    optimizer.step()
    assert [spy.told for spy in spies] == [["add", "after"], ["add", "after"]]


def test_a_failure_attaches_nothing() -> None:
    model = loops.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spy, stranger = loops.Spy(model), loops.Spy(loops.Net())
    with pytest.raises(ValueError, match=r"optimizer must be one that holds .* without that of '0.weight'"):
        attach_all([spy, stranger], optimizer)
    optimizer.step()
    assert spy.told == []
    with pytest.raises(ValueError, match="regularizers must be at least one where clip_norm is given, got none"):
        attach_all([], optimizer, clip_norm=1.0)
    with pytest.raises(ValueError, match="clip_norm must be a finite number above 0, got -1"):
        attach_all(spy, optimizer, clip_norm=-1.0)
    with pytest.raises(TypeError, match=r"regularizers must be fastrank.regularize.Regularizer.*, got int"):
        attach_all([spy, 3], optimizer)
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        _ = integrations.keras
