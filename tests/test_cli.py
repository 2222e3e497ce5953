"""The command line as a user meets it: tables, --json, and one sentence with exit code 2 on bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fastrank
from fastrank import cli

COMMANDS = ("inspect", "plan", "train", "compress", "evaluate", "complexity", "demo", "env")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `fastrank ARGS`."""
    monkeypatch.setattr(sys, "argv", ["fastrank", *map(str, args)])
    try:
        code = cli.main()
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err


@pytest.fixture
def fastrank_command(capsys, monkeypatch):  # type: ignore[no-untyped-def]
    return lambda *args: run(capsys, monkeypatch, *args)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "lenet.safetensors"
    torch.manual_seed(0)
    fastrank.save(fastrank.models.build("lenet5_nrmf"), path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_json(fastrank_command, command: str) -> None:
    code, text, _ = fastrank_command(command, "--help")
    assert code == 0
    assert f"Example: fastrank {command}" in text
    assert "--json" in text


def test_the_commands_are_those_that_are_documented() -> None:
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS)


def test_inspect_lists_every_convolution(fastrank_command) -> None:
    code, text, _ = fastrank_command("inspect", "lenet5_nrmf", "--input", "1,28,28", "--json")
    found = json.loads(text)
    assert code == 0
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "conv3"]
    assert found["layers"][2]["input"] == [7, 7]
    assert found["layers"][2]["params"] == 128 * 256 * 9
    code, text, _ = fastrank_command("inspect", "lenet5_nrmf")
    assert code == 0
    assert "256×128×3×3" in text


def test_plan_compress_inspect_and_evaluate(fastrank_command, saved: Path, tmp_path: Path) -> None:
    plan, small = tmp_path / "plan.json", tmp_path / "small.safetensors"
    size = ("--input", "1,16,16")
    code, text, _ = fastrank_command("plan", saved, "--budget", "macs=0.5", "--out", plan, "--json", *size)
    assert code == 0
    assert json.loads(text) == json.loads(plan.read_text())
    code, text, _ = fastrank_command("compress", saved, "--plan", plan, "--out", small, "--json", *size)
    totals = json.loads(text)
    assert code == 0
    assert totals["macs"]["compressed"] <= 0.5 * totals["macs"]["dense"]
    code, text, _ = fastrank_command("inspect", plan)
    assert code == 0
    assert "tucker2" in text
    code, text, _ = fastrank_command("evaluate", small, "--data", "digits", "--size", "16", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["count"] == 539
    loaded = fastrank.load(small)
    held_out = fastrank.data.load("digits", split="test", size=16)
    assert found["top1"] == pytest.approx(fastrank.train.evaluate(loaded, held_out).top1)


def test_evaluate_works_at_the_size_of_the_data(fastrank_command, saved: Path) -> None:
    code, text, _ = fastrank_command("evaluate", saved, "--data", "digits")
    assert code == 0
    assert text.startswith("Acc@1 ")


def test_complexity_prints_the_norton_row(fastrank_command) -> None:
    args = ("complexity", "--arch", "vgg_16_bn", "-r", "1", "-cpr", "[0.6]*6+[0.8]*7")
    code, text, _ = fastrank_command(*args, "--json")
    found = json.loads(text)
    assert code == 0
    assert found["macs"]["ptflops"] == 4_582_498
    assert (found["params"], found["params_without_block_biases"]) == (150_667, 149_648)
    assert found["reduction_percent"]["ptflops"]["macs"] == pytest.approx(98.54, abs=0.005)
    code, text, _ = fastrank_command(*args)
    assert code == 0
    for number in ("4,582,498", "150,667", "149,648", "98.54 %", "99.00 %"):
        assert number in text


def test_env_says_what_is_missing_and_why(fastrank_command) -> None:
    code, text, _ = fastrank_command("env", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["torch"]["version"] == torch.__version__
    assert set(found["compiled"]) == {"_C", "_C_cuda", "_host"}
    assert all(found["compiled"].values())
    assert set(found["backends"]) == {op for op in found["backends"] if hasattr(fastrank.ops, op)}
    code, text, _ = fastrank_command("env")
    assert code == 0
    for word in ("fastrank._C_cuda", "gated_factor", "torch"):
        assert word in text


BAD = {
    "unknown model": (("inspect", "resnet21"), "did you mean 'resnet_20'"),
    "unknown torchvision model": (("inspect", "torchvision:resnet19"), "resnet18"),
    "missing model file": (("evaluate", "nowhere.safetensors", "--data", "digits"), "nowhere.safetensors"),
    "unknown data": (("evaluate", "lenet5_nrmf", "--data", "mnist"), "digits"),
    "no data root": (("evaluate", "resnet_20", "--data", "cifar10"), "root"),
    "unknown method": (("plan", "lenet5_nrmf", "--method", "nrfm"), "did you mean 'nrmf'"),
    "energy out of range": (("plan", "lenet5_nrmf", "--energy", "1.5"), "energy"),
    "option of another method": (("plan", "lenet5_nrmf", "--rank", "3"), "rank"),
    "budget without a share": (("plan", "lenet5_nrmf", "--budget", "macs"), "--budget"),
    "budget of an unknown kind": (("plan", "lenet5_nrmf", "--budget", "joules=0.5"), "macs"),
    "budget out of reach": (("plan", "lenet5_nrmf", "--budget", "params=0.01"), "at least"),
    "input of two numbers": (("inspect", "lenet5_nrmf", "--input", "28,28"), "--input"),
    "input too small": (("inspect", "lenet5_nrmf", "--input", "1,1,1"), "1, 1"),
    "missing plan": (("inspect", "nowhere.json"), "nowhere.json"),
    "missing recipe": (("train", "nowhere.yaml"), "nowhere.yaml"),
    "rates of the wrong length": (("complexity", "--arch", "resnet_56", "-cpr", "[0.1]*3"), "30"),
    "rates that are code": (("complexity", "--arch", "resnet_56", "-cpr", "__import__('os')"), "compress_rate"),
    "rank of a saved model": (("complexity", "--arch", "x.safetensors", "-r", "2"), "saved model"),
    "output in a missing folder": (("plan", "lenet5_nrmf", "--out", "no/such/folder/plan.json"), "no/such/folder"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_one_sentence_and_exit_code_2(fastrank_command, case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, expected = BAD[case]
    code, _, error = fastrank_command(*args)
    assert code == 2
    assert error.startswith("fastrank: ")
    assert expected in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_broken_plan_writes_nothing(fastrank_command, saved: Path, tmp_path: Path) -> None:
    plan, small = tmp_path / "plan.json", tmp_path / "small.safetensors"
    plan.write_text(
        '{"format": "fastrank-plan", "version": 1, "layers": {"conv9": {"method": "tucker2", "ranks": [1, 1]}}}'
    )
    code, _, error = fastrank_command("compress", saved, "--plan", plan, "--out", small)
    assert code == 2
    assert "conv9" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_unknown_options_end_with_code_2(fastrank_command) -> None:
    code, _, error = fastrank_command("inspect", "lenet5_nrmf", "--enregy", "0.9")
    assert code == 2
    assert "--enregy" in error
