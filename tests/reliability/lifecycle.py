"""What a user does with a network, in any order: a state machine over plan, compress, train, save, load, resume.

Whatever the order: results are of the promised shape and value, what is refused is refused in one line that names an
argument and changes nothing, and neither the caller's random numbers nor any other file is touched.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import small_networks
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from small_networks import chance, multiply_adds, outputs, same, state_of
from torch import Tensor, nn

import fastrank
from fastrank import Plan, complexity, convert
from fastrank.data import ImageSet
from fastrank.decompose.tucker import max_ranks
from fastrank.methods import funnel
from fastrank.nn._conv import FactoredConv2d
from fastrank.nn._gated import GatedConv2d
from fastrank.nn.svd import max_rank
from fastrank.plan import LAYER_METHODS
from fastrank.regularize import Funnel, GramTrace, LowRankProjection, NuclearNorm, Regularizer
from fastrank.train import TrainConfig, evaluate, fit

REFUSALS = (ValueError, TypeError, FileNotFoundError)
METHODS = ("nrmf", "vbmf", "trp-channel", "trp-spatial", "trp-decoupled", "norton", "auto")
PENALTIES: dict[str, Callable[[nn.Module], Regularizer]] = {
    "nuclear": lambda model: NuclearNorm(model, 1e-4),
    "nuclear, energy": lambda model: NuclearNorm(model, 1e-4, energy=0.9, matricization="spatial"),
    "polar": lambda model: NuclearNorm(model, 1e-4, method="polar"),
    "gram": lambda model: GramTrace(model, 1e-4),
    "projection": lambda model: LowRankProjection(model, every=1, energy=0.9),
    "projection, warm": lambda model: LowRankProjection(model, every=2, energy=0.8, matricization="spatial", warm=True),
    "funnel": lambda model: Funnel(model, 1e-3),
    "funnel, subgradient": lambda model: Funnel(model, 1e-3, step="subgradient"),
}


class Lifecycle(RuleBasedStateMachine):
    """One network, and the plan that was made last. `self.spec.build()` gives the dense network again.

    counts: of all examples of this process, what was asked for, and how often it was refused.
    """

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(spec=small_networks.specs())
    def start(self, spec: small_networks.Spec) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastrank-lifecycle-"))
        self.spec, self.model = spec, spec.build()
        self.dtype = spec.dtype
        self.plan: Plan | None = None
        self.size = (spec.channels, *spec.size)

    def teardown(self) -> None:
        """Remove the files."""
        self.counts["examples"] += 1
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # What holds for every call

    @property
    def x(self) -> Tensor:
        return self.spec.images().to(self.dtype)

    def ask(self, call: Callable[..., Any], *args: Any, files: tuple[str, ...] = (), **options: Any) -> Any:
        """The result, or None where it was refused; checks that nothing was touched that should not be.

        files: names that may be there afterwards and were not before.
        """
        before_chance, there = chance(), self.listed()
        before = state_of(self.model), [module.training for module in self.model.modules()], repr(self.model)
        try:
            result = call(*args, **options)
        except REFUSALS as error:
            said, result = f"{type(error).__name__}: {error}", None
            self.counts[f"{getattr(call, '__name__', 'penalty')}, refused"] += 1
            assert " must " in said, f"a refusal that names no argument: {said}"
            assert "\n" not in said, f"a refusal of several lines: {said}"
            assert same(before[0], state_of(self.model)), f"refused, and the model is another: {said}"
            assert repr(self.model) == before[2], f"refused, and the model is another: {said}"
        self.counts[getattr(call, "__name__", "penalty")] += 1
        assert before[1] == [module.training for module in self.model.modules()] or repr(self.model) != before[2]
        assert chance() == before_chance, f"{call} drew random numbers of the caller's"
        assert self.listed() <= there | set(files), f"{call} left {self.listed() - there - set(files)}"
        return result

    def listed(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    # Plans

    @rule(
        method=st.sampled_from(METHODS),
        knob=st.sampled_from((0.5, 0.9, 1.0)),
        example=st.booleans(),
        budget=st.sampled_from(
            (None, None, {"macs": 0.7}, {"params": 0.6}, {"macs": 0.9, "params": 0.8}, {"macs": 0.01})
        ),
    )
    def make_plan(self, method: str, knob: float, example: bool, budget: dict[str, float] | None) -> None:
        options: dict[str, Any] = {}
        if method == "norton":
            options["rank"] = max(1, int(4 * knob))
        elif method != "vbmf" and budget is None:
            options["energy"] = knob
        before = state_of(self.model)
        found = self.ask(
            fastrank.make_plan, self.model, method, example_input=self.x if example else None, budget=budget, **options
        )
        assert same(before, state_of(self.model))
        if found is not None:
            assert Plan.from_json(found.to_json()) == found
            assert list(found.layers) == [site.name for site in convert.sites(self.model)]
            self.plan = found

    @precondition(lambda self: self.plan is not None and self.plan.layers)
    @rule(data=st.data())
    def edit_plan(self, data: st.DataObject) -> None:
        assert self.plan is not None
        document = json.loads(self.plan.to_json())
        name = data.draw(st.sampled_from(sorted(document["layers"])))
        entry = document["layers"][name]
        method = data.draw(st.sampled_from(sorted(LAYER_METHODS)))
        rank = st.sampled_from((1, 1, 2, 3, 4, 8, 0, -1, 2**40, None, "2", 1.5))
        kind = data.draw(st.sampled_from(("form", "form", "form", "ranks", "name", "drop", "shape", "key")))
        if kind == "form":
            entry |= {"method": method, "ranks": data.draw(st.lists(rank, min_size=LAYER_METHODS[method], max_size=2))}
        elif kind == "ranks":
            entry["ranks"] = data.draw(st.lists(rank, max_size=3))
        elif kind == "name":
            document["layers"][data.draw(st.sampled_from(("", "0", name + ".0", "2", "x.weight")))] = entry
        elif kind == "drop":
            del document["layers"][name]
        elif kind == "shape":
            entry["shape"] = data.draw(st.sampled_from(([], [1, 1, 1, 1], [2, 2], [0, 1, 1, 1], 3)))
        else:
            document[data.draw(st.sampled_from(("x", "format", "version", "options")))] = data.draw(rank)
        found = self.ask(Plan.from_json, json.dumps(document))
        if found is not None:
            self.plan = found

    @rule(inplace=st.booleans(), guard=st.booleans(), method=st.sampled_from(METHODS))
    def compress(self, inplace: bool, guard: bool, method: str) -> None:
        """By the last plan, or by a new one where there is none."""
        if self.plan is None:
            self.plan = fastrank.make_plan(self.model, method)
        model = copy.deepcopy(self.model) if inplace else self.model
        before, shape = state_of(model), outputs(model, self.x).shape
        modules = dict(model.named_modules(remove_duplicate=False))  # a shared one under each of its names
        found = self.ask(fastrank.compress, model, self.plan, inplace=inplace, guard=guard)
        if found is None:
            assert same(before, state_of(model)), "refused, and the model is another"
            return
        assert (found is model) == inplace
        assert inplace or same(before, state_of(model))
        assert outputs(found, self.x).shape == shape
        replaced = [modules[name] for name in found.fastrank_plan.compressed]
        for name, tensor in found.state_dict().items():
            if not any(modules[name.rpartition(".")[0]] is module for module in replaced):
                assert torch.equal(tensor, before[name]), f"{name} is no part of the plan and changed"
        assert all(parameter.dtype == self.dtype for parameter in found.parameters())
        self.model = found

    @rule(method=st.sampled_from([name for name in LAYER_METHODS if name not in ("dense", "cp-layer")]))
    def full_rank(self, method: str) -> None:
        """Every form at full rank is the kernel itself, but for the rounding of a decomposition and of its stages."""
        for site in convert.sites(self.model):
            if site.reason:
                continue
            layer = convert.build(site.conv, _full(site.conv, method))
            weight, eps = site.conv.weight.detach(), torch.finfo(self.dtype).eps
            off = float((layer.to_dense().weight.detach() - weight).norm())
            assert off <= 32 * max(weight.shape) * weight.numel() ** 0.5 * eps * float(weight.norm())
            x = torch.randn(2, weight.shape[1], *(8 * n for n in self.spec.size), generator=_generator()).to(self.dtype)
            exact, bound = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
            with torch.no_grad():
                for parameter in bound.parameters():
                    parameter.abs_()
                room = bound.to_dense()(x.abs().double())  # padding repeats values of x, and keeps their signs
                found, wanted = layer(x).double(), exact.to_dense()(x.double())
            length = 6 + sum(parameter.numel() for parameter in layer.parameters())
            assert bool(((found - wanted).abs() <= length * eps * room + torch.finfo(self.dtype).tiny).all())

    # Training

    @rule(penalty=st.sampled_from(sorted(PENALTIES)), steps=st.integers(1, 2), momentum=st.sampled_from((0.0, 0.9)))
    def train_steps(self, penalty: str, steps: int, momentum: float) -> None:
        made = self.ask(PENALTIES[penalty], self.model)
        if made is None:
            return
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=momentum)
        if self.ask(made.attach, optimizer) is None:
            return
        for _ in range(steps):
            optimizer.zero_grad()
            self.model(self.x.to(self.dtype)).square().mean().backward()
            self.ask(optimizer.step)
        made._attachment.remove()
        assert all(bool(tensor.isfinite().all()) for tensor in self.model.state_dict().values())
        value = self.ask(made.value)
        assert value is not None
        assert bool(value.isfinite())

    @rule(
        penalty=st.sampled_from([None, *sorted(PENALTIES)]),
        images=st.integers(3, 5),
        optimizer=st.sampled_from(("sgd", "adam")),
    )
    def fit_and_resume(self, penalty: str | None, images: int, optimizer: str) -> None:
        """A run that is interrupted and resumed ends, bit for bit, where one that is not ends."""
        pixels = torch.randn(images, *self.size, generator=_generator())
        data = ImageSet(pixels, torch.arange(images) % small_networks.CLASSES, classes=small_networks.CLASSES)
        config = TrainConfig(2, 2, 1e-3, optimizer=optimizer, checkpoint_steps=1)
        if self.dtype != torch.float32:
            return  # a data set hands out float32

        def run(model: nn.Module, where: str, stop: bool = False) -> list[Any] | None:
            made = [] if penalty is None else [PENALTIES[penalty](model)]

            def after(row: Any) -> None:
                if stop:
                    raise InterruptedError

            try:
                return fit(
                    model,
                    data,
                    data,
                    config,
                    regularizers=made,
                    run_dir=self.folder / where,
                    progress=False,
                    on_epoch=after,
                )
            except InterruptedError:
                return []

        names = tuple(f"{n}{rest}" for n in ("whole", "cut") for rest in ("", "/checkpoint.safetensors"))
        whole, cut = copy.deepcopy(self.model), copy.deepcopy(self.model)
        history = self.ask(run, whole, "whole", files=names)
        if history is not None:
            self.ask(run, cut, "cut", True, files=names)
            again = copy.deepcopy(self.model)
            resumed = self.ask(run, again, "cut", files=names)
            assert resumed is not None
            assert same(state_of(whole), state_of(again)), "the resumed run ended elsewhere"
            assert [(row.loss, row.penalty) for row in history] == [(row.loss, row.penalty) for row in resumed]
            self.ask(evaluate, again, data)
            self.model = again
        for name in ("whole", "cut"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @rule(form=st.sampled_from(funnel.FORMS))
    def factorize(self, form: str) -> None:
        found = self.ask(funnel.factorize, self.model, form=form)
        if found is not None:
            assert outputs(found, self.x).shape == outputs(self.model, self.x).shape
            self.model = found

    @precondition(lambda self: any(isinstance(module, GatedConv2d) for module in self.model.modules()))
    @rule(threshold=st.sampled_from((0.0, 0.05, 0.5, 1e9)), example=st.booleans())
    def prune(self, threshold: float, example: bool) -> None:
        found = self.ask(funnel.prune, self.model, threshold, example_input=self.x if example else None)
        if found is not None:
            assert not any(isinstance(module, GatedConv2d) for module in found.modules())
            self.model = found

    # Files and copies

    @rule(train=st.booleans(), input_size=st.booleans())
    def save_and_load(self, train: bool, input_size: bool) -> None:
        self.model.train(train)
        path = self.folder / "model.safetensors"
        self.ask(fastrank.save, self.model, path, input_size=self.size if input_size else None, files=(path.name,))
        assert path.is_file()
        assert self.ask(fastrank.load, path) is None, "a network without a name was built"
        found = self.ask(fastrank.load, path, self.spec.build())
        assert found is not None
        assert same(state_of(found), state_of(self.model))
        assert [type(module) for module in found.modules()] == [type(module) for module in self.model.modules()]
        assert found.training == train
        assert getattr(found, "fastrank_plan", None) == getattr(self.model, "fastrank_plan", None)
        # A file holds contiguous tensors; the library rounds otherwise where a weight lies as torch.channels_last.
        plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        assert torch.equal(outputs(found, self.x), outputs(plain, self.x))
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        fresh = self.spec.build()
        kept = state_of(fresh)
        assert self.ask(fastrank.load, path, fresh) is None
        assert same(kept, state_of(fresh))
        path.unlink()
        self.model = found

    @rule()
    def copies(self) -> None:
        again = copy.deepcopy(self.model)
        assert torch.equal(outputs(again, self.x), outputs(self.model, self.x))
        state = self.model.state_dict()
        again.load_state_dict(state)
        assert same(state_of(again), state_of(self.model))
        self.model = again

    @rule(dtype=st.sampled_from((torch.float32, torch.float64)))
    def change_dtype(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        assert outputs(self.model, self.x).dtype == dtype

    @rule()
    def to_dense(self) -> None:
        found = self.ask(convert.decompress, self.model)
        if found is not None:
            assert not any(isinstance(module, FactoredConv2d) for module in found.modules())
            assert outputs(found, self.x).shape == outputs(self.model, self.x).shape
            self.model = found

    @rule(now=st.sampled_from((True, *[False] * 5)))
    def fuse(self, now: bool) -> None:
        if not now:  # it costs more than all other rules
            return
        before = state_of(self.model)
        found = self.ask(fastrank.fuse_for_inference, self.model, self.x)
        assert same(before, state_of(self.model))
        if found is not None:
            assert outputs(found, self.x).shape == outputs(self.model, self.x).shape
            assert self.ask(fastrank.save, found, self.folder / "x") is None, "a fused network was saved"

    @rule(convention=st.sampled_from(complexity.CONVENTIONS))
    def count(self, convention: complexity.Convention) -> None:
        found = complexity.count(self.model, self.size, convention=convention)
        assert found.params == sum(parameter.numel() for parameter in self.model.parameters())
        assert found.macs == sum(row.macs for row in found.per_layer.values())
        if convention == "conv_fc" and not any(isinstance(module, FactoredConv2d) for module in self.model.modules()):
            assert found.macs == multiply_adds(self.model, self.x[:1])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _full(conv: nn.Conv2d, method: str) -> fastrank.LayerPlan:
    """The layer's plan at its highest ranks."""
    shape = tuple(conv.weight.shape)
    if method == "tucker2":
        return fastrank.LayerPlan(method, max_ranks(shape))
    rank = shape[2] * shape[3] if method == "cp" else max_rank(method.removeprefix("svd-"), shape)
    return fastrank.LayerPlan(method, (rank,))
