"""The state of a training run, and it as one safetensors file: written whole, refused where it is another run's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastrank import _checks, _files
from fastrank.data._batches import batch_generator
from fastrank.distributed import ALONE, Parallel
from fastrank.distributed._parallel import placed_as
from fastrank.regularize.base import Regularizer
from fastrank.train._optimizer import state_names
from fastrank.train._progress import EpochRow

FORMAT = 1
KEY = "fastrank.checkpoint"
MODEL = "model/"
STATE = {"momentum_buffer": "momentum/", "exp_avg": "exp_avg/", "exp_avg_sq": "exp_avg_sq/", "step": "adam_step/"}
TENSOR = "__tensor__"
SCALARS = ("() float32", "() float64")
PARTS: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "trained": list,
    "step": int,
    "seconds": (int, float),
    "history": list,
    "scaler": dict,
    "regularizers": list,
}
FileName = str | os.PathLike[str]


@dataclass
class Run:
    """Everything that the next step depends on, and what must agree for a checkpoint to continue this run.

    `identity` is flat and JSON-able; `step` counts optimizer steps tried since the start, `totals` are sums over the
    current epoch, `history` holds the finished epochs, `seconds` is the time that the current one has taken.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    regularizers: Sequence[Regularizer]
    device: torch.device
    identity: dict[str, Any]
    totals: Tensor
    step: int = 0
    seconds: float = 0.0
    history: list[EpochRow] = field(default_factory=list)
    parallel: Parallel = ALONE

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def save(path: FileName, run: Run) -> None:
    """Write `run` and the state of torch's random number generators to `path`, atomically."""
    tensors, header = contents(run)
    _files.save_tensors(path, tensors, {KEY: json.dumps(header)})


