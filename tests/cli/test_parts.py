"""Models, views, statistics and checkpoints, each on its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import crcore as cr
from crcore.cli import _models
from crcore.cli._arguments import build_parser, settings_from
from crcore.cli._backends import open_backend
from crcore.cli._checkpoints import load_progress, save_progress
from crcore.cli._data import load_data
from crcore.cli._errors import CommandError
from crcore.cli._files import put_in_place
from crcore.cli._methods import METHODS
from crcore.cli._recipes import build_recipe
from crcore.cli._report import gain, rows, spread
from crcore.cli._session import decided_session
from crcore.cli._views import View


@pytest.mark.parametrize(
    ("name", "parameters", "last"), [("resnet8", 78_042, 8), ("resnet20", 272_474, 8), ("resnet18", 11_173_962, 4)]
)
def test_resnets_have_their_published_size(name: str, parameters: int, last: int) -> None:
    model = _models.build_model(name, num_classes=10, in_channels=3, size=(32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = []
    model.pool.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[-2:]))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(last, last)]


def test_mobilenetv2_ends_in_a_4x4_map() -> None:
    model = _models.build_model("mobilenetv2", num_classes=10, in_channels=3, size=(32, 32))
    assert 2.2e6 < sum(p.numel() for p in model.parameters()) < 2.3e6
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17
    assert all(m.groups == m.in_channels for m in depthwise)


def test_a_model_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynets_of_the_test.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
        "def headless(num_classes, in_channels):\n"
        "    return nn.Flatten()\n"
        "def text(num_classes, in_channels):\n"
        "    return 'a network'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    options = {"num_classes": 10, "in_channels": 1, "size": (8, 8)}
    assert isinstance(_models.build_model("mynets_of_the_test:tiny", **options), nn.Sequential)
    with pytest.raises(CommandError, match=r"logits of shape \(2, 10\) for two images, got \(2, 64\)"):
        _models.build_model("mynets_of_the_test:headless", **options)
    with pytest.raises(CommandError, match=r"must return a torch\.nn\.Module"):
        _models.build_model("mynets_of_the_test:text", **options)
    with pytest.raises(CommandError, match=r"cannot take images of shape \[2, 1, 9, 9\]"):
        _models.build_model("mynets_of_the_test:tiny", **(options | {"size": (9, 9)}))


def images(channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (16, channels, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def view(kind: str, channels: int = 3, *, flip: bool = True) -> View:
    return View(kind, size=(32, 32), flip=flip, mean=(0.5,) * channels, std=(0.25,) * channels)


def test_the_plain_view_is_the_normalized_image() -> None:
    expected = (images().float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(view("none")(images(), 0), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_views_are_a_function_of_their_seed(kind: str, channels: int) -> None:
    augment = view(kind, channels)
    first = augment(images(channels), 1)
    assert first.shape == (16, channels, 32, 32)
    assert torch.isfinite(first).all()
    assert torch.equal(first, view(kind, channels)(images(channels), 1))
    assert not torch.equal(first, augment(images(channels), 2))
    assert first.min() >= -2.001
    assert first.max() <= 2.001


def test_without_flip_no_image_is_mirrored() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(64, 3, 32, 32).contiguous()
    centre = (slice(None), 0, 16)  # the middle row, away from the reflected border
    rising = view("weak", flip=False)(ramp, 0)[centre][:, 8:24].diff(dim=1) > 0
    assert rising.all()
    both = (view("weak", flip=True)(ramp, 0)[centre][:, 8:24].diff(dim=1) > 0).float().mean()
    assert 0.2 < both < 0.8


def test_statistics_are_those_of_the_training_pixels() -> None:
    data = load_data("digits")
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean(dim=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-12)


def test_the_gain_is_a_paired_difference() -> None:
    def run(seed: int, method: str, accuracy: float, teacher: float | None) -> dict:
        common = {"steps": 10, "float_steps": 5, "differs": "x"}
        return {"seed": seed, "method": method, "accuracy": accuracy, "teacher_accuracy": teacher, **common}

    # Seeds differ by twenty points, the methods by exactly two: the pairing must see through that.
    records = [run(s, "qat", 50 + 10 * s, None) for s in range(3)]
    records += [run(s, "qat+cr", 52 + 10 * s, 53 + 10 * s) for s in range(3)]
    plain, consistent = rows(records)
    assert plain.student_gain is None
    assert plain.teacher is None
    assert str(consistent.student) == "62.00 ± 10.00"
    assert str(consistent.student_gain) == "+2.00 [+2.00, +2.00]"
    assert str(consistent.teacher_gain) == "+3.00 [+3.00, +3.00]"
    assert consistent.steps == "5 + 10"


def test_the_interval_is_student_s_t() -> None:
    # t(0.975, 2) = 4.30265, standard error = 1 / sqrt(3)
    assert gain([1.0, 2.0, 3.0]).half == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert gain([1.0]).half is None
    assert spread([1.0]).std is None


def test_progress_round_trip_restores_momentum(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(12.0).view(3, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = made()
    steps(model, optimizer)
    save_progress(tmp_path / "p.safetensors", {"student": model}, optimizer, {"history": [1]})
    other, other_optimizer = made()
    assert load_progress(tmp_path / "p.safetensors", {"student": other}, other_optimizer) == {"history": [1]}
    steps(model, optimizer)
    steps(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path) -> None:
    def write_half(path):
        with put_in_place(path, ending=".keras") as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_half(tmp_path / "file")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("sigmoid", cr.sigmoid_ramp(2.0, steps=30)),
        ("linear", cr.linear_ramp(2.0, steps=30)),
        ("cosine", cr.cosine_ramp(2.0, steps=30)),
        ("constant", cr.constant(2.0)),
    ],
)
def test_lambda_rises_in_its_shape_over_its_part_of_the_steps(shape: str, expected: cr.Schedule) -> None:
    arguments = ["compare", "--ramp-shape", shape, "--ramp", "0.3", "--consistency-weight", "2"]
    settings = settings_from(build_parser("0").parse_args(arguments))
    consistency = build_recipe(settings, METHODS["qat+cr"], steps=100).consistency
    assert consistency is not None
    assert consistency == cr.Consistency(cr.kl_divergence, weight=expected)


@pytest.mark.parametrize(
    ("options", "view"),
    [
        (["--epochs", "99", "--float-epochs", "1000"], "weak"),
        (["--epochs", "100"], "strong"),
        (["--epochs", "100", "--student-view", "none"], "none"),
    ],
)
def test_the_student_s_views_are_strong_in_long_runs(tmp_path: Path, options: list[str], view: str) -> None:
    settings = settings_from(build_parser("").parse_args(["compare", *options]))
    session = decided_session(settings, load_data("digits"), open_backend("torch", device="cpu"), out=tmp_path)
    assert session.settings.student_view == view
    assert session.batches(0).student_view.strong == (view == "strong")
