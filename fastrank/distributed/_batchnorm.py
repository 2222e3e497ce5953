"""Batch normalisation over the images of all ranks, on any device: statistics are those of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _checks

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Counted:
    """Whether this rank's images count at the moment: a rank without images computes along with one that does not."""

    here = True


def layers(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations of `model` that training computes statistics in, by name.

    Raises ValueError where one is of a class of its own, whose forward is not known here.
    """
    found: dict[str, nn.modules.batchnorm._BatchNorm] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) not in KINDS:
            what = "False for a model with batch normalisations of other classes than torch.nn's"
            raise _checks.fail("sync_batchnorm", what, f"True with {type(module).__name__} at {name!r}")
        found[name] = module
    return found


def synchronise(model: nn.Module, counted: Counted) -> None:
    """Have every batch normalisation of `model` compute as if all ranks' images were one batch.

    Parameters and buffers stay theirs. In evaluation mode nothing changes.
    """
    for module in layers(model).values():
        module.forward = partial(_forward, module, counted)  # type: ignore[method-assign]


def _forward(module: nn.modules.batchnorm._BatchNorm, counted: Counted, x: Tensor) -> Tensor:
    if not module.training:
        return type(module).forward(module, x)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    weight = wide.new_ones(wide.shape[1]) if module.weight is None else module.weight
    bias = wide.new_zeros(wide.shape[1]) if module.bias is None else module.bias
    normalise: Any = _Normalise.apply
    out, mean, var, count = normalise(wide, weight, bias, module.eps, counted.here)
    if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        share = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        with torch.no_grad():
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), share)
            unbiased = var * (count / (count - 1).clamp(min=1))
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), share)
    return cast(Tensor, out.to(x.dtype))


class _Normalise(torch.autograd.Function):
    """x (N, C, ...), weight and bias (C,) -> y, and the mean, the biased variance (C,) and the count over all ranks.

    One gather of 2·C + 1 numbers forward, one reduction of 2·C backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, counted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels, dims = x.shape[1], [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        count = float(x.numel() // channels) if counted else 0.0
        own = torch.cat([mean, var, mean.new_tensor([count])])
        every = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(every, own)
        # Moments of parts into those of the whole (Chan, Golub, LeVeque 1979), in float64.
        means, variances, counts = every.view(-1, len(own)).double().split_with_sizes([channels, channels, 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        invstd = (var + eps).rsqrt()
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean, var, invstd = mean.to(x.dtype), var.to(x.dtype), invstd.to(x.dtype)
        out = (x - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, invstd, total)
        ctx.shape, ctx.dims, ctx.counted = shape, dims, counted
        ctx.mark_non_differentiable(mean, var, total)
        return out, mean, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, invstd, total = ctx.saved_tensors
        grad, shape = grads[0], ctx.shape
        scaled = (x - mean.view(shape)) * invstd.view(shape)
        sums = torch.cat([grad.sum(ctx.dims), (grad * scaled).sum(ctx.dims)])
        grad_bias, grad_weight = sums.clone().chunk(2)
        dist.all_reduce(sums)
        if not ctx.counted:
            # The statistics do not depend on these images.
            return grad * (invstd * weight).view(shape), grad_weight, grad_bias, None, None
        of_mean, of_scale = (sums / total).to(x.dtype).chunk(2)
        inner = grad - of_mean.view(shape) - scaled * of_scale.view(shape)
        return inner * (invstd * weight).view(shape), grad_weight, grad_bias, None, None
