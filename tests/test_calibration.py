"""calibrate: the second moment of what every convolution sees, of any kind of data, with the model left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Spare, randn
from torch import nn

import fastrank
from fastrank.calibration import Calibration, image_batches


def test_a_moment_is_the_mean_of_the_patches_products():
    """Against patches cut out one by one, with stride, dilation, padding and padding mode."""
    for mode in ("zeros", "reflect", "circular"):
        conv = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode=mode)
        x = randn(5, 3, 9, 8)
        found = fastrank.calibrate(nn.Sequential(conv), x)
        assert isinstance(found, Calibration)
        assert found.images == 5
        padded = F.pad(x, (1, 1, 2, 2), mode="constant" if mode == "zeros" else mode)
        patches = [
            padded[n, :, top : top + 5 : 2, left : left + 2].flatten()
            for n in range(5)
            for top in range(padded.shape[2] - 4)
            for left in range(0, padded.shape[3] - 1, 2)
        ]
        stacked = torch.stack(patches).double()
        assert len(stacked) == conv(x)[:, 0].numel()
        # A mean of float32 products: sqrt of their number roundings of half an ulp of the largest.
        torch.testing.assert_close(
            found.moments["0"].double(), stacked.T @ stacked / len(stacked), rtol=1e-4, atol=1e-5
        )


def test_what_a_layer_computes_is_predicted_by_its_moment():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    x = randn(8, 4, 7, 7)
    moment = fastrank.calibrate(nn.Sequential(conv), x).moments["0"]
    weight = conv.weight.detach().flatten(1)
    energy = float(((weight @ moment) * weight).sum())
    assert energy == pytest.approx(float(conv(x).detach().square().sum(1).mean()), rel=1e-5)


def test_few_patches_are_drawn_towards_white_inputs():
    """As many patches as a patch has entries: half the mean, half white noise of the same energy."""
    conv = nn.Conv2d(3, 2, 3)
    found = fastrank.calibrate(nn.Sequential(conv), randn(27, 3, 3, 3))
    assert found.patches == {"0": 27}
    mean = found.moments["0"]
    white = torch.eye(27) * mean.diagonal().mean()
    torch.testing.assert_close(found.moment("0"), (mean + white) / 2)
    assert float(found.moment("0").diagonal().sum()) == pytest.approx(float(mean.diagonal().sum()), rel=1e-5)
    assert found.moment("1") is None
    assert int(torch.linalg.matrix_rank(found.moment("0"))) == 27


def test_the_model_is_left_as_it_was_and_unfit_layers_are_left_out():
    model = Spare().train()
    model.down.eval()
    flags = [m.training for m in model.modules()]
    found = fastrank.calibrate(model, randn(2, 3, 16, 16))
    assert set(found.moments) == {"stem", "down", "twice", "point"}  # not the grouped one
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_every_kind_of_data_gives_batches():
    x, labels = randn(10, 3, 4, 4), torch.arange(10)
    for data, has_labels in (
        (x, False),
        ((x, labels), True),
        ([x[:4], x[4:]], False),
        (((x[i : i + 5], labels[i : i + 5]) for i in (0, 5)), True),
        (fastrank.data.ImageSet(x, labels, classes=10), True),
    ):
        found = list(image_batches(data, 7))
        assert sum(len(images) for images, _ in found) == 7
        assert all((its is not None) == has_labels for _, its in found)
        if has_labels:
            for images, its in found:
                assert torch.equal(images, x[its])


def test_many_patches_are_sampled_without_a_bias():
    """Above the limit a random part enters: the diagonal is within 6 standard errors of that of all patches."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=0))
    x = randn(6, 1, 64, 64)
    found = fastrank.calibrate(model, x).moments["0"].diagonal()
    patches = F.unfold(x, 3).transpose(0, 1).flatten(1)
    assert patches.shape[1] > 8192
    spread = patches.square().std(1) / 8192**0.5
    assert bool(((found - patches.square().mean(1)).abs() <= 6 * spread).all())


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        ("x", None, {}, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), torch.zeros(1, 2), {}, ValueError, "model must be a model with a convolution that can be"),
        (nn.Conv2d(3, 4, 3), [], {}, ValueError, "data must be of at least one image, got none"),
        (nn.Conv2d(3, 4, 3), 7, {}, TypeError, "data must be a batch of images, a data set, or an iterable"),
        (nn.Conv2d(3, 4, 3), ["x"], {}, TypeError, r"data \(a batch of it\) must be a torch.Tensor, got str"),
        (nn.Conv2d(3, 4, 3), torch.zeros(2, 3), {}, ValueError, r"data \(a batch of it\) must be of shape"),
        (nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 5, 5), {"images": 0}, ValueError, "images must be an int"),
        (
            nn.Conv2d(3, 4, 3),
            torch.full((1, 3, 5, 5), float("nan")),
            {},
            ValueError,
            r"data \(what the layer '' sees of it\) must be finite",
        ),
    ],
)
def test_bad_input_is_one_sentence(model, data, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastrank.calibrate(model, data, **options)
