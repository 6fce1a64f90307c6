"""Small data sets and one finished comparison, shared by the tests of the command."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from crcore.cli import main

ALL_METHODS = "fp32,qat,qat+ema,qat+kd,qat+cr,qat+cr+unlabeled"


# Digits are too small for a second thread to help, and threads that wait for a busy core cost minutes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def crcore(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


def pictures(count: int, *, size: int = 12, seed: int = 0) -> tuple[list[Image.Image], list[int]]:
    """Noisy images of three classes that differ in colour: red, green or blue is brighter."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for number in range(count):
        pixels = generator.integers(0, 160, (size, size, 3))
        pixels[..., number % 3] += 90
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        labels.append(number % 3)
    return images, labels


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files in the Hugging Face image schema: img, label; train in two files, and test."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )
    files = {"train-00000-of-00002": (60, 0), "train-00001-of-00002": (60, 1), "test-00000-of-00001": (45, 2)}
    for name, (count, seed) in files.items():
        images, labels = pictures(count, seed=seed)
        rows = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        rows.to_parquet(str(folder / f"{name}.parquet"))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sub-folder of PNG images for each class, without train and test."""
    folder = tmp_path_factory.mktemp("images")
    for number, (image, label) in enumerate(zip(*pictures(90), strict=True)):
        file = folder / ("red", "green", "blue")[label] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        image.save(file)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a comparison of all six methods on digits, with two seeds."""
    out = tmp_path_factory.mktemp("finished") / "out"
    status = main(["compare", "--methods", ALL_METHODS, "--seeds", "2", "--epochs", "12", "--out", str(out)])
    assert status == 0
    return out


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
