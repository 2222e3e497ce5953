"""The page of a run: whole HTML that fetches nothing, shows what was measured, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastrank
from fastrank import cli, demo, report
from fastrank.methods import funnel
from fastrank.report import _svg
from fastrank.report._sections import LAYERS

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """Checks that tags nest, and keeps tags, ids, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def checked(folder: Path) -> Page:
    """The page of the run in `folder`, which has to be whole and to stand alone."""
    path = report.write_html(folder)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    page = Page(text)
    for name, value in page.attributes:
        assert name not in ("src", "href", "onload", "onclick", "action"), (name, value)
    assert not re.search(r"https?:|url\(|@import|<script|javascript:", text, re.IGNORECASE)
    assert "nan" not in re.findall(r'="(nan|inf)', text)
    return page


def small() -> nn.Module:
    torch.manual_seed(0)
    return fastrank.models.build("lenet5_nrmf")


STAGE = {"top1": 90.0, "top5": 99.0, "loss": 0.5, "count": 4, "macs": 200, "params": 100}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks are so small that several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def summary_of(**changes: Any) -> str:
    summary = {"model": {"name": "lenet5_nrmf"}, "data": {"name": "digits", "size": 8}, "dense": STAGE}
    summary |= {"compressed": {**STAGE, "top1": 70.0, "macs": 50, "params": 30}, "finetuned": {**STAGE, "macs": 50}}
    return json.dumps({**summary, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished recipe leaves, but for its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "nrmf"
    model = small()
    recorder = report.Recorder(model, folder / "train")
    recorder(1, {"loss": 2.0, "penalty": 0.5, "test_top1": 50.0})
    recorder(2, {"loss": 0.01, "penalty": 0.4, "test_top1": 80.0})
    (folder / "summary.json").write_text(summary_of())
    (folder / "recipe.json").write_text(json.dumps({"compress": {"method": "nrmf"}, "train": {"epochs": 2}}))
    network = fastrank.compress(model, fastrank.make_plan(model, "nrmf", energy=0.5))
    network.fastrank_plan.save(folder / "plan.json")
    fastrank.save(network, folder / "model.safetensors")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_the_page_of_a_recipe_shows_what_was_measured(run: Path) -> None:
    page = checked(run)
    for word in ("nrmf", "lenet5_nrmf", "digits", "finetuned", "70.00", "90.00", "4.00×", "after epoch 0, 1, 2"):
        assert word in page.text, word
    for word in ("conv3, mode4", "energy of each unfolding", "Test accuracy", "Penalty"):
        assert word in page.text, word
    assert page.tags.count("svg") >= 10
    assert "This run has no gated layers" in page.text
    assert "Not known of two networks, so not drawn: time." in page.text


def test_layers_cost_what_they_cost(run: Path) -> None:
    page = checked(run)
    model = fastrank.load(run / "model.safetensors")
    counted = fastrank.complexity.count(model, (1, 8, 8)).per_layer
    dense = fastrank.complexity.count(small(), (1, 8, 8)).per_layer
    for name in model.fastrank_plan.compressed:
        for cost in (counted[name], dense[name]):
            assert f"{cost.params:,}" in page.text, (name, cost)
            assert f"{cost.macs:,}" in page.text, (name, cost)


def test_estimates_of_a_plan_are_shown_as_they_are(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    costs = {
        "params": 11,
        "macs": 12,
        "latency_us": 13.0,
        "dense_params": 211,
        "dense_macs": 212,
        "dense_latency_us": 213.0,
    }
    for layer in plan["layers"].values():
        layer["estimate"] = costs
    (copy / "plan.json").write_text(json.dumps(plan))
    (copy / "model.safetensors").unlink()
    page = checked(copy)
    assert "time, µs before" in page.text
    for value in costs.values():
        assert f"{value:.0f}" in page.text


def test_the_page_of_the_demo(tmp_path: Path) -> None:
    committed = Path(__file__).resolve().parents[1] / "bench" / "results" / "demo-cpu.json"
    (tmp_path / "summary.json").write_bytes(committed.read_bytes())
    summary = json.loads(committed.read_text())
    page = checked(tmp_path)
    for row in summary["rows"]:
        assert f"{row['training']}, {row['rule']}" in page.text
        assert f"{row['accuracy_finetuned']:.2f}" in page.text
        assert f"{row['latency']['p50_us'] / 1000:.2f}" in page.text
    assert "Accuracy against time" in page.text
    assert [row["rule"] for row in summary["rows"]][: len(demo.RULES)] == list(demo.RULES)


def test_gates_and_many_layers(tmp_path: Path) -> None:
    gated = funnel.factorize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)))
    recorder = report.Recorder(gated, tmp_path / "close")
    with torch.no_grad():
        gated.get_parameter("2.gate_in")[:3] = 0
    recorder(1)
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(LAYERS + 3)))
    report.Recorder(deep, tmp_path / "deep")(1)
    page = checked(tmp_path)
    assert "gate_core" in page.text
    assert "3 of 9 exactly 0 at the end" in page.text
    assert f"the {LAYERS} of {LAYERS + 3} layers whose ranks fell most" in page.text
    assert "rect" in page.tags  # the ranks of many layers are a heat map


