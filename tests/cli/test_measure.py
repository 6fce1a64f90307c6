"""`crcore flatness` and `crcore sensitivity` write what the library measures of a checkpoint, once."""

import json
import os
import shutil
from functools import partial

import crcore_torch as crt
import numpy as np
import pytest
from conftest import contents
from test_bad_input import refused

from crcore import CRCoreError, flatness
from crcore.cli import _measure_command, _sections
from crcore.cli._backends import open_backend
from crcore.cli._data import load_data
from crcore.cli._measure import Flatness, Sensitivity, settings_of
from crcore.cli._networks import load_checkpoint, view_of
from crcore.cli._split import stratified

FEW = {
    "flatness": ("--top", "3", "--probes", "2", "--no-density", "--samples", "20"),
    "sensitivity": ("--draws", "2", "--radii", "0.01", "--samples", "20"),
}


@pytest.fixture(autouse=True)
def _no_layers(monkeypatch):
    """Pages without the figures of layers, which take time and are not what is tested here."""
    monkeypatch.setattr(_sections, "measure_layers", lambda *_, **__: ([], []))


@pytest.fixture(scope="module")
def networks(finished, tmp_path_factory):
    """The networks of one seed, in a folder of their own."""
    folder = tmp_path_factory.mktemp("networks")
    for method in ("fp32", "qat", "qat+cr"):
        shutil.copytree(finished / "seed0" / method, folder / method)
    return folder