def contents(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that `restore` needs: tensors by name, sharded ones as they are, and the rest, which is JSON."""
    tensors = {MODEL + name: tensor for name, tensor in model_state(run.model).items()}
    for name, parameter in run.trained().items():
        for key, tensor in run.optimizer.state.get(parameter, {}).items():
            if key in state_names(run.optimizer) and tensor is not None:
                tensors[STATE[key] + name] = tensor
    tensors[random_key("cpu", run)] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors[random_key("cuda", run)] = torch.cuda.get_rng_state(run.device)
    tensors["totals"] = run.totals
    states = [regularizer.state_dict() for regularizer in run.regularizers]
    header = {
        "format": FORMAT,
        "identity": run.identity,
        "trained": list(run.trained()),
        "step": run.step,
        "seconds": run.seconds,
        "history": [asdict(row) for row in run.history],
        "scaler": run.scaler.state_dict(),
        "regularizers": _pack("regularizers", states, tensors),
    }
    return tensors, header


def random_key(device: str, run: Run) -> str:
    """The name under which this rank's random numbers are kept; rank 0 has those that one process would have."""
    return f"random/{device}" + (f"/{run.parallel.rank}" if run.parallel.rank else "")


def restore(path: FileName, run: Run) -> None:
    """Bring `run` to where the checkpoint at `path` left it, bit for bit.

    Raises ValueError, naming the first difference and changing nothing, where the file is damaged or belongs to a run
    with another identity or another model.
    """
    tensors, metadata = _files.load_tensors(path)
    if KEY not in metadata:
        raise _checks.fail("run_dir", "a folder whose checkpoint is one of a training run", f"{path} of another kind")
    header = parsed(path, metadata[KEY])
    require(path, header, tensors, run)
    take(path, header, tensors, run)


def require(path: FileName, header: dict[str, Any], tensors: Mapping[str, Tensor], run: Run) -> None:
    """Raise ValueError where the checkpoint is damaged or another run's; of the tensors only sizes and dtypes count."""
    _require_same(path, header, group(tensors, MODEL), run)
    _require_whole(path, header, tensors, moments_in(tensors, run), run)


def moments_in(tensors: Mapping[str, Tensor], run: Run) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers: its name for it -> parameter -> tensor."""
    return {key: group(tensors, STATE[key]) for key in state_names(run.optimizer)}


def take(path: FileName, header: dict[str, Any], tensors: Mapping[str, Tensor], run: Run) -> None:
    """Put into `run` what a checkpoint held; whole tensors are cut where the run has sharded ones.

    Raises ValueError, changing nothing, where a regulariser does not take its state.
    """
    moments = moments_in(tensors, run)
    _take_states(path, header["regularizers"], tensors, run.regularizers)
    run.model.load_state_dict(placed_as(model_state(run.model), group(tensors, MODEL)))
    trained = run.trained()
    for key, found in moments.items():
        for name, tensor in (found if key == "step" else placed_as(trained, found)).items():
            own = tensor if key == "step" else torch.empty_like(trained[name]).copy_(tensor)
            run.optimizer.state[trained[name]][key] = own
    if header["scaler"]:
        run.scaler.load_state_dict(header["scaler"])
    if random_key("cpu", run) in tensors:
        torch.set_rng_state(tensors[random_key("cpu", run)])
    else:  # a rank that was not there: numbers of its own, which no one has drawn yet
        fresh = batch_generator(run.identity["seed"], run.parallel.rank, header["step"])
        torch.default_generator.manual_seed(fresh.initial_seed())
    if run.device.type == "cuda" and random_key("cuda", run) in tensors:
        torch.cuda.set_rng_state(tensors[random_key("cuda", run)], run.device)
    run.totals = tensors["totals"].to(run.device)
    run.step, run.seconds = header["step"], header["seconds"]
    run.history = [EpochRow(**row) for row in header["history"]]


def _take_states(
    path: FileName, packed: Any, tensors: Mapping[str, Tensor], regularizers: Sequence[Regularizer]
) -> None:
    """Give every regulariser its state, or none of them."""
    before = [regularizer.state_dict() for regularizer in regularizers]
    try:
        for regularizer, state in zip(regularizers, _unpack(packed, tensors), strict=True):
            regularizer.load_state_dict(state)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        for regularizer, state in zip(regularizers, before, strict=True):
            regularizer.load_state_dict(state)
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{broken(path, 'regularizers')}: {reason}") from error


def parsed(path: FileName, text: str) -> dict[str, Any]:
    """The header, with its format and the types of its parts checked."""
    try:
        header: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken(path, "header") from error
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise _mismatch(path, "format", version, FORMAT)
    for name, kind in PARTS.items():
        if not isinstance(header.get(name), kind):
            raise broken(path, name)
    return cast("dict[str, Any]", header)


def _require_same(path: FileName, header: Mapping[str, Any], kept: Mapping[str, Tensor], run: Run) -> None:
    """Raise ValueError on the first difference in configuration, in the model's tensors, in what is trained."""
    for name, want in json.loads(json.dumps(run.identity)).items():
        if header["identity"].get(name) != want:
            raise _mismatch(path, name, header["identity"].get(name), want)
    current = model_state(run.model)
    for name in [*current, *kept]:
        if _describe(kept.get(name)) != _describe(current.get(name)):
            raise _mismatch(path, f"model tensor {name}", _describe(kept.get(name)), _describe(current.get(name)))
    trained = run.trained()
    for name in [*trained, *header["trained"]]:
        if (name in header["trained"]) != (name in trained):
            raise _mismatch(path, f"requires_grad of {name}", name in header["trained"], name in trained)


def _require_whole(
    path: FileName,
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    run: Run,
) -> None:
    """Raise ValueError on a part that would fail, or be taken for something else, halfway through a restore."""
    columns = {column.name for column in fields(EpochRow)}
    whole = {
        "step": header["step"] >= 0,
        "scaler": header["scaler"].keys() == run.scaler.state_dict().keys()
        and all(_checks.finite_number(value) for value in header["scaler"].values()),
        "regularizers": len(header["regularizers"]) == len(run.regularizers),
        "history": all(_is_row(row, columns) for row in header["history"]),
        "momentum": _belong(moments, run.trained()),
        "random/cpu": _describe(tensors.get("random/cpu")) == _describe(torch.get_rng_state()),
        "totals": _describe(tensors.get("totals")) == _describe(run.totals),
    }
    for name, good in whole.items():
        if not good:
            raise broken(path, name)


def _is_row(row: Any, columns: set[str]) -> bool:
    """Whether it has the columns of a row of the history, and values of their kinds."""
    if not isinstance(row, dict) or row.keys() != columns:
        return False
    if type(row["epoch"]) is not int or not isinstance(row["metrics"], dict):
        return False
    numbers = [value for name, value in row.items() if name not in ("epoch", "metrics") and value is not None]
    return all(type(value) in (int, float) for value in [*numbers, *row["metrics"].values()])


def _belong(moments: Mapping[str, Mapping[str, Tensor]], trained: Mapping[str, Tensor]) -> bool:
    """Whether every parameter that has one of the optimizer's tensors is trained and has them all, in its shape."""
    first = next(iter(moments.values()))
    return all(found.keys() == first.keys() <= trained.keys() for found in moments.values()) and all(
        _describe(tensor) in (SCALARS if key == "step" else [_describe(trained[name])])
        for key, found in moments.items()
        for name, tensor in found.items()
    )


def broken(path: FileName, part: str) -> ValueError:
    return _checks.fail("run_dir", "a folder whose checkpoint is whole", f"{path}, unusable in its part {part!r}")


def _mismatch(path: FileName, name: str, got: object, want: object) -> ValueError:
    return ValueError(
        f"run_dir must be free or hold a checkpoint of this run, got {path} with {name} {got} where this run has {want}"
        "; resume=False starts over"
    )


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def model_state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise _checks.fail_type(f"model.state_dict()[{name!r}]", "a torch.Tensor", value)
    return state


def _pack(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor moved into `tensors` and named in its place; the rest must be JSON."""
    if isinstance(value, Tensor):
        unique = f"{name}#{len(tensors)}"  # a key may hold the separator
        tensors[unique] = value
        return {TENSOR: unique}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _checks.fail_type(f"keys of {name}", "str", key)
        return {key: _pack(f"{name}/{key}", item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(f"{name}/{position}", item, tensors) for position, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _checks.fail_type(name, "a tensor, number, str or container of these", value)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value
