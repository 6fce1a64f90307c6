"""`crcore compare --backend keras`: the same job as with torch, on the engine of this process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import crcore_keras as crk
import keras
import numpy as np
import pytest
import torch
from torch import nn

import crcore as cr
from crcore.cli import _keras_training, main
from crcore.cli._backends import open_backend
from crcore.cli._batches import Batches
from crcore.cli._data import load_data
from crcore.cli._errors import CommandError
from crcore.cli._keras_models import build_model as build_keras
from crcore.cli._methods import METHODS
from crcore.cli._models import build_model as build_torch

torch.set_num_threads(1)

METHODS_ = "fp32,qat,qat+ema,qat+kd,qat+cr,qat+cr+unlabeled"
SMALL = ["--labels", 40, "--batch-size", 20, "--epochs", 3, "--seeds", 1]
KERAS = ["--backend", "keras", "--model", "nets_of_the_keras_test:small"]

NETS = """
import keras
from keras import layers
def small(num_classes, input_shape):
    hidden = [layers.Conv2D(8, 3, strides=2), layers.BatchNormalization(), layers.ReLU(), layers.Flatten()]
    return keras.Sequential([keras.Input(input_shape), *hidden, layers.Dropout(0.2), layers.Dense(num_classes)])
def headless(num_classes, input_shape):
    return keras.Sequential([keras.Input(input_shape), layers.Flatten()])
def probabilities(num_classes, input_shape):
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(num_classes, "softmax")])
def unbuilt(num_classes, input_shape):
    return keras.Sequential([layers.Flatten(), layers.Dense(num_classes)])
def text(num_classes, input_shape):
    return "a network"
def of_torch(num_classes, in_channels):
    return None
"""
NETS_OF_TORCH = """
from torch import nn

