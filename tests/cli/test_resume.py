"""A run that is killed or interrupted ends as it would have ended."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import contents, results

from crcore.cli import _training

ARGUMENTS = ["compare", "--methods", "fp32,qat+cr+unlabeled", "--seeds", "1", "--epochs", "8", "--batch-size", "50"]
ARGUMENTS += ["--student-view", "strong", "--consistency-weight", "0.5"]


def process(out: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "crcore.cli", *ARGUMENTS, "--out", str(out), *more]
    # A test run that a shell started in the background ignores Ctrl-C, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    running = process(out)
    assert running.communicate(timeout=300)[1] == ""
    assert running.returncode == 0
    return out


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    for run in found["runs"]:
        assert run.pop("seconds") > 0
        assert min(run.pop("seconds_by_part").values()) > 0
    return found


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (signal.SIGKILL, "unlabeled: epoch 5/8"),
        (signal.SIGINT, "unlabeled: epoch 3/8"),
        (signal.SIGKILL, "fp32: epoch 4/8"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(undisturbed: Path, tmp_path: Path, stop: int, line: str) -> None:
    out = tmp_path / "out"
    running = process(out)
    assert running.stdout is not None
    for printed in running.stdout:
        if line in printed:
            os.kill(running.pid, stop)
            break
    _, err = running.communicate(timeout=60)
    assert running.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    if stop == signal.SIGINT:
        assert err.count("\n") == 1
        assert "--resume" in err
        assert str(out) in err
    assert list(out.rglob("progress.safetensors"))
    assert not (out / "table.md").exists()

    resumed = process(out, "--resume")
    printed, err = resumed.communicate(timeout=300)
    assert (resumed.returncode, err) == (0, "")
    assert "continues after step" in printed

    expected, found = contents(undisturbed), contents(out)
    assert found.keys() == expected.keys()
    for name in expected:
        if name.endswith((".safetensors", ".md", ".png")):
            assert found[name] == expected[name], name
    assert without_times(results(out)) == without_times(results(undisturbed))


def test_resuming_a_finished_run_trains_nothing(crcore, undisturbed) -> None:
    before = contents(undisturbed)
    outcome = crcore(*ARGUMENTS, "--out", undisturbed, "--resume")
    assert outcome.status == 0, outcome.err
    assert "epoch" not in outcome.out.replace("last epoch", "")
    assert contents(undisturbed) == before


@pytest.mark.parametrize(
    "newer", [("backend", "engine"), ("ramp_shape", "unlabeled", "teacher_batchnorm", "reestimate_batchnorm")]
)
def test_a_folder_of_an_earlier_version_is_resumed(crcore, undisturbed, newer) -> None:
    before = contents(undisturbed)
    stored = json.loads(before["settings.json"])
    for name in newer:
        del stored["settings"][name]
    (undisturbed / "settings.json").write_text(json.dumps(stored))
    outcome = crcore(*ARGUMENTS, "--out", undisturbed, "--resume")
    assert outcome.status == 0, outcome.err
    assert contents(undisturbed) == before


def test_a_temporary_file_of_a_killed_run_does_no_harm(crcore, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", "--methods", "fp32", "--seeds", 1, "--epochs", 2, "--out", out)
    assert crcore(*arguments).status == 0
    folder = out / "seed0/fp32"
    (folder / "run.json").rename(folder / "run.json.tmp")  # killed before the last rename
    (folder / "progress.safetensors.tmp").write_bytes(b"half")
    outcome = crcore(*arguments, "--resume")
    assert outcome.status == 0, outcome.err
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("content", ['{"seed": 0, "meth', "{}", "3", "[]"])
def test_a_damaged_record_is_named_with_the_way_out(crcore, tmp_path, content) -> None:
    arguments = ("compare", "--methods", "fp32", "--seeds", 1, "--epochs", 1, "--out", tmp_path / "out")
    assert crcore(*arguments).status == 0
    record = tmp_path / "out/seed0/fp32/run.json"
    record.write_text(content)
    outcome = crcore(*arguments, "--resume")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert str(record) in outcome.err
    assert "delete the folder" in outcome.err


def test_methods_and_seeds_may_be_added(crcore, tmp_path) -> None:
    arguments = ("compare", "--epochs", 2, "--out", tmp_path / "out")
    assert crcore(*arguments, "--methods", "fp32", "--seeds", 1).status == 0
    first = contents(tmp_path / "out/seed0")
    outcome = crcore(*arguments, "--methods", "fp32,qat", "--seeds", 2, "--resume")
    assert outcome.status == 0, outcome.err
    assert "seed 0 fp32: finished earlier" in outcome.out
    assert first.items() <= contents(tmp_path / "out/seed0").items()
    assert len(results(tmp_path / "out")["runs"]) == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lr", "0.5"), "--lr 0.02"),
        (("--weight-bits", "3"), "--weight-bits 4"),
        (("--epochs", "9"), "--epochs 8"),
        (("--student-view", "weak"), "--student-view strong"),
        (("--labels", "150"), "--labels 200"),
        (("--unlabeled", "150"), "--unlabeled 998"),
        (("--ramp-shape", "linear"), "--ramp-shape sigmoid"),
        (("--methods", "qat"), "fp32"),
        (("--ema-decay", "0.5"), "--ema-decay"),
        (("--backend", "keras", "--model", "resnet8"), "--backend torch"),
    ],
)
def test_resuming_with_another_setting_names_it(crcore, undisturbed, options, named) -> None:
    before = contents(undisturbed)
    outcome = crcore(*ARGUMENTS, "--out", undisturbed, "--resume", *options)
    assert outcome.status == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(undisturbed) == before


def test_a_folder_with_a_run_is_not_overwritten(crcore, undisturbed) -> None:
    before = contents(undisturbed)
    outcome = crcore(*ARGUMENTS, "--out", undisturbed)
    assert outcome.status == 2
    assert "--resume" in outcome.err
    assert "another --out" in outcome.err
    assert contents(undisturbed) == before


def test_random_layers_of_the_user_s_model_resume_too(crcore, tmp_path, monkeypatch) -> None:
    (tmp_path / "dropnet_of_the_test.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    hidden = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes)]\n"
        "    return nn.Sequential(*hidden)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ("compare", "--model", "dropnet_of_the_test:net", "--methods", "qat+cr", "--seeds", 1, "--epochs", 4)
    assert crcore(*arguments, "--out", "whole").status == 0

    saved = _training.save_progress

    def save_and_interrupt(path: Path, modules: Any, optimizer: Any, record: dict[str, Any]) -> None:
        saved(path, modules, optimizer, record)
        if path.parent.name == "qat+cr" and len(record["history"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_training, "save_progress", save_and_interrupt)
    outcome = crcore(*arguments, "--out", "halves")
    assert outcome.status == 130
    assert "--out halves --resume" in outcome.err
    monkeypatch.setattr(_training, "save_progress", saved)
    assert crcore(*arguments, "--out", "halves", "--resume").status == 0
    whole, halves = contents(tmp_path / "whole"), contents(tmp_path / "halves")
    for file in ("student", "teacher"):
        name = f"seed0/qat+cr/{file}.safetensors"
        assert whole[name] == halves[name]
