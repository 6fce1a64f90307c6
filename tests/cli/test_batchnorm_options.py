"""What compare does with BatchNorm: averaged or copied in the teacher, measured anew after QAT."""

import json
import sys
from pathlib import Path

import crcore_torch as crt
import pytest
import torch
from conftest import contents
from safetensors.torch import load_file

import crcore as cr
from crcore.cli._batches import Batches
from crcore.cli._data import load_data
from crcore.cli._torch_backend import TorchBackend

TINY = ("--labels", 100, "--batch-size", 50, "--epochs", 2, "--seeds", 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from crcore.cli import main

    out = tmp_path_factory.mktemp("plain") / "out"
    assert main(["compare", *map(str, TINY), "--methods", "fp32,qat,qat+cr+unlabeled", "--out", str(out)]) == 0
    return out


def states(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / f"seed0/{name}.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_statistics_are_measured_on_further_batches_after_the_last_step(crcore, plain, tmp_path) -> None:
    methods = ("--methods", "fp32,qat,qat+cr+unlabeled")
    outcome = crcore("compare", *TINY, *methods, "--reestimate-batchnorm", 3, "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "measured anew on 3 batches" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "seed0/fp32/float.safetensors").read_bytes() == (
        plain / "seed0/fp32/float.safetensors"
    ).read_bytes()
    options = {"student_view": "weak", "teacher_view": "weak", "flip": False, "device": torch.device("cpu")}
    batches = Batches(load_data("digits"), seed=0, labels=100, batch_size=50, **options)
    backend, recipe = TorchBackend("cpu"), cr.Recipe(cr.LSQ(4, per_channel=True), cr.LSQ(4))
    for role in ("qat/student", "qat+cr+unlabeled/student", "qat+cr+unlabeled/teacher"):
        before, after = states(plain, role), states(tmp_path, role)
        assert differing(before, after) == {name for name in before if "running" in name or "num_batches" in name}
        network = crt.prepare(backend.network("resnet8", num_classes=10, in_channels=1, size=(8, 8)), recipe)
        network.load_state_dict(before)
        unlabeled = "unlabeled" in role
        crt.reestimate_batchnorm(network, [batches.student(step, unlabeled=unlabeled)[0] for step in (4, 5, 6)])
        for name, value in network.state_dict().items():
            assert torch.equal(after[name], value), name
    file = tmp_path / "seed0/qat+cr+unlabeled/teacher.safetensors"
    accuracy = json.loads(crcore("evaluate", file, "--json").out)["accuracy"]
    record = json.loads((tmp_path / "seed0/qat+cr+unlabeled/run.json").read_text())
    assert record["teacher_accuracy"] == accuracy


def test_the_teachers_statistics_are_copied(crcore, plain, tmp_path) -> None:
    methods = ("--methods", "qat+cr+unlabeled", "--consistency-weight", 0)
    assert crcore("compare", *TINY, *methods, "--teacher-batchnorm", "copy", "--out", tmp_path).status == 0
    student, teacher = (states(tmp_path, f"qat+cr+unlabeled/{role}") for role in ("student", "teacher"))
    statistics = {name for name in student if "running" in name}
    assert statistics
    assert not differing(student, teacher) & statistics
    assert differing(*(states(plain, f"qat+cr+unlabeled/{role}") for role in ("student", "teacher"))) >= statistics


def test_a_network_without_batchnorm_is_refused_before_training(crcore, tmp_path, monkeypatch) -> None:
    (tmp_path / "plainnet_of_the_test.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = contents(tmp_path)
    outcome = crcore("compare", "--model", "plainnet_of_the_test:net", "--reestimate-batchnorm", 2, "--out", "out")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "plainnet_of_the_test:net has no BatchNorm; leave the option out" in outcome.err
    assert {name: text for name, text in contents(tmp_path).items() if "__pycache__" not in name} == before
