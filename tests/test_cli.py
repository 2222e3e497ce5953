"""The command line as a user meets it: tables, --json, and one sentence with exit code 2 on bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from coco_files import write_coco
from torch import nn

import fastrank
from fastrank import cli
from fastrank.models.checkpoints import norton_layout

COMMANDS = (
    "inspect", "plan", "train", "compress", "evaluate", "complexity", "bench", "export", "report", "demo", "env",
)  # fmt: skip


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
    assert "auto plan: " in text
    assert "multiply-adds; loses" in text
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
    assert re.fullmatch(r"\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}  loss \d+\.\d{4}  \(539 images\)\n", text)


# What the NORTON README prints for its three examples.
README = {
    "vgg_16_bn -r 1 -cpr [0.6]*6+[0.8]*7": (4582498, 149648, "98.54", "99.00"),
    "densenet_40 -r 8 -cpr [0.]+[0.08]*6+[0.09]*6+[0.08]*26": (213587810, 745468, "26.38", "29.63"),
    "resnet_50 -r 1 -cpr [0.]+[0.1]*2+[0.4]*5+[0.75]*12 --dataset imagenet": (923650408, 5885736, "77.59", "76.97"),
}


@pytest.mark.parametrize("arguments", README, ids=str)
def test_complexity_prints_what_the_norton_readme_prints(fastrank_command, arguments: str) -> None:
    macs, params, fewer_macs, fewer_params = README[arguments]
    code, text, _ = fastrank_command("complexity", "--arch", *arguments.split())
    assert code == 0
    assert text.endswith(
        f"Computational complexity: {macs}\nNumber of parameters: {params}\n"
        f"FLOPs_reduced = {fewer_macs}\nparam_reduced = {fewer_params}\n"
    )


def test_complexity_prints_both_counts_of_parameters(fastrank_command) -> None:
    args = ("complexity", "--arch", "vgg_16_bn", "-r", "1", "--compress_rate", "[0.6]*6+[0.8]*7")
    code, text, _ = fastrank_command(*args, "--dataset", "cifar10", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["macs"]["ptflops"] == found["norton"]["computational_complexity"] == 4_582_498
    assert (found["params"], found["params_without_block_biases"]) == (150_667, 149_648)
    assert found["norton"]["number_of_parameters"] == 149_648
    assert found["reduction_percent"]["ptflops"]["macs"] == pytest.approx(98.54, abs=0.005)
    code, text, _ = fastrank_command(*args)
    assert code == 0
    for number in ("4,582,498", "150,667", "149,648", "98.54 %", "99.00 %"):
        assert number in text


def test_complexity_of_a_dense_and_of_a_saved_network(fastrank_command, saved: Path, tmp_path: Path) -> None:
    code, text, _ = fastrank_command("complexity", "--arch", saved)
    assert code == 0
    assert "FLOPs_reduced = 0.00" in text
    model, small = fastrank.load(saved), tmp_path / "small.safetensors"
    plan = fastrank.make_plan(model, "nrmf", energy=0.5, example_input=torch.zeros(1, 1, 8, 8))
    fastrank.save(fastrank.compress(model, plan), small)
    code, text, _ = fastrank_command("complexity", "--arch", small, "--json")
    after, before = (fastrank.complexity.count(m, (1, 8, 8)).macs for m in (fastrank.load(small), fastrank.load(saved)))
    assert code == 0
    assert after < before
    assert json.loads(text)["reduction_percent"]["conv_fc"]["macs"] == pytest.approx(100 * (1 - after / before))


def test_evaluate_reads_a_norton_checkpoint(fastrank_command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"rank": 1, "compress_rate": "[0.9]*13"}
    source = fastrank.models.build("vgg_16_bn", **options)
    for module in source.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    source(torch.randn(64, 3, 32, 32))  # statistics under which the outputs depend on the images
    layout = norton_layout(source)
    state = {layout[key].name: value.reshape(layout[key].shape) for key, value in source.state_dict().items()}
    assert "features.conv16.feature.pointwise.weight" in state
    torch.save({"state_dict": state, **options}, tmp_path / "vgg.pt")
    (tmp_path / "data").mkdir()
    records = torch.randint(0, 256, (40, 3073), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    records[:, 0] %= 10
    (tmp_path / "data" / "test_batch.bin").write_bytes(bytes(records.flatten().tolist()))
    args = ("evaluate", "--arch", "vgg_16_bn", "--ckpt", tmp_path / "vgg.pt", "-r", 1, "-cpr", "[0.9]*13")
    code, text, error = fastrank_command(*args, "--data", "cifar10", "--root", tmp_path / "data", "--json")
    assert (code, error) == (0, "")
    deviations = (0.2023, 0.1994, 0.2010)  # those of the published code's data loader
    images = fastrank.data.load("cifar10", root=tmp_path / "data", split="test", std=deviations)
    want = fastrank.train.evaluate(source, images)
    found = json.loads(text)
    assert (found["loss"], found["top1"], found["top5"]) == pytest.approx((want.loss, want.top1, want.top5))
    # In words; the data set follows from the architecture; --std wins; the network can be kept.
    code, text, _ = fastrank_command(*args, "--data_dir", tmp_path / "data", "--out", tmp_path / "kept.safetensors")
    assert code == 0
    assert text.startswith(f"* Acc@1 {want.top1:.3f} Acc@5 {want.top5:.3f} ")
    assert "0.2023,0.1994,0.2010" in text
    kept = ("evaluate", tmp_path / "kept.safetensors", "--data", "cifar10", "--root", tmp_path / "data", "--json")
    code, text, _ = fastrank_command(*kept, "--std", ",".join(map(str, deviations)))
    assert json.loads(text)["loss"] == pytest.approx(want.loss)
    assert json.loads(fastrank_command(*kept)[1])["loss"] != pytest.approx(want.loss)


def test_evaluate_a_plain_checkpoint_of_the_zoo(fastrank_command, tmp_path: Path) -> None:
    source = fastrank.models.build("lenet5_nrmf")
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "x.pth")
    args = ("evaluate", "lenet5_nrmf", "--ckpt", tmp_path / "x.pth", "--data", "digits", "--json")
    code, text, _ = fastrank_command(*args)
    assert code == 0
    want = fastrank.train.evaluate(source, fastrank.data.load("digits", split="test"))
    assert json.loads(text)["loss"] == pytest.approx(want.loss)


def test_grey_digits_come_in_the_channels_of_the_network(fastrank_command) -> None:
    code, text, _ = fastrank_command("evaluate", "resnet_20", "-cpr", "[0.9]*12", "--data", "digits", "--json")
    assert code == 0
    assert json.loads(text)["options"] == {"channels": 3}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_evaluate_a_detector(fastrank_command, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="average precision needs pycocotools")
    write_coco(tmp_path, "val2017")
    options = {"num_classes": 4, "rank": 1, "compress_rate": "[0.75]*20", "min_size": 32, "max_size": 64}
    fastrank.save(fastrank.models.build("fasterrcnn", **options), tmp_path / "detector.safetensors")
    code, text, _ = fastrank_command("evaluate", tmp_path / "detector.safetensors", "--root", tmp_path)
    assert code == 0
    assert re.match(r"\* bbox ap -?\d\.\d{3}  bbox ap50 .*bbox ar100 -?\d\.\d{3}  \(8 images\)\n", text)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate_in = nn.Linear(64, 10), nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x.flatten(1)) * self.gate_in
        return out


def test_report_of_a_run(fastrank_command, tmp_path: Path) -> None:
    images, config = fastrank.data.load("digits", held_out=0.9), fastrank.train.TrainConfig(1, 64, 0.1)
    fastrank.train.fit(nn.Sequential(Gated()), images, None, config, run_dir=tmp_path / "train", progress=False)
    code, text, _ = fastrank_command("report", tmp_path)
    assert code == 0
    assert "no summary yet, 1 epochs" in text
    stage = {"top1": 90.0, "top5": 99.0, "loss": 0.5, "count": 4, "macs": 200, "params": 100}
    summary = {"model": {}, "dense": stage, "compressed": {**stage, "macs": 50, "params": 30}, "speed_up": 4.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    code, text, _ = fastrank_command("report", tmp_path, "--out", tmp_path / "plots")
    assert code == 0
    for word in ("compressed", "Acc@1", "90.00", "0.5000", "75.00 %", "70.00 %"):
        assert word in text
    code, text, _ = fastrank_command("report", tmp_path, "--json")
    assert json.loads(text)["plots"] == ["history.png", "gates.png"]
    assert json.loads(text)["summary"] == summary
    for folder in (tmp_path, tmp_path / "plots"):
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("history.png", "gates.png"))


def test_report_of_activations(fastrank_command, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="activation maps need grad-cam")
    dense, small = (fastrank.models.build("resnet_20", compress_rate="[0.7]*12", rank=rank) for rank in (0, 1))
    fastrank.save(dense, tmp_path / "a.safetensors")
    fastrank.save(small, tmp_path / "b.safetensors")
    args = ("report", "--cam", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "cam.png")
    code, text, _ = fastrank_command(*args, "--data", "digits", "--size", 32, "--index", 3, "--index", 5, "--json")
    found = json.loads(text)
    assert code == 0
    macs = [fastrank.complexity.count(model, 32).macs for model in (dense, small)]
    assert [row["compression_percent"] for row in found["models"]] == pytest.approx([0, 100 * (1 - macs[1] / macs[0])])
    assert found["models"][1]["layer"] == "layer3.2.conv2"
    assert len(found["explained"]) == 2
    assert (tmp_path / "cam.png").read_bytes().startswith(b"\x89PNG")
    picture = pytest.importorskip("PIL.Image")
    picture.new("L", (40, 30), 99).save(tmp_path / "grey.png")
    code, text, _ = fastrank_command(*args, "--image", tmp_path / "grey.png", "--layer", "layer2.0.conv1")
    assert code == 0
    assert "layer2.0.conv1" in text


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
    "unknown data": (("evaluate", "lenet5_nrmf", "--data", "mnsit"), "did you mean 'mnist'"),
    "no data set": (("evaluate", "lenet5_nrmf"), "--data must be given for lenet5_nrmf, whose images are 1×8×8"),
    "no model to evaluate": (("evaluate", "--data", "digits"), "MODEL or --arch must be given, and not both, got ne"),
    "two models to evaluate": (("evaluate", "resnet_20", "--arch", "resnet_20"), "got both"),
    "missing checkpoint": (("evaluate", "--arch", "resnet_20", "--ckpt", "no.pt"), "--ckpt must be the path"),
    "checkpoint of a saved model": (("evaluate", "x.safetensors", "--ckpt", "no.pt"), "--ckpt must be left out"),
    "deviations that are no numbers": (
        ("evaluate", "resnet_20", "--data", "cifar10", "--std", "a,b"), "--std must be numbers joined by commas"
    ),
    "data set of another size": (
        ("complexity", "--arch", "resnet_50", "--dataset", "cifar10"), "--dataset must be imagenet for resnet_50, got"
    ),
    "data set of no size": (("complexity", "--arch", "lenet5_nrmf", "--dataset", "coco"), "--dataset must be left out"),
    "no run": (("report", "."), "which holds a summary.json or checkpoints, got ., which has neither"),
    "activations without an input": (("report", "--cam", "resnet_20"), "--image or --data must be given"),
    "inputs without --cam": (("report", ".", "--data", "digits"), "--data without --cam"),
    "number of a file": (("report", "--cam", "resnet_20", "--image", "x.png", "--index", "1"), "without --data"),
    "number out of range": (
        ("report", "--cam", "lenet5_nrmf", "--data", "digits", "--index", "539"), "--index must be between 0 and 538"
    ),
    "layer unknown": (
        ("report", "--cam", "lenet5_nrmf", "--data", "digits", "--layer", "conv4"), "did you mean 'conv3'"
    ),
    "missing image": (("report", "--cam", "resnet_20", "--image", "no.png"), "no.png"),
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