def test_missing_parts_say_why(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    page = checked(tmp_path)
    for word in (
        "No network was measured yet",
        "No training in this folder has finished an epoch",
        "No trajectory of kernels was recorded",
        "No trajectory of ranks or gates",
        "no gated layers",
        "No plan.json in this folder",
        "not finished",
    ):
        assert word in page.text, word


def test_everything_from_files_is_escaped(copy: Path) -> None:
    stages = {f"stage {EVIL}": STAGE, "other": {**STAGE, "params": EVIL, "macs": EVIL}}
    named = {"model": {"name": EVIL}, "data": {"name": EVIL}, "fastrank": EVIL, "machine": {"torch": EVIL}}
    (copy / "summary.json").write_text(summary_of(**stages, **named))
    (copy / "recipe.json").write_text(json.dumps({"compress": {"method": EVIL}, EVIL: EVIL}))
    plan = json.loads((copy / "plan.json").read_text())
    plan["layers"] = {EVIL: {"method": "dense", "reason": EVIL}}
    (copy / "plan.json").write_text(json.dumps(plan))
    evil = nn.Module()
    evil.add_module(EVIL.replace(".", ""), nn.Conv2d(2, 3, 3))
    report.Recorder(evil, copy / "evil & <i>")(1, {EVIL: 1.0})
    page = checked(copy)
    assert "script" not in page.tags
    assert page.text.count("alert(1)") > 8


def test_values_of_a_wrong_kind_do_not_break_the_page(tmp_path: Path) -> None:
    wrong = {"rows": [3, {"training": 1, "params": "x"}], "dense": {"plain": 3, "b": {}}, "seconds": "x", "machine": 3}
    (tmp_path / "summary.json").write_text(json.dumps({**wrong, "model": 3, "data": [], "input_size": ["x", 1]}))
    checked(tmp_path)


def test_a_damaged_plan_or_model_is_named_on_the_page(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"x" * 50)
    assert "What layers cost before and after is not known: " in checked(copy).text
    (copy / "plan.json").write_text("{")
    assert "plan.json cannot be read: " in checked(copy).text


def test_folders_that_will_not_do(tmp_path: Path, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run must be the folder of a run, .* which has neither"):
        report.write_html(tmp_path)
    with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
        report.write_html(run, tmp_path / "no" / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ValueError, match="path must be a file, got .*page.html, which is none"):
        report.write_html(run, tmp_path / "page.html")
    (tmp_path / "recipe.json").write_text("{")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="whole recipe.json, got .*recipe.json, which is no JSON"):
        report.write_html(tmp_path)
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 60), (-3, 7), (0.02, 0.021), (98.2, 99.1), (1, 3e9), (5, 5.000001)]
)
def test_ticks_are_round_and_on_the_axis(low: float, high: float) -> None:
    found = _svg.Axis(low, high, "").ticks()
    assert 2 <= len(found) <= 7
    air = 1e-8 * (high - low)
    assert all(low - air <= tick <= high + air for tick in found)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.3, 2), (1e-9, 1e9), (4e5, 8e6)])
def test_ticks_of_a_logarithmic_axis(low: float, high: float) -> None:
    found = _svg.Axis(low, high, "", log=True).ticks()
    assert 1 <= len(found) <= 6
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in found)


def test_the_command_writes_the_page(copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def command(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastrank", "report", *map(str, args)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    code, text, _ = command(copy)
    assert (code, "report.html" in text) == (0, True)
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    code, text, _ = command(copy, "--out", copy / "pages", "--json")
    assert (code, json.loads(text)["page"]) == (0, str(copy / "pages" / "report.html"))
    code, _, error = command(copy / "no")
    assert (code, error.count("\n")) == (2, 1)
    code, _, error = command(copy, "--out", copy / "plan.json")
    assert (code, error) == (2, f"fastrank: File exists: {copy / 'plan.json'}\n")
    (copy / "train" / report.TRAJECTORY_FILE).write_text("{}\n")
    code, _, error = command(copy)
    assert (code, "trajectory.jsonl, which is damaged in line 1" in error) == (2, True)
