"""Several ranks that train one model together: each on its share of every batch, with the weights of one process.

The loss of a rank is weighted by its share of the images, so that the mean of the ranks' gradients is the gradient of
the whole batch, also where the shares differ in size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _checks
from fastrank.data import span
from fastrank.distributed import _batchnorm
from fastrank.regularize._kernels import is_sharded, laid_out_as
from fastrank.regularize._spectral import SpectralRegularizer
from fastrank.regularize.base import Regularizer
from fastrank.regularize.nuclear import GramTrace

KINDS = ("ddp", "fsdp")
SHARDED_ALONG = 1 << 13
"""Parameters from which on a block is gathered by itself; smaller ones are gathered with the rest of the network."""


class Parallel:
    """The ranks of the default process group in a training run; alone where `kind` is None.

    kind: "ddp", every rank holds the whole model, or "fsdp", parameters, gradients and the optimizer's memory are
    sharded (torch's FSDP2). sync_batchnorm: batch statistics over all ranks, as one process has them; False: each
    rank's own, and the buffers of rank 0 count.
    Raises ValueError or TypeError for a wrong argument, RuntimeError where there is no process group.
    """

    def __init__(self, kind: str | None = None, *, sync_batchnorm: bool = True) -> None:
        if not isinstance(sync_batchnorm, bool):
            raise _checks.fail_type("sync_batchnorm", "a bool", sync_batchnorm)
        self.kind = None if kind is None else _checks.choice("parallel", kind, KINDS)
        self.sync_batchnorm = sync_batchnorm
        self.rank, self.world = 0, 1
        if kind is not None:
            if not (dist.is_available() and dist.is_initialized()):
                what = "a process group: start the program with torchrun and enter fastrank.distributed.joined()"
                raise RuntimeError(f"parallel={kind!r} must have {what}, got none")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.counted = _batchnorm.Counted()

    @property
    def main(self) -> bool:
        """Whether this rank reports and writes."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This rank's number, and how many there are."""
        return self.rank, self.world

    def images(self, count: int) -> int:
        """How many of a batch's images are this rank's; with 0 it computes along with one that does not count."""
        first, end = span(count, *self.part)
        return end - first

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, added up over the ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def lowest(self, value: int, device: torch.device) -> int:
        """The lowest value that a rank has."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def decide(self, value: Any) -> Any:
        """What rank 0 says."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, on all of them."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Bring rank 0's values to all ranks, in place."""
        if self.world == 1:
            return
        waiting = []
        for tensor in tensors:
            own = tensor.detach()
            sent = own.contiguous()
            work = dist.broadcast(sent.view(torch.uint8) if sent.dtype == torch.bool else sent, 0, async_op=True)
            waiting.append((work, own, sent))
        for work, own, sent in waiting:
            work.wait()
            if not own.is_contiguous():
                own.copy_(sent)

    @contextmanager
    def prepared(
        self, model: nn.Module, regularizers: Sequence[Regularizer] = ()
    ) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The module to evaluate and keep, and the one to call in training; alone, `model` is both.

        With several ranks they are made of a twin of `model`, which has other modules and the same parameters and
        buffers. All ranks start from rank 0's. While parameters are sharded, `model` holds DTensors; at the end it has
        its own parameters back, whole; after an error it is left sharded.
        """
        if self.world == 1:
            yield model, model
            return
        self.agree(local(tensor) for tensor in (*model.parameters(), *model.buffers()))
        twin = twin_of(model)
        if self.sync_batchnorm:
            _batchnorm.synchronise(twin, self.counted)
        if self.kind == "ddp":
            outer = nn.parallel.DistributedDataParallel(twin, broadcast_buffers=False, init_sync=False)
            with warnings.catch_warnings():
                # Of kernels 1×1 or of one channel, whose strides say the same in two ways.
                warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
                yield twin, outer
            return
        whole = kept_whole(model, regularizers)
        owners = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in whole
        ]
        shard(twin, [parameter for parameter in model.parameters() if id(parameter) in whole])
        for _, _, parameter in owners:
            parameter.data = parameter.data.new_empty(0)  # the shards are copies
        yield twin, twin
        reshard(twin)
        gathered: dict[int, Tensor] = {}
        for held, name, parameter in owners:
            if id(parameter) not in gathered:
                sharded: Any = held[name]
                gathered[id(parameter)] = sharded.detach().full_tensor()
                parameter.data = gathered[id(parameter)]
            held[name] = parameter

    def reshard(self, model: nn.Module) -> None:
        """Free what an evaluation has gathered, so that the parameters of `model` are the shards again."""
        if self.kind == "fsdp" and self.world > 1:
            reshard(model)

    def reduce_whole(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients that FSDP leaves to us: of parameters that are kept whole."""
        if self.kind != "fsdp" or self.world == 1:
            return
        grads = [p.grad for p in parameters if not is_sharded(p) and p.grad is not None]
        kinds = {(grad.dtype, grad.device) for grad in grads}
        for kind in sorted(kinds, key=str):
            own = [grad for grad in grads if (grad.dtype, grad.device) == kind]
            flat = torch.cat([grad.flatten() for grad in own])
            dist.all_reduce(flat)
            for grad, mean in zip(
                own, flat.div_(self.world).split_with_sizes([grad.numel() for grad in own]), strict=True
            ):
                grad.copy_(mean.view_as(grad))

    def clip(self, parameters: Iterable[Tensor], norm: float) -> None:
        """Bound the norm of all gradients together, wherever their parts are."""
        parameters = list(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        if not any(is_sharded(grad) for grad in grads):
            nn.utils.clip_grad_norm_(parameters, norm)
            return
        squares = torch.zeros(2, dtype=torch.float64, device=local(grads[0]).device)
        for grad in grads:
            squares[int(is_sharded(grad))] += local(grad).double().square().sum()
        total = (squares[0] + self.sum(squares[1])).sqrt()
        factor = (norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local(grad).mul_(factor.to(grad.dtype))


ALONE = Parallel()


def twin_of(model: nn.Module) -> nn.Module:
    """Other modules with the same parameters and buffers: what replaces one there replaces it in both."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            memo[id(held)] = held
            memo.update({id(tensor): tensor for tensor in held.values() if tensor is not None})
    return copy.deepcopy(model, memo)


def kept_whole(model: nn.Module, regularizers: Sequence[Regularizer]) -> set[int]:
    """The ids of the parameters that are not sharded: scalars, and what regularisers act on that know no shards."""
    whole = {id(parameter) for parameter in model.parameters() if not parameter.dim()}
    for regularizer in regularizers:
        if not isinstance(regularizer, SpectralRegularizer | GramTrace):
            whole |= {id(parameter) for parameter in regularizer.governed().values()}
    return whole


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are gathered together; the model itself, for what is left, is the last one."""
    found: list[nn.Module] = []

    def descend(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                descend(child)
            elif sum(p.numel() for p in child.parameters()) >= SHARDED_ALONG:
                found.append(child)

    descend(model)
    return [*found, model]


def shard(model: nn.Module, whole: Sequence[nn.Parameter]) -> None:
    """FSDP2 over all ranks, block by block; `whole` are left out. Weights are freed after each forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))


def reshard(model: nn.Module) -> None:
    for module in model.modules():
        free = getattr(module, "reshard", None)
        if callable(free) and hasattr(module, "unshard"):
            free()


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here, or the tensor itself; the memory is the same."""
    value: Any = tensor.detach()
    return cast(Tensor, value.to_local() if is_sharded(value) else value)


def placed_as(like: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors found, each laid out as the one of its name in `like`, where that is sharded and it is not."""
    return {
        name: laid_out_as(name, like[name], tensor) if name in like and not is_sharded(tensor) else tensor
        for name, tensor in found.items()
    }
