"""`--dampening`, `--freezing`, and how many integer weights flipped in the last epoch."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents, results
from safetensors import safe_open

import crcore as cr
from crcore.cli import _training

REMEDIES = ("--freezing", 0.001, "--dampening", 0.01, "--weight-bits", 2, "--lr", 0.1)


NET = """
from torch import nn
def net(num_classes, in_channels):
    hidden = [nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, num_classes))
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_net(tmp_path, monkeypatch) -> None:
    (tmp_path / "net_that_oscillates.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def arguments(out: Path, *more: object) -> tuple[object, ...]:
    net = ("--model", "net_that_oscillates:net")
    return ("compare", *net, "--methods", "fp32,qat+cr", "--seeds", 1, "--epochs", 6, "--out", out, *more)


def run_of(out: Path, method: str) -> dict[str, Any]:
    (run,) = [run for run in results(out)["runs"] if run["method"] == method]
    return run


def test_every_quantized_run_says_how_many_integers_flipped(finished: Path) -> None:
    for run in results(finished)["runs"]:
        assert ("oscillation" in run) == (run["method"] != "fp32")
        if run["method"] != "fp32":
            assert run["oscillation"].keys() == {"flipped", "oscillating"}
            assert 0 <= run["oscillation"]["oscillating"] <= run["oscillation"]["flipped"] < 0.2
        stored = json.loads((finished / f"seed{run['seed']}" / run["method"] / "run.json").read_text())
        assert stored.get("oscillation") == run.get("oscillation")
    assert any(run["oscillation"]["flipped"] > 0 for run in results(finished)["runs"] if "oscillation" in run)


def test_what_flipped_is_counted_over_the_last_epoch(crcore, tmp_path, monkeypatch) -> None:
    codes: list[list[Any]] = []
    saved = _training.save_progress

    def save_and_look(path: Path, modules: Any, optimizer: Any, record: dict[str, Any]) -> None:
        saved(path, modules, optimizer, record)
        layers = [m for m in modules["student"].modules() if hasattr(m, "weight_quantizer")]
        codes.append([m.weight_quantizer.codes(m._parameters["weight"]).flatten() for m in layers])

    monkeypatch.setattr(_training, "save_progress", save_and_look)
    one_step = ("--batch-size", 200, "--lr", 0.5, "--methods", "qat")
    assert crcore(*arguments(tmp_path / "out"), *one_step).status == 0
    before, after = (torch.cat(each) for each in codes[-2:])
    flipped = run_of(tmp_path / "out", "qat")["oscillation"]["flipped"]
    assert flipped == np.mean((before != after).numpy())
    assert flipped > 0


def test_the_recipe_of_a_run_holds_its_remedies(crcore, tmp_path) -> None:
    assert crcore(*arguments(tmp_path / "out", *REMEDIES)).status == 0
    run = run_of(tmp_path / "out", "qat+cr")
    recipe = cr.Recipe.from_dict(run["recipe"])
    assert recipe.dampening == cr.Dampening(cr.cosine_ramp(0.01, steps=run["steps"]))
    assert recipe.freezing == cr.Freezing(cr.cosine_ramp(0.001, steps=run["steps"], start=0.004))
    assert 0.0 < run["oscillation"]["frozen"] < 1.0
    note = "weights that oscillate are dampened with a weight of 0.01 and frozen above a frequency of 0.001."
    assert note in (tmp_path / "out/table.md").read_text()
    teacher = tmp_path / "out/seed0/qat+cr/teacher.safetensors"
    with safe_open(teacher, "pt") as file:
        assert "freezing" in file.metadata()["crcore"]
    assert crcore("evaluate", teacher, "--weight-bits", 2, "--quantizer", "lsq").status == 0


def test_dampening_brings_weights_to_the_middle_of_their_bins(crcore, tmp_path) -> None:
    distances = []
    for name, options in (("plain", ()), ("dampened", ("--dampening", 1.0))):
        assert crcore(*arguments(tmp_path / name, "--methods", "qat", "--epochs", 12, *options)).status == 0
        with safe_open(tmp_path / name / "seed0/qat/student.safetensors", "pt") as file:
            weight, scale = (file.get_tensor(f"4.{k}") for k in ("weight", "weight_quantizer.scale"))
        quantizer = cr.LSQ(4, signed=True)
        x, scale = weight.double().numpy(), scale.double().numpy()
        distances.append(np.abs(quantizer.forward(x, scale) - x).mean() / scale.mean())
    assert distances[1] < 0.5 * distances[0]


def test_a_run_with_all_options_resumes_to_the_same_bits(crcore, tmp_path, monkeypatch) -> None:
    options = (*REMEDIES, "--reestimate-batchnorm", 2, "--teacher-batchnorm", "copy")
    assert crcore(*arguments(tmp_path / "whole", *options)).status == 0
    saved = _training.save_progress

    def save_and_interrupt(path: Path, modules: Any, optimizer: Any, record: dict[str, Any]) -> None:
        saved(path, modules, optimizer, record)
        if path.parent.name == "qat+cr" and len(record["history"]) in (4, 6):
            assert modules["freezer"].frozen > 0.0
            raise KeyboardInterrupt

    monkeypatch.setattr(_training, "save_progress", save_and_interrupt)
    assert crcore(*arguments(tmp_path / "halves", *options)).status == 130
    again = crcore(*arguments(tmp_path / "halves", *options), "--resume")
    assert again.status == 130  # after the last epoch, with BatchNorm measured already
    monkeypatch.setattr(_training, "save_progress", saved)
    assert crcore(*arguments(tmp_path / "halves", *options), "--resume").status == 0
    whole, halves = contents(tmp_path / "whole"), contents(tmp_path / "halves")
    for name in ("student.safetensors", "teacher.safetensors"):
        assert whole[f"seed0/qat+cr/{name}"] == halves[f"seed0/qat+cr/{name}"]
    assert run_of(tmp_path / "whole", "qat+cr")["oscillation"] == run_of(tmp_path / "halves", "qat+cr")["oscillation"]


def test_a_remedy_acts_on_no_float_run(crcore, tmp_path) -> None:
    for name, options in (("plain", ()), ("remedies", REMEDIES)):
        assert crcore(*arguments(tmp_path / name, "--methods", "fp32", *options)).status == 0
    plain, other = contents(tmp_path / "plain"), contents(tmp_path / "remedies")
    assert plain["seed0/fp32/float.safetensors"] == other["seed0/fp32/float.safetensors"]


def test_a_folder_of_a_version_without_remedies_is_resumed(crcore, tmp_path) -> None:
    out = tmp_path / "out"
    assert crcore(*arguments(out)).status == 0
    stored = json.loads((out / "settings.json").read_text())
    del stored["settings"]["dampening"], stored["settings"]["freezing"]
    (out / "settings.json").write_text(json.dumps(stored))
    record = out / "seed0/qat+cr/run.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "oscillation"}))
    assert crcore(*arguments(out), "--resume").status == 0
    refused = crcore(*arguments(out), "--resume", "--freezing", 0.01)
    assert refused.status == 2
    assert "--freezing None, now it is 0.01" in refused.err


@pytest.mark.parametrize("options", [("--freezing", 0.01), ("--dampening", 0.1)])
def test_a_quantizer_without_learned_scales_is_refused(crcore, tmp_path, options) -> None:
    outcome = crcore(*arguments(tmp_path / "out", "--quantizer", "minmax", *options))
    assert outcome.status == 2
    assert "--quantizer minmax" in outcome.err
    assert "use LSQ for weights" in outcome.err
    assert not (tmp_path / "out").exists()


def test_the_recorded_checkpoints_are_read_as_before(finished: Path) -> None:
    """What has no remedy names none, so that earlier versions read it too."""
    with safe_open(finished / "seed0/qat/student.safetensors", "pt") as file:
        described = json.loads(file.metadata()["crcore"])["recipe"]
    assert not {"dampening", "freezing"} & set(described)