def landscape_of(checkpoint, split):
    """Of the first images that were labeled, or of test images, 20 of them evenly spread."""
    info, network = load_checkpoint(open_backend("torch", device="cpu"), checkpoint)
    data = load_data("digits")
    images = data.train if split == "train" else data.test
    among = np.arange(len(images.labels))
    if split == "train":
        among = stratified(images.labels.numpy(), 200, seed=0, stream="labels")
    chosen = among[np.arange(20) * len(among) // 20]
    pixels = images.images[chosen]
    return crt.Landscape(network, view_of(info)(pixels, 0), images.labels[chosen]), pixels, info


def test_flatness_is_what_the_library_finds_on_the_labeled_images(crcore, networks) -> None:
    checkpoint = networks / "qat" / "student.safetensors"
    found = json.loads(crcore("flatness", checkpoint, *FEW["flatness"], "--json").out)[0]
    landscape, _, _ = landscape_of(checkpoint, "train")
    assert found["eigenvalues"] == flatness.top_eigenvalues(landscape, 3).tolist()
    assert found["trace"]["mean"] == flatness.trace(landscape, probes=2).mean
    assert (found["kind"], found["method"], found["role"], found["samples"]) == ("flatness", "qat", "student", 20)
    assert found["parameters"] == landscape.size
    assert json.loads((networks / "qat" / "student-flatness.json").read_text()) == found
    assert (networks / "qat" / "student-flatness.png").stat().st_size > 1000


def test_sensitivity_is_what_the_library_finds_on_test_images(crcore, networks) -> None:
    checkpoint = networks / "qat" / "student.safetensors"
    found = json.loads(crcore("sensitivity", checkpoint, *FEW["sensitivity"], "--json").out)[0]
    landscape, pixels, info = landscape_of(checkpoint, "test")
    images = pixels.numpy().astype(np.float32) / np.float32(255)
    curves = {curve["name"]: curve for curve in found["curves"]}

    def normalize(images):
        return (images.astype(np.float32) - np.float32(info.mean[0])) / np.float32(info.std[0])

    expected = flatness.noise_sensitivity(landscape, images, normalize, draws=2)
    assert curves["gaussian noise on the input"]["loss"]["mean"] == expected.loss.mean.tolist()
    blurred = flatness.corruption_sensitivity(landscape, images, normalize, corruptions=["gaussian_blur"], draws=2)
    assert curves["gaussian blur"]["accuracy"]["mean"] == blurred["gaussian_blur"].accuracy.mean.tolist()
    moved = flatness.weight_sensitivity(landscape, draws=2)
    assert curves["noise on the weights"]["accuracy"]["high"] == moved.accuracy.high.tolist()
    assert found["sharpness"] == {"radius": [0.01], "increase": [flatness.sharpness(landscape, 0.01).increase]}


@pytest.mark.parametrize("command", FEW)
def test_folders_stand_for_all_they_hold_and_are_shown_side_by_side(crcore, networks, command) -> None:
    outcome = crcore(command, networks / "fp32", networks / "qat+cr", *FEW[command])
    assert outcome.status == 0
    for name in ("fp32/float", "qat+cr/student", "qat+cr/teacher"):
        assert f"{name}.safetensors" in outcome.out
        assert (networks / f"{name}-{command}.json").is_file()
    assert (networks / f"{command}.png").stat().st_size > 1000


def test_what_was_measured_is_not_measured_again(crcore, networks) -> None:
    checkpoint = networks / "qat+cr" / "student.safetensors"
    crcore("flatness", checkpoint, *FEW["flatness"])
    before = contents(networks)
    assert "measured earlier" in crcore("flatness", checkpoint, *FEW["flatness"]).err
    assert {name: data for name, data in contents(networks).items() if name.endswith("json")} == {
        name: data for name, data in before.items() if name.endswith("json")
    }
    assert "measured earlier" not in crcore("flatness", checkpoint, *FEW["flatness"], "--seed", "1").err
    (networks / "qat+cr" / "student-flatness.json").write_text('{"settings"')
    assert "measured earlier" not in crcore("flatness", checkpoint, *FEW["flatness"]).err
    assert contents(networks)["qat+cr/student-flatness.json"] == before["qat+cr/student-flatness.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["flatness", "qat/nothing.safetensors"], ["no such checkpoint"]),
        (["flatness", "nowhere"], ["nowhere", "no such checkpoint or folder"]),
        (["flatness", "."], ["holds no checkpoint"]),
        (["flatness", "qat/student.safetensors", "--top", "0"], ["--top", "1 or more"]),
        (["flatness", "qat/student.safetensors", "--top", "99999999"], ["below the number of weights"]),
        (["flatness", "qat/student.safetensors", "--samples", "0"], ["--samples"]),
        (["flatness", "qat/student.safetensors", "--seed", "-1"], ["--seed", "0 or more"]),
        (["flatness", "qat/student.safetensors", "--out", "figure.pdf"], [".png"]),
        (["flatness", "qat/student.safetensors", "--out", "no/figure.png"], ["no folder"]),
        (["sensitivity", "qat/student.safetensors", "--draws", "1"], ["--draws", "2 or more"]),
        (["sensitivity", "qat/student.safetensors", "--radii", "0"], ["--radii", "positive"]),
        (["sensitivity", "qat/student.safetensors", "--radii", "0.1,"], ["--radii", "commas"]),
        (["sensitivity", "qat/student.safetensors", "--data", "nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_bad_input(crcore, finished, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[1].startswith("qat"):
        shutil.copytree(finished / "seed0" / "qat", "qat")
    before = contents(tmp_path)
    refused(crcore(*arguments), *words)
    assert contents(tmp_path) == before


def test_a_report_measures_what_is_missing(crcore, finished, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_measure_command, "Flatness", partial(Flatness, top=3, probes=2, density=False))
    monkeypatch.setattr(_measure_command, "Sensitivity", partial(Sensitivity, draws=2, radii=(0.01,)))
    run = tmp_path / "run"
    shutil.copytree(finished / "seed0" / "qat", run / "seed0" / "qat")
    shutil.copy(finished / "results.json", run)
    assert "crcore report" in _page(crcore, run)
    assert "Largest eigenvalues" not in _page(crcore, run)
    page = _page(crcore, run, "--measure")
    assert "Largest eigenvalues" in page
    assert "Sharpness" in page
    measured = contents(run)
    assert _page(crcore, run, "--measure") == page
    assert contents(run) == measured
    (run / "seed0/qat/student-flatness.json").write_text("[")
    assert "student-flatness.json cannot be read" in _page(crcore, run)
    assert _page(crcore, run, "--measure") == page


@pytest.fixture
def canned(crcore, networks, monkeypatch):
    """Measurements that take no time; the list of what was measured."""
    checkpoint, measured = networks / "qat" / "student.safetensors", []
    found = {kind: json.loads(crcore(kind, checkpoint, *FEW[kind], "--json").out)[0] for kind in FEW}

    def at_once(checkpoint, instrument, where, data, progress):
        measured.append((checkpoint.parent.name, checkpoint.stem, instrument.kind))
        return found[instrument.kind] | {"method": checkpoint.parent.name, "settings": settings_of(instrument, where)}

    monkeypatch.setattr(_measure_command, "measured", at_once)
    return measured


def test_a_report_measures_as_the_commands_do_by_default(crcore, finished, tmp_path, canned) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "seed0/qat", run / "seed0/qat")
    shutil.copy(finished / "results.json", run)
    _page(crcore, run, "--measure")
    for command in FEW:
        assert "measured earlier" in crcore(command, run / "seed0/qat/student.safetensors").err


def test_a_report_goes_on_where_a_network_cannot_be_measured(crcore, finished, tmp_path, canned) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "seed0/qat", run / "seed0/qat")
    shutil.copytree(finished / "seed0/qat+cr", run / "seed0/qat+cr")
    shutil.copy(finished / "results.json", run)
    at_once = _measure_command.measured

    def some(checkpoint, *arguments):
        if checkpoint.parent.name == "qat":
            raise CRCoreError("out of luck")
        return at_once(checkpoint, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_measure_command, "measured", some)
        outcome = crcore("report", run, "--measure")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("qat/student.safetensors: not measured: out of luck") == 2
    assert {(name, role) for name, role, _ in canned} == {("qat+cr", "student"), ("qat+cr", "teacher")}


def test_integers_are_not_measured(crcore, finished, tmp_path) -> None:
    packed = tmp_path / "packed.safetensors"
    assert crcore("export", finished / "seed0/qat+cr", "--to", "safetensors", "--out", packed).status == 0
    refused(
        crcore("flatness", packed), "packed.safetensors", "holds packed integers", "checkpoint that it was made from"
    )


def test_the_student_of_the_average_is_not_shown_over_qat_s(crcore, finished, tmp_path, canned) -> None:
    run = tmp_path / "run"
    for method in ("qat", "qat+ema"):
        shutil.copytree(finished / "seed0/qat+cr", run / "seed0" / method)
    (run / "seed0/qat/teacher.safetensors").unlink()
    shutil.copy(finished / "results.json", run)
    _page(crcore, run, "--measure")
    assert {name[:2] for name in canned} == {("qat", "student"), ("qat+ema", "teacher")}
    assert crcore("flatness", run).status == 0
    assert ("qat+ema", "student", "flatness") in canned
    assert "seed0/qat+ema/student" not in _page(crcore, run)
    shutil.rmtree(run / "seed0/qat")
    assert "seed0/qat+ema/student" in _page(crcore, run)


def test_paths_from_here_and_from_the_root_go_together(crcore, networks, monkeypatch, canned) -> None:
    monkeypatch.chdir(networks.parent)
    outcome = crcore("flatness", f"{networks.name}/qat", networks / "fp32")
    assert outcome.status == 0, outcome.err
    assert (networks / "flatness.png").is_file()


def test_an_older_measurement_than_its_checkpoint_is_none(crcore, networks, canned) -> None:
    checkpoint = networks / "qat" / "student.safetensors"
    crcore("flatness", checkpoint)
    canned.clear()
    assert "measured earlier" in crcore("flatness", checkpoint).err
    os.utime(networks / "qat" / "student-flatness.json", (0, 0))
    crcore("flatness", checkpoint)
    assert canned == [("qat", "student", "flatness")]


def _page(crcore, run, *options) -> str:
    outcome = crcore("report", run, *options)
    assert outcome.status == 0, outcome.err
    return (run / "report.html").read_text(encoding="utf-8")
