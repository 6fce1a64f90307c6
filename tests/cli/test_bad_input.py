"""Every bad value: one line on stderr that says what is allowed, status 2, no traceback, nothing written."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
from conftest import contents, pictures

import crcore as cr


def refused(outcome, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.err.startswith("crcore: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "qat,magic"], ["'magic'", "qat+cr"]),
        (["--methods", ""], ["no method", "qat+cr"]),
        (["--methods", "qat,qat"], ["twice"]),
        (["--data", "/nowhere/cifar10"], ["/nowhere/cifar10", "no such folder", "'digits'"]),
        (["--data", "nobody/nothing"], ["nobody/nothing", "hub", "network"]),
        (["--weight-bits", "0"], ["--weight-bits", "between 1 and 16", "got 0"]),
        (["--activation-bits", "17"], ["--activation-bits", "between 1 and 16", "got 17"]),
        (["--labels", "5000"], ["--labels 5000", "1198"]),
        (["--labels", "9"], ["--labels 9", "10"]),
        (["--labels", "0"], ["--labels", "'all'"]),
        (["--labels", "few"], ["--labels", "'few'"]),
        (["--labels", "all", "--methods", "qat+cr+unlabeled"], ["unlabeled", "--labels N"]),
        (["--teacher-batchnorm", "freeze"], ["'freeze'", "average", "copy"]),
        (["--reestimate-batchnorm", "-1"], ["--reestimate-batchnorm", "got -1"]),
        (["--unlabeled", "0"], ["--unlabeled", "'all'"]),
        (["--unlabeled", "999"], ["--unlabeled 999", "200 of 1198", "998"]),
        (["--ramp-shape", "step"], ["'step'", "cosine"]),
        (["--epochs", "-3"], ["--epochs", "1 or more", "-3"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--float-epochs", "0"], ["--float-epochs", "1 or more"]),
        (["--seeds", "0"], ["--seeds", "1 or more"]),
        (["--seeds", "9-5"], ["--seeds", "'9-5'", "such as 5-9"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--seeds", "some"], ["--seeds", "'some'"]),
        (["--batch-size", "1"], ["--batch-size", "2 or more"]),
        (["--lr", "0"], ["--lr", "positive"]),
        (["--float-lr", "nan"], ["--float-lr", "positive"]),
        (["--weight-decay", "-1"], ["--weight-decay", "zero or a positive"]),
        (["--consistency-weight", "-1"], ["--consistency-weight"]),
        (["--temperature", "0"], ["--temperature", "positive"]),
        (["--threshold", "1.5"], ["--threshold", "[0, 1)"]),
        (["--dampening", "-1"], ["--dampening", "zero or a positive"]),
        (["--dampening", "nan"], ["--dampening", "zero or a positive"]),
        (["--freezing", "0.3"], ["--freezing", "[0, 0.25)", "0.01 is a good start"]),
        (["--ramp", "2"], ["--ramp", "(0, 1]"]),
        (["--ema-decay", "1"], ["--ema-decay", "[0, 1)"]),
        (["--evaluate-every", "0"], ["--evaluate-every"]),
        (["--image-size", "32"], ["--image-size", "8x8"]),
        (["--model", "resnet9000"], ["'resnet9000'", "resnet20", "module:function"]),
        (["--model", "no_such_module:net"], ["no_such_module", "current folder"]),
        (["--model", "torch:no_such_function"], ["no_such_function"]),
        (["--model", "torch:pi"], ["not callable"]),
        (["--model", "torch:zeros"], ["num_classes=10", "in_channels=1"]),
        (["--quantizer", "int4"], ["'int4'", "lsq+"]),
        (["--student-view", "wild"], ["'wild'", "strong"]),
        (["--device", "tpu"], ["'tpu'", "cuda"]),
        (["--colour", "red"], ["--colour", "--help"]),
    ],
)
def test_a_bad_option_of_compare(crcore, tmp_path, monkeypatch, options, words) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(crcore("compare", "--out", tmp_path / "out", *options), *words)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")
def test_cuda_without_cuda(crcore, tmp_path) -> None:
    refused(crcore("compare", "--device", "cuda", "--out", tmp_path / "out"), "--device cpu")
    assert contents(tmp_path) == {}


def test_no_command_and_an_unknown_one(crcore) -> None:
    refused(crcore(), "COMMAND")
    refused(crcore("tranin"), "'tranin'", "compare")


def test_resume_without_a_folder(crcore) -> None:
    refused(crcore("compare", "--resume"), "--out")


def test_out_that_is_not_ours(crcore, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(crcore("compare", "--out", tmp_path / "file"), "give a folder")
    refused(crcore("compare", "--out", tmp_path), "not empty", "--resume")
    refused(crcore("compare", "--out", tmp_path, "--resume"), "no run of crcore")
    assert contents(tmp_path) == {"file": b"mine"}


def test_out_with_damaged_settings(crcore, tmp_path) -> None:
    (tmp_path / "settings.json").write_text('{"settings": {')
    refused(crcore("compare", "--out", tmp_path, "--resume"), "settings.json is damaged")


def write_parquet(folder: Path, name: str, **columns) -> None:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / name))


def cases(folder: Path) -> dict[str, list[str]]:
    """Data folders that cannot be used, and the words that must be in the message."""
    images, labels = pictures(12)
    pixels = [datasets.Image().encode_example(image) for image in images]
    broken = [*pixels[:5], {"bytes": b"not an image", "path": "cat.png"}, *pixels[6:]]
    larger = [datasets.Image().encode_example(image.resize((20, 20))) for image in images]
    (folder / "empty").mkdir()
    write_parquet(folder / "unreadable", "train-0.parquet", img=broken, label=labels)
    write_parquet(folder / "nolabel", "train-0.parquet", img=pixels, colour=labels)
    write_parquet(folder / "negative", "train-0.parquet", img=pixels, label=[-1] * 12)
    write_parquet(folder / "words", "train-0.parquet", img=pixels, label=["red"] * 12)
    write_parquet(folder / "one", "train-0.parquet", img=pixels, label=[0] * 12)
    write_parquet(folder / "testonly", "test-0.parquet", img=pixels, label=labels)
    write_parquet(folder / "sizes", "train-0.parquet", img=pixels[:6] + larger[6:], label=labels)
    write_parquet(folder / "twosizes", "train-0.parquet", img=pixels, label=labels)
    write_parquet(folder / "twosizes", "test-0.parquet", img=larger, label=labels)
    write_parquet(folder / "cut", "train-0.parquet", img=pixels, label=labels)
    cut = folder / "cut" / "train-0.parquet"
    cut.write_bytes(cut.read_bytes()[:-200])
    damaged = folder / "damaged" / "red"
    damaged.mkdir(parents=True)
    images[0].save(damaged / "good.png")
    (damaged / "bad.png").write_bytes((damaged / "good.png").read_bytes()[:60])
    return {
        "empty": ["parquet", "sub-folder"],
        "unreadable": ["image 5 of the train split", "cat.png", "repair or remove"],
        "nolabel": ["img, colour", "label"],
        "negative": ["label -1"],
        "words": ["label 'red'"],
        "one": ["at least two classes"],
        "testonly": ["test", "no train images"],
        "sizes": ["12x12", "20x20", "--image-size"],
        "twosizes": ["--image-size"],
        "cut": ["parquet"],
        "damaged": ["bad.png", "repair or remove"],
    }


def test_data_that_cannot_be_used(crcore, tmp_path) -> None:
    expected = cases(tmp_path)
    before = contents(tmp_path)
    for name, words in expected.items():
        outcome = crcore("compare", "--data", tmp_path / name, "--epochs", 1, "--out", tmp_path / "out")
        refused(outcome, str(tmp_path / name), *words)
    refused(crcore("compare", "--data", tmp_path / "cut/train-0.parquet"), "is a file", "folder")
    assert contents(tmp_path) == before


def test_image_size_makes_images_one_size(crcore, tmp_path) -> None:
    cases(tmp_path)
    for name in ("sizes", "twosizes"):
        options = ("--methods", "fp32", "--epochs", 1, "--seeds", 1, "--batch-size", 4, "--image-size", 8)
        outcome = crcore("compare", "--data", tmp_path / name, *options, "--out", tmp_path / f"out-{name}")
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weight-bits", "3"], ["4-bit LSQ weights", "3-bit LSQ weights"]),
        (["--activation-bits", "8"], ["4-bit LSQ activations", "8-bit LSQ activations"]),
        (["--quantizer", "pact"], ["4-bit LSQ activations", "4-bit PACT activations"]),
        (["--model", "resnet20"], ["resnet8", "resnet20"]),
    ],
)
def test_a_checkpoint_of_another_recipe(crcore, finished, tmp_path, options, words) -> None:
    file = finished / "seed0/qat+cr/student.safetensors"
    refused(crcore("evaluate", file, *options), str(file), *words)
    refused(crcore("train", "--init", file, *options, "--out", tmp_path / "out"), str(file), *words)
    assert contents(tmp_path) == {}


def test_a_float_checkpoint_where_a_quantized_one_is_expected(crcore, finished) -> None:
    refused(crcore("evaluate", finished / "seed0/fp32/float.safetensors", "--weight-bits", 4), "float network")


@pytest.mark.parametrize("method", ["fp32", "qat+kd"])
def test_a_quantized_checkpoint_where_a_float_one_is_needed(crcore, finished, tmp_path, method) -> None:
    file = finished / "seed0/qat/student.safetensors"
    outcome = crcore("train", "--method", method, "--init", file, "--out", tmp_path / "out")
    refused(outcome, "float.safetensors", method)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_checkpoint(crcore, finished, tmp_path, keep) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes((finished / "seed0/qat/student.safetensors").read_bytes()[:keep])
    refused(crcore("evaluate", file), str(file), "cut short")
    refused(crcore("train", "--init", file, "--out", tmp_path / "out"), str(file), "cut short")
    assert list(contents(tmp_path)) == ["cut.safetensors"]


def test_a_checkpoint_that_is_missing_or_foreign(crcore, tmp_path) -> None:
    refused(crcore("evaluate", tmp_path / "none.safetensors"), "no such checkpoint")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    refused(crcore("evaluate", tmp_path / "foreign.safetensors"), "no crcore metadata")
    (tmp_path / "notes.txt").write_text("not a checkpoint at all")
    refused(crcore("evaluate", tmp_path / "notes.txt"), "cannot be read")


def test_a_checkpoint_for_other_images(crcore, finished, parquet_folder, tmp_path) -> None:
    file = finished / "seed0/qat/student.safetensors"
    refused(crcore("evaluate", file, "--data", parquet_folder), "10 classes", "3 classes")
    outcome = crcore("train", "--init", file, "--data", parquet_folder, "--out", tmp_path / "out")
    refused(outcome, "10 classes", "3")


def test_a_loss_that_is_not_finite_is_said_so(crcore, tmp_path) -> None:
    options = ("--methods", "fp32", "--seeds", 1, "--epochs", 4, "--float-lr", 1e30)
    outcome = crcore("compare", *options, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "--float-lr" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("package", ["torch", "safetensors", "rich", "sklearn"])
def test_a_missing_package_names_the_extra(tmp_path, package) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from crcore.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "compare", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert package in done.stderr
    assert "pip install 'crcore[cli]'" in done.stderr
    assert contents(tmp_path) == {}


def test_in_a_process_of_its_own(tmp_path) -> None:
    command = [sys.executable, "-m", "crcore.cli", "compare", "--weight-bits", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert contents(tmp_path) == {}


def test_the_command_error_is_the_library_s_error() -> None:
    from crcore.cli._errors import CommandError

    assert issubclass(CommandError, cr.CRCoreError)
