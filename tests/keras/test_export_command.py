"""`crcore export` of networks that Keras trained, on the engine of this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crcore as cr
from crcore.cli import main
from crcore.cli._backends import open_backend
from crcore.cli._data import load_data
from crcore.cli._keras_evaluation import channels_last
from crcore.cli._network_info import NetworkInfo
from crcore.cli._networks import view_of

FILES = {"onnx": "student.onnx", "litert": "student.tflite", "safetensors": "student-packed.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network that has seen digits, and has not learned from them."""
    out = tmp_path_factory.mktemp("run")
    backend, data = open_backend("keras", device="auto"), load_data("digits")
    recipe = cr.Recipe(weights=cr.LSQ(4, per_channel=True), activations=cr.LSQ(8))
    info = NetworkInfo(
        role="student",
        model="resnet8",
        recipe=recipe.to_dict(),
        classes=data.classes,
        channels=data.channels,
        size=data.size,
        image_size=None,
        mean=data.mean,
        std=data.std,
        data=data.name,
        versions={},
    )
    network = backend.network("resnet8", num_classes=10, in_channels=1, size=data.size)
    student = backend.prepare(network, recipe)
    for start in range(0, 320, 64):
        student(channels_last(view_of(info)(data.train.images[start : start + 64], 0)), training=True)
    backend.save_network(out / "student.keras", student, info)
    return out


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("to", FILES)
def test_a_keras_network_is_exported_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    # A network that guesses is unsure of its classes.
    found = printed(capsys, "export", folder, "--to", to, "--verify", "--minimum-agreement", 50)
    assert found["path"] == str(folder / FILES[to])
    assert found["samples"] == 599
    assert found["agreement"] >= 50
    if to != "safetensors":
        assert (found["layers"], found["differing_layers"]) == (10, [])
    evaluated = printed(capsys, "evaluate", folder / FILES[to])
    assert np.isclose(evaluated["accuracy"], found["accuracy"])
    assert evaluated["model"] == "resnet8"
