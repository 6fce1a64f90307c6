"""One full comparison on digits, and short ones on parquet files and on an image folder."""

import statistics
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ALL_METHODS, contents, results
from PIL import Image
from safetensors.torch import load_file


def test_results_hold_every_seed_and_method(finished: Path) -> None:
    found = results(finished)
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (seed, method) for seed in (0, 1) for method in ALL_METHODS.split(",")
    ]
    assert found["complete"] is True
    assert found["settings"]["weight_bits"] == 4
    assert found["settings"]["labels"] == 200
    assert {"crcore", "torch", "numpy", "python"} <= found["versions"].keys()
    assert found["data"]["train"] + found["data"]["test"] == 1797
    for run in found["runs"]:
        average = run["method"] in ("qat+ema", "qat+cr", "qat+cr+unlabeled")
        assert 0 <= run["accuracy"] <= 100
        assert (run["teacher_accuracy"] is not None) == average
        assert run["seconds"] > 0
        assert [entry["epoch"] for entry in run["history"]] == list(range(1, 13))


def test_the_networks_learn(finished: Path) -> None:
    accuracy = [run["accuracy"] for run in results(finished)["runs"]]
    assert min(accuracy) > 60  # 10 % is chance; the short run is deterministic


def test_every_quantized_method_makes_the_same_number_of_steps(finished: Path) -> None:
    runs = results(finished)["runs"]
    assert {(run["steps"], run["float_steps"]) for run in runs if run["method"] != "fp32"} == {(36, 36)}
    assert {(run["steps"], run["float_steps"]) for run in runs if run["method"] == "fp32"} == {(36, 0)}


def test_the_student_of_the_ema_control_is_plain_qat(finished: Path) -> None:
    plain = load_file(finished / "seed0/qat/student.safetensors")
    control = load_file(finished / "seed0/qat+ema/student.safetensors")
    assert all(torch.equal(plain[name], control[name]) for name in plain.keys() | control.keys())


def test_methods_differ_where_they_should(finished: Path) -> None:
    states = [
        load_file(finished / f"seed0/{name}/student.safetensors")
        for name in ("qat", "qat+kd", "qat+cr", "qat+cr+unlabeled")
    ]
    for i, one in enumerate(states):
        for other in states[:i]:
            assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_table_shows_means_gains_and_what_differs(finished: Path) -> None:
    table = (finished / "table.md").read_text()
    runs = results(finished)["runs"]
    for method in ALL_METHODS.split(","):
        values = [run["accuracy"] for run in runs if run["method"] == method]
        line = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in line
        assert runs[[run["method"] for run in runs].index(method)]["differs"] in line
        losses = [run["history"][-1]["task"] for run in runs if run["method"] == method]
        assert f" {method} {statistics.fmean(losses):.3f}" in table
    assert "95 % t confidence interval" in table
    assert "| 36 + 36 |" in table


def test_the_curves_are_a_readable_picture(finished: Path) -> None:
    with Image.open(finished / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 500
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_nothing_temporary_is_left(finished: Path) -> None:
    assert {file.suffix for file in finished.rglob("*") if file.is_file()} == {".json", ".md", ".png", ".safetensors"}
    assert not list(finished.rglob("progress*"))


def test_checkpoints_carry_recipe_model_and_versions(finished: Path) -> None:
    with safetensors.safe_open(finished / "seed0/qat+cr/teacher.safetensors", framework="pt") as file:
        text = file.metadata()["crcore"]
    for word in ('"recipe"', '"LSQ"', '"resnet8"', '"versions"', '"teacher"'):
        assert word in text


@pytest.mark.parametrize(
    ("file", "column"),
    [
        ("fp32/float", "accuracy"),
        ("qat/student", "accuracy"),
        ("qat+cr/student", "accuracy"),
        ("qat+cr/teacher", "teacher_accuracy"),
        ("qat+ema/teacher", "teacher_accuracy"),
    ],
)
def test_evaluating_a_checkpoint_gives_the_accuracy_of_the_results(crcore, finished, file, column) -> None:
    import json

    outcome = crcore("evaluate", finished / f"seed1/{file}.safetensors", "--json")
    assert outcome.status == 0, outcome.err
    method = file.partition("/")[0]
    (run,) = [run for run in results(finished)["runs"] if (run["seed"], run["method"]) == (1, method)]
    assert json.loads(outcome.out)["accuracy"] == run[column]


def test_evaluate_accepts_what_the_checkpoint_is(crcore, finished) -> None:
    file = finished / "seed0/qat/student.safetensors"
    options = ("--quantizer", "lsq", "--weight-bits", 4, "--activation-bits", 4, "--model", "resnet8")
    outcome = crcore("evaluate", file, *options)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("accuracy ")


def test_parquet_images_with_every_quantizer(crcore, parquet_folder, tmp_path) -> None:
    before = contents(parquet_folder)
    for quantizer in ("lsq", "lsq+", "pact", "dorefa", "minmax"):
        out = tmp_path / quantizer
        arguments = ("--methods", "fp32,qat+cr+unlabeled", "--labels", 30, "--epochs", 12, "--batch-size", 10)
        outcome = crcore(
            "compare", "--data", parquet_folder, *arguments, "--quantizer", quantizer, "--seeds", 1, "--out", out
        )
        assert outcome.status == 0, outcome.err
        assert "there is no standard deviation and no confidence interval" in (out / "table.md").read_text()
        found = results(out)
        assert found["data"]["classes"] == ["red", "green", "blue"]
        assert found["data"]["test"] == 45
        assert min(run["accuracy"] for run in found["runs"]) > 60, quantizer
    assert contents(parquet_folder) == before


def test_image_folder(crcore, image_folder, tmp_path) -> None:
    before = contents(image_folder)
    arguments = ("--methods", "qat", "--epochs", 10, "--batch-size", 12, "--seeds", 1, "--student-view", "strong")
    outcome = crcore("compare", "--data", image_folder, *arguments, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    found = results(tmp_path / "out")
    assert (found["data"]["train"], found["data"]["test"]) == (72, 18)
    assert sorted(found["data"]["classes"]) == ["blue", "green", "red"]
    assert found["runs"][0]["accuracy"] > 60
    assert contents(image_folder) == before


def test_train_starts_from_a_float_checkpoint(crcore, finished, tmp_path) -> None:
    init = finished / "seed0/fp32/float.safetensors"
    outcome = crcore("train", "--method", "qat", "--epochs", 12, "--init", init, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "student.safetensors" in outcome.out
    again = load_file(tmp_path / "out/seed0/qat/student.safetensors")
    first = load_file(finished / "seed0/qat/student.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)