def small(num_classes, in_channels):
    hidden = [nn.Conv2d(in_channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*hidden, nn.Linear(72, num_classes))
"""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def crcore(capsys: pytest.CaptureFixture[str], nets: Path) -> Callable[..., Outcome]:
    """Run the command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        return Outcome(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory):
    """The user's modules in the current folder."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets_of_the_keras_test.py").write_text(NETS)
    (folder / "nets_of_the_torch_test.py").write_text(NETS_OF_TORCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, nets: Path) -> Path:
    """The output folder of a comparison of all methods."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["compare", *KERAS, *map(str, SMALL), "--methods", METHODS_, "--out", str(out)]) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def run_of(out: Path, method: str) -> dict[str, Any]:
    (run,) = [run for run in results(out)["runs"] if run["method"] == method]
    return run


def refused(outcome: Outcome, *words: object) -> None:
    assert outcome.status == 2
    assert outcome.err.startswith("crcore: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err


# Results


def test_results_have_the_keys_of_a_torch_run(crcore, finished, tmp_path) -> None:
    arguments = ("--model", "nets_of_the_torch_test:small", *SMALL, "--methods", METHODS_)
    assert crcore("compare", *arguments, "--out", tmp_path / "out").status == 0
    mine, theirs = results(finished), results(tmp_path / "out")
    assert (theirs["backend"], theirs["engine"]) == ("torch", "torch")
    assert (mine.keys(), mine["settings"].keys()) == (theirs.keys(), theirs["settings"].keys())
    assert mine["data"] == theirs["data"]
    for run, other in zip(mine["runs"], theirs["runs"], strict=True):
        assert run.keys() == other.keys()
        assert run["recipe"] == other["recipe"]
        for entry, other_entry in zip(run["history"], other["history"], strict=True):
            assert entry.keys() == other_entry.keys()
            for key in ("epoch", "step", "weight", "decay"):
                assert entry[key] == other_entry[key], (run["method"], key)
            assert [value is None for value in entry.values()] == [value is None for value in other_entry.values()]


def test_results_name_backend_and_engine(finished) -> None:
    found = results(finished)
    assert (found["backend"], found["engine"], found["complete"]) == ("keras", keras.config.backend(), True)
    assert {"keras", found["engine"]} <= found["versions"].keys()
    assert f"Keras on {found['engine']}" in (finished / "table.md").read_text()
    files = {file.name for file in finished.rglob("*") if file.is_file()}
    checkpoints = {"float.keras", "student.keras", "teacher.keras"}
    assert files == {"settings.json", "results.json", "table.md", "curves.png", "run.json"} | checkpoints


# TensorFlow on a CPU does not repeat its own sums to the bit, whatever it is asked for, and a code that flips makes a
# difference grow; the others do repeat them.
AGAIN = 0.2 if keras.config.backend() == "tensorflow" else 1e-4


def test_each_run_says_where_its_time_went(finished: Path) -> None:
    for run in results(finished)["runs"]:
        parts = run["seconds_by_part"]
        assert list(parts) == ["data", "network", "evaluation"]
        assert min(parts.values()) > 0
        if keras.backend.backend() != "tensorflow":  # which draws views while the network computes
            assert sum(parts.values()) == pytest.approx(run["seconds"])


def assert_same_history(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    if keras.config.backend() != "tensorflow":
        assert found == expected
        return
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert {key: mine[key] for key in ("epoch", "step", "weight", "decay")} == {
            key: other[key] for key in ("epoch", "step", "weight", "decay")
        }
        assert mine["task"] == pytest.approx(other["task"], rel=AGAIN)


def test_networks_learn_and_the_controls_hold(finished) -> None:
    at_first = run_of(finished, "fp32")["history"][0]["task"]
    for run in results(finished)["runs"]:
        assert run["history"][-1]["task"] < at_first - 0.1, run["method"]
    plain, average, distilled = (run_of(finished, name)["history"] for name in ("qat", "qat+ema", "qat+kd"))
    tasks = [[entry["task"] for entry in history] for history in (plain, average, distilled)]
    np.testing.assert_allclose(tasks[1], tasks[0], rtol=AGAIN)  # the average does not touch its student
    assert tasks[2] != tasks[0]
    assert all(entry["consistency"] > 0 for entry in distilled)
    assert all(entry["consistency"] == 0 for entry in plain)


@pytest.mark.parametrize(
    ("file", "column"),
    [("fp32/float", "accuracy"), ("qat+kd/student", "accuracy"), ("qat+cr/teacher", "teacher_accuracy")],
)
def test_evaluating_a_checkpoint_gives_the_accuracy_of_the_results(crcore, finished, file, column) -> None:
    outcome = crcore("evaluate", finished / f"seed0/{file}.keras", "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["accuracy"] == run_of(finished, file.partition("/")[0])[column]
    assert found["versions"]["evaluated"]["keras"] == keras.__version__


def test_keras_loads_a_checkpoint_by_itself(finished) -> None:
    network = keras.models.load_model(finished / "seed0/qat+cr/student.keras")
    assert network.predict_on_batch(np.zeros((2, 8, 8, 1), "float32")).shape == (2, 10)


# Resume


def test_a_stopped_run_resumes_to_the_same_numbers(crcore, finished, tmp_path, monkeypatch) -> None:
    arguments = ("compare", *KERAS, *SMALL, "--methods", "fp32,qat+cr+unlabeled", "--out", tmp_path / "out")
    saved = _keras_training.save_progress

    def save_and_interrupt(path: Path, model: Any, record: dict[str, Any]) -> None:
        saved(path, model, record)
        if len(record["history"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_keras_training, "save_progress", save_and_interrupt)
    outcome = crcore(*arguments)  # stops in fp32
    assert outcome.status == 130
    assert "--resume" in outcome.err
    outcome = crcore(*arguments, "--resume")  # goes on with the last epoch of fp32, stops in qat+cr+unlabeled
    assert outcome.status == 130
    assert "fp32: continues after step 4 of 6" in outcome.out
    monkeypatch.setattr(_keras_training, "save_progress", saved)
    outcome = crcore(*arguments, "--resume")
    assert outcome.status == 0, outcome.err
    assert "qat+cr+unlabeled: continues after step 4 of 6" in outcome.out
    for method in ("fp32", "qat+cr+unlabeled"):
        assert_same_history(run_of(tmp_path / "out", method)["history"], run_of(finished, method)["history"])


# Sweep


def test_a_sweep_over_what_becomes_of_batchnorm(crcore, tmp_path) -> None:
    axes = ("--vary", "teacher-batchnorm=average,copy", "--vary", "reestimate-batchnorm=0,2")
    arguments = (*KERAS, *SMALL, "--epochs", 1, "--methods", "qat+cr", "--out", tmp_path / "out")
    outcome = crcore("sweep", *axes, *arguments)
    assert outcome.status == 0, outcome.err
    assert len(list((tmp_path / "out").rglob("float.keras"))) == 1
    points = json.loads((tmp_path / "out/sweep.json").read_text())["points"]

    def read(point: dict[str, Any], role: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """BatchNorm's statistics, and all other weights."""
        network = keras.models.load_model(
            tmp_path / "out" / point["methods"]["qat+cr"]["runs"] / f"seed0/{role}.keras", compile=False
        )
        statistics, others = [], []
        for variable in network.weights:
            kind = statistics if "moving" in variable.path else others
            kind.append(keras.ops.convert_to_numpy(variable))
        return statistics, others

    averaged, averaged_anew, copied, copied_anew = ({r: read(p, r) for r in ("student", "teacher")} for p in points)
    assert same(copied["teacher"][0], copied["student"][0])
    assert not same(averaged["teacher"][0], averaged["student"][0])
    for plain, anew in ((averaged, averaged_anew), (copied, copied_anew)):
        for role in ("student", "teacher"):
            assert not same(plain[role][0], anew[role][0])
    assert same(averaged["student"][1], averaged_anew["student"][1])
    assert same(averaged["teacher"][1], averaged_anew["teacher"][1])


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    assert len(left) == len(right) > 0
    return all(np.array_equal(mine, other) for mine, other in zip(left, right, strict=True))


def test_a_run_with_all_options_resumes_to_the_same_numbers(crcore, tmp_path, monkeypatch) -> None:
    remedies = ("--freezing", 0.001, "--dampening", 0.01, "--weight-bits", 2, "--lr", 0.1)
    batchnorm = ("--reestimate-batchnorm", 2, "--teacher-batchnorm", "copy")
    arguments = ("compare", *KERAS, *SMALL, "--methods", "qat+cr", *remedies, *batchnorm)
    arguments = (*arguments, "--epochs", 6, "--float-epochs", 1)
    assert crcore(*arguments, "--out", tmp_path / "whole").status == 0
    saved = _keras_training.save_progress

    def save_and_interrupt(path: Path, model: Any, record: dict[str, Any]) -> None:
        saved(path, model, record)
        if path.parent.name == "qat+cr" and len(record["history"]) in (4, 6):
            assert model.frozen > 0.0
            raise KeyboardInterrupt

    monkeypatch.setattr(_keras_training, "save_progress", save_and_interrupt)
    assert crcore(*arguments, "--out", tmp_path / "halves").status == 130
    assert crcore(*arguments, "--out", tmp_path / "halves", "--resume").status == 130  # BatchNorm is measured already
    monkeypatch.setattr(_keras_training, "save_progress", saved)
    assert crcore(*arguments, "--out", tmp_path / "halves", "--resume").status == 0
    whole, halves = (run_of(tmp_path / name, "qat+cr") for name in ("whole", "halves"))
    assert_same_history(whole["history"], halves["history"])
    assert whole["oscillation"] == halves["oscillation"]
    assert 0.0 < whole["oscillation"]["frozen"] < 1.0
    assert 0.0 <= whole["oscillation"]["oscillating"] <= whole["oscillation"]["flipped"] < 1.0
    assert cr.Recipe.from_dict(whole["recipe"]).freezing is not None


@pytest.mark.parametrize(
    ("options", "stored", "words"),
    [
        (["--backend", "torch", "--model", "nets_of_the_torch_test:small"], {}, ["--backend keras", "torch"]),
        (KERAS, {"engine": "abacus"}, ["KERAS_BACKEND abacus", keras.config.backend()]),
        (KERAS, {"backend": None}, ["--backend torch"]),  # made before there were two
    ],
)
def test_resuming_on_another_backend_or_engine_is_refused(crcore, finished, tmp_path, options, stored, words) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = json.loads((out / "settings.json").read_text())
    settings["settings"] |= stored
    settings["settings"] = {key: value for key, value in settings["settings"].items() if value or key != "backend"}
    (out / "settings.json").write_text(json.dumps(settings))
    refused(crcore("compare", *options, *SMALL, "--methods", METHODS_, "--out", out, "--resume"), *words)


def test_a_damaged_progress_file_is_named(crcore, finished, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "seed0/qat/run.json").unlink()
    progress = out / "seed0/qat/progress.npz"
    progress.write_bytes(b"half")
    refused(crcore("compare", *KERAS, *SMALL, "--methods", METHODS_, "--out", out, "--resume"), progress, "delete it")


def test_train_starts_from_a_checkpoint(crcore, finished, tmp_path) -> None:
    options = ["--labels", 40, "--batch-size", 20, "--epochs", 3, "--method", "qat"]
    init = finished / "seed0/fp32/float.keras"
    outcome = crcore("train", *KERAS, *options, "--init", init, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "student.keras" in outcome.out
    again, first = (run_of(out, "qat")["history"][-1] for out in (tmp_path / "out", finished))
    assert again["task"] == pytest.approx(first["task"], rel=AGAIN)
    student = finished / "seed0/qat/student.keras"
    refused(crcore("train", *KERAS, *options, "--init", student, "--weight-bits", 3, "--out", tmp_path / "b"), "4-bit")
    refused(crcore("train", *options, "--init", init, "--out", tmp_path / "c"), "--backend keras")


# The parts


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "mobilenetv2"])
def test_a_network_computes_what_the_torch_network_computes(name: str) -> None:
    size = (8, 9)  # even and odd, where padding differs
    torch.manual_seed(0)
    theirs = build_torch(name, num_classes=7, in_channels=3, size=size).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    mine = build_keras(name, num_classes=7, in_channels=3, size=size)
    modules = {path.replace(".", "_"): module for path, module in theirs.named_modules()}
    with_weights = [layer for layer in mine.layers if layer.weights]
    assert {layer.name for layer in with_weights} == {path for path, m in modules.items() if [*m.parameters(False)]}
    for layer in with_weights:
        layer.set_weights(weights_of(modules[layer.name]))
    images = np.random.default_rng(0).normal(size=(2, 3, *size)).astype("float32")
    expected = theirs(torch.from_numpy(images)).detach().numpy()
    found = mine.predict_on_batch(images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def weights_of(module: nn.Module) -> list[np.ndarray]:
    """In the order and layout of the Keras layer."""
    arrays = [value.detach().numpy() for value in (*module.parameters(False), *module.buffers(False)) if value.ndim]
    if isinstance(module, nn.Conv2d):
        return [arrays[0].transpose((2, 3, 0, 1) if module.groups > 1 else (2, 3, 1, 0))]
    return [arrays[0].T, arrays[1]] if isinstance(module, nn.Linear) else arrays


def test_initial_weights_have_torch_s_distribution() -> None:
    torch.manual_seed(0)
    theirs = dict(build_torch("mobilenetv2", num_classes=10, in_channels=3, size=(8, 8)).named_modules())
    mine = build_keras("mobilenetv2", num_classes=10, in_channels=3, size=(8, 8))
    for path in ("stem.0", "blocks.5.residual.0", "blocks.5.residual.3", "head.0", "classifier"):
        found = mine.get_layer(path.replace(".", "_")).get_weights()
        for value, expected in zip(found, weights_of(theirs[path]), strict=True):
            few = value.size < 100
            assert np.abs(value).max() == pytest.approx(np.abs(expected).max(), rel=0.4 if few else 0.05)
            assert value.std() == pytest.approx(expected.std(), rel=0.4 if few else 0.1)


def test_sgd_takes_the_steps_of_torch() -> None:
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=5).astype("float32"), generator.normal(size=(6, 5)).astype("float32")
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    theirs = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    variable = keras.Variable(start)
    cosine = keras.optimizers.schedules.CosineDecay(0.1, 6)
    mine = _keras_training.SGD(cosine, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step, gradient in enumerate(gradients):
        theirs.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 6))
        weight.grad = torch.from_numpy(gradient)
        theirs.step()
        mine.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), weight.detach().numpy(), rtol=1e-5)


def test_weight_decay_leaves_scales_alone() -> None:
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    student = crk.prepare(net, cr.Recipe(cr.LSQ(4), cr.LSQ(4)))
    model = crk.ConsistencyModel(student, cr.Recipe(cr.LSQ(4), cr.LSQ(4)))
    optimizer = _keras_training.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.5)
    model.compile(optimizer, "mse")
    variables = student.trainable_variables
    before = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
    optimizer.apply([keras.ops.zeros(variable.shape) for variable in variables], variables)
    for variable, was in zip(variables, before, strict=True):
        moved = not np.array_equal(keras.ops.convert_to_numpy(variable), was)
        assert moved == ("kernel" in variable.path), variable.path


def test_a_step_has_the_images_and_views_of_the_torch_loop() -> None:
    options = {"student_view": "strong", "teacher_view": "weak", "flip": True, "device": torch.device("cpu")}
    batches = Batches(load_data("digits"), seed=0, labels=100, batch_size=16, **options)
    student, labels = batches.student(7, unlabeled=True)
    expected = [view.permute(0, 2, 3, 1).numpy() for view in (student, batches.teacher(7, unlabeled=True))]
    steps = {name: _keras_training.Steps(batches, method, first=3, steps=12) for name, method in METHODS.items()}
    assert {len(items) for items in steps.values()} == {9}
    for name in ("fp32", "qat", "qat+ema", "qat+kd"):
        x, y = steps[name][4]
        np.testing.assert_array_equal(x, expected[0][:16])
        np.testing.assert_array_equal(y, labels)
    x, _ = steps["qat+cr"][4]
    for view, whole in zip(x, expected, strict=True):
        np.testing.assert_array_equal(view, whole[:16])
    x, y = steps["qat+cr+unlabeled"][4]
    for place, whole in enumerate(expected):
        np.testing.assert_array_equal(x["labeled"][place], whole[:16])
        np.testing.assert_array_equal(x["unlabeled"][place], whole[16:])
    np.testing.assert_array_equal(y, labels)


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--amp"], ["--amp", "--backend torch"]),
        (["--device", "cuda"], ["--device cuda", "engine"]),
        (["--model", "resnet9000"], ["'resnet9000'", "resnet20"]),
        (["--model", "nets_of_the_keras_test:headless"], ["logits of shape (2, 10) for two images, got (2, 64)"]),
        (["--model", "nets_of_the_keras_test:probabilities"], ["probabilities", "softmax"]),
        (["--model", "nets_of_the_keras_test:unbuilt"], ["no weights yet", "model.build((None, 8, 8, 1))"]),
        (["--model", "nets_of_the_keras_test:text"], ["must return a keras.Model"]),
        (["--model", "nets_of_the_keras_test:of_torch"], ["input_shape=(8, 8, 1)"]),
        (["--backend", "tvm"], ["'tvm'", "keras"]),
    ],
)
def test_a_bad_option(crcore, tmp_path, options, words) -> None:
    refused(crcore("compare", "--backend", "keras", *options, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_said_so(crcore, tmp_path) -> None:
    options = (*SMALL, "--methods", "fp32", "--float-lr", 1e30, "--out", tmp_path / "out")
    refused(crcore("compare", *KERAS, *options), "--float-lr")


def test_a_checkpoint_that_is_none(crcore, finished, tmp_path) -> None:
    whole = (finished / "seed0/qat/student.keras").read_bytes()
    cut, foreign = tmp_path / "cut.keras", tmp_path / "foreign.keras"
    for keep in (0, 1000, len(whole) - 1):
        cut.write_bytes(whole[:keep])
        refused(crcore("evaluate", cut), cut, "cut short")
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("config.json", "{}")
    refused(crcore("evaluate", foreign), "no crcore metadata")
    refused(crcore("evaluate", tmp_path / "none.keras"), "no such checkpoint")
    refused(crcore("evaluate", finished / "seed0/fp32/float.keras", "--weight-bits", 4), "float network")
    refused(crcore("evaluate", finished / "seed0/qat/student.keras", "--device", "cpu"), "--device cpu")


def test_keras_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(CommandError, match=r"'keras' is missing; .* pip install keras .* KERAS_BACKEND="):
        open_backend("keras", device="auto")


def test_an_engine_that_cannot_train(crcore, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    refused(
        crcore("compare", "--backend", "keras", "--out", tmp_path / "out"), "KERAS_BACKEND=numpy", "tensorflow, jax"
    )


def test_the_engine_is_missing() -> None:
    engine = keras.config.backend()
    script = f"import sys; sys.modules[{engine!r}] = None\nfrom crcore.cli._backends import open_backend\n"
    script += "try:\n    open_backend('keras', device='auto')\nexcept Exception as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert f"the package {engine!r} is missing" in done.stdout, done.stderr
    assert f"pip install keras {engine}" in done.stdout
    assert f"KERAS_BACKEND={engine}" in done.stdout
