"""`crcore export` writes what was trained, proves it, and leaves nothing behind where it cannot."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from conftest import contents
from test_bad_input import refused

from crcore.cli import main
from crcore.cli._choose import chosen_checkpoint
from crcore.cli._errors import CommandError

# What a network that was trained for seconds is sure of.
UNSURE = ("--minimum-agreement", "98")
FILES = {"onnx": "teacher.onnx", "litert": "teacher.tflite", "safetensors": "teacher-packed.safetensors"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one QAT method, trained until the network is sure of its classes."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--methods", "qat+cr", "--seeds", "1", "--epochs", "14", "--activation-bits", "8"]
    assert main(["compare", *options, "--labels", "900", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def method(run) -> Path:
    return run / "seed0" / "qat+cr"


@pytest.fixture(scope="module")
def exported(run, method) -> dict[str, dict]:
    """What `--verify --json` says of each kind of file; the files lie beside the checkpoint."""
    found = {}
    for to in FILES:
        with redirect_stdout(io.StringIO()) as out:
            assert main(["export", str(run), "--to", to, "--verify", "--json", *UNSURE]) == 0
        found[to] = json.loads(out.getvalue())
    return found


@pytest.mark.parametrize("to", FILES)
def test_verification_on_all_test_images(exported, method, to) -> None:
    found = exported[to]
    assert found["path"] == str(method / FILES[to])
    assert (found["role"], found["model"], found["images"]) == ("teacher", "resnet8", "test images of digits")
    assert found["samples"] == 599
    assert found["agreement"] >= 98
    assert abs(found["accuracy"] - found["expected_accuracy"]) <= 2
    assert found["expected_accuracy"] > 80
    assert found["size"] == (method / FILES[to]).stat().st_size
    assert found["size"] < {"onnx": 0.3, "litert": 0.4, "safetensors": 0.16}[to] * found["float_size"]
    if to != "safetensors":
        assert (found["layers"], found["differing_layers"]) == (10, [])
        assert found["latency"] > 0
        assert found["float_latency"] > 0


@pytest.mark.parametrize("to", FILES)
def test_an_exported_file_is_all_that_evaluate_needs(crcore, exported, method, tmp_path, to) -> None:
    file = tmp_path / f"moved-{FILES[to]}"
    shutil.copy(method / FILES[to], file)
    found = json.loads(crcore("evaluate", file, "--json").out)
    assert found["accuracy"] == pytest.approx(exported[to]["accuracy"])
    assert found["runtime"] == {"onnx": "onnxruntime", "litert": "litert", "safetensors": None}[to]
    assert (found["role"], found["model"], found["data"]) == ("teacher", "resnet8", "digits")
    refused(crcore("evaluate", file, "--weight-bits", 3), "3-bit LSQ weights", "4-bit LSQ weights")
    refused(crcore("evaluate", file, "--model", "resnet20"), "holds a resnet8")


@pytest.mark.parametrize("to", FILES)
def test_runtimes_say_nothing_by_themselves(capfd, exported, method, to) -> None:
    assert main(["evaluate", str(method / FILES[to])]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")


def test_the_table_is_for_people(crcore, method, tmp_path) -> None:
    options = ("--role", "student", "--to", "onnx", "--out", tmp_path / "s.onnx")
    outcome = crcore("export", method, *options, "--verify", *UNSURE)
    assert outcome.status == 0, outcome.err
    for words in (f"wrote {tmp_path / 's.onnx'} (student network, resnet8)", "accuracy", "same class", "latency, ms"):
        assert words in outcome.out
    assert "tmp" not in outcome.out.replace(str(tmp_path), "")
    assert "student network, resnet8, in onnxruntime" in crcore("evaluate", tmp_path / "s.onnx").out


def test_without_verify_the_file_is_proved_on_training_images(crcore, method, tmp_path) -> None:
    outcome = crcore("export", method, "--to", "onnx", "--samples", 100, "--out", tmp_path / "net.onnx", *UNSURE)
    assert outcome.status == 0, outcome.err
    assert "of 100 training images of digits" in outcome.out
    assert list(contents(tmp_path)) == ["net.onnx"]


def test_the_options_of_onnx(crcore, method, tmp_path) -> None:
    options = ("--to", "onnx", "--out", tmp_path / "net.onnx")
    outcome = crcore("export", method / "student.safetensors", *options, "--opset", 18, "--no-integer-only")
    assert outcome.status == 0, outcome.err
    model = onnx.load(tmp_path / "net.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert "--opset 21 packs them" in outcome.out
    codes = {t.name: t.data_type for t in model.graph.initializer if t.name.endswith("residual.0.codes")}
    assert set(codes.values()) == {onnx.TensorProto.INT8}


def test_a_file_that_disagrees_is_not_put_in_place(crcore, method, tmp_path, monkeypatch) -> None:
    """Ranges that come from black images alone fit no others."""
    from crcore.cli import _export

    before = _export._some

    def black(images, count):
        chosen = before(images, count)
        return type(chosen)(chosen.images * 0, chosen.labels)

    monkeypatch.setattr(_export, "_some", black)
    target = tmp_path / "net.onnx"
    target.write_text("old")
    outcome = crcore("export", method, "--to", "onnx", "--integer-only", "--verify", "--out", target)
    refused(outcome, str(target), "99.5 % are required", "--no-integer-only", "--minimum-agreement")
    assert ".crcore-" not in outcome.err
    assert contents(tmp_path) == {"net.onnx": b"old"}


@pytest.mark.parametrize("to", FILES)
def test_a_full_disk_leaves_nothing_behind(crcore, method, tmp_path, to, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    file = tmp_path / f"net{Path('a' + FILES[to]).suffix}"
    refused(crcore("export", method, "--to", to, "--out", file), "No space left on device")
    assert contents(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_several_networks_lists_them(crcore, finished) -> None:
    outcome = crcore("export", finished, "--to", "onnx")
    refused(outcome, "holds 10 quantized networks", str(finished / "seed1/qat+cr"))
    refused(crcore("export", finished / "seed0", "--to", "onnx"), "holds 5 quantized networks")


def test_which_checkpoint_is_meant(finished, tmp_path) -> None:
    method = finished / "seed0/qat+cr"
    assert chosen_checkpoint(method, None) == method / "teacher.safetensors"
    assert chosen_checkpoint(method, "student") == method / "student.safetensors"
    assert chosen_checkpoint(method / "student.safetensors", None) == method / "student.safetensors"
    assert chosen_checkpoint(finished / "seed0/qat", None) == finished / "seed0/qat/student.safetensors"
    for path, role, words in (
        (finished / "seed0/qat", "teacher", "holds student only"),
        (method / "student.safetensors", "teacher", "is a file"),
        (finished / "seed0/fp32", None, "no student or teacher checkpoint"),
        (tmp_path / "none", None, "no such checkpoint or folder"),
    ):
        with pytest.raises(CommandError, match=words):
            chosen_checkpoint(path, role)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--to"]),
        (["--to", "tflite"], ["'tflite'", "litert"]),
        (["--to", "litert", "--opset", "20"], ["--opset", "--to onnx"]),
        (["--to", "safetensors", "--no-integer-only"], ["--integer-only", "--to onnx"]),
        (["--to", "onnx", "--samples", "0"], ["--samples", "1 or more"]),
        (["--to", "onnx", "--minimum-agreement", "101"], ["--minimum-agreement", "percent"]),
        (["--to", "onnx", "--out", "net.tflite"], ["net.tflite", ".onnx"]),
        (["--to", "onnx", "--out", "nowhere/net.onnx"], ["no folder nowhere"]),
        (["--to", "onnx", "--opset", "9"], ["--opset", "14", "9"]),
        (["--to", "onnx", "--role", "float"], ["'float'", "teacher"]),
        (["--to", "onnx", "--data", "/nowhere"], ["/nowhere"]),
    ],
)
def test_a_bad_option_of_export(crcore, method, options, words) -> None:
    before = contents(method)
    refused(crcore("export", method, *options), *words)
    assert contents(method) == before


def test_what_cannot_be_exported(crcore, finished, parquet_folder, exported, method, tmp_path) -> None:
    refused(crcore("export", finished / "seed0/fp32/float.safetensors", "--to", "onnx"), "float network")
    student = finished / "seed0/qat/student.safetensors"
    refused(crcore("export", student, "--to", "onnx", "--data", parquet_folder), "10 classes", "3 classes")
    refused(crcore("export", student, "--to", "safetensors", "--out", student), "checkpoint itself")
    for file in ("safetensors", "onnx"):
        refused(crcore("export", method / FILES[file], "--to", "onnx"), "exported already")
    before = contents(finished)
    for other in (finished / "seed0/fp32/float.safetensors", method / "student.safetensors"):
        outcome = crcore("export", student, "--to", "safetensors", "--out", other)
        refused(outcome, str(other), "has the name of a checkpoint")
    assert contents(finished) == before
    cut = tmp_path / "student.safetensors"
    cut.write_bytes(student.read_bytes()[:-100])
    refused(crcore("export", cut, "--to", "onnx"), str(cut), "cut short")


@pytest.mark.parametrize("to", FILES)
def test_a_damaged_file_is_not_evaluated(crcore, exported, method, tmp_path, to) -> None:
    file = tmp_path / FILES[to]
    whole = (method / FILES[to]).read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:keep])
        refused(crcore("evaluate", file), str(file), "cut short")


def test_files_that_crcore_export_did_not_write(crcore, exported, method, tmp_path) -> None:
    model = onnx.load(method / FILES["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    refused(crcore("evaluate", tmp_path / "foreign.onnx"), "no crcore metadata")
    onnx.helper.set_model_props(model, {"crcore": '{"kind": "network"}'})
    onnx.save(model, tmp_path / "foreign.onnx")
    refused(crcore("evaluate", tmp_path / "foreign.onnx"), "crcore export")
    packed = method / FILES["safetensors"]
    with safetensors.safe_open(packed, framework="numpy") as file:
        metadata = file.metadata()
    del metadata["crcore.network"]
    safetensors.numpy.save_file(safetensors.numpy.load_file(packed), tmp_path / "own.safetensors", metadata=metadata)
    refused(crcore("evaluate", tmp_path / "own.safetensors"), "save_quantized", "--to safetensors")
    refused(crcore("evaluate", method / FILES["onnx"], "--device", "cuda"), "CPU")


@pytest.mark.parametrize("package", ["onnx", "ai_edge_litert", "tensorflow"])
def test_a_missing_package_is_named(method, tmp_path, package) -> None:
    to, suffix = ("onnx", ".onnx") if package.startswith("onnx") else ("litert", ".tflite")
    script = f"import sys; sys.modules[{package!r}] = None; from crcore.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["export", str(method), "--to", to, "--out", str(tmp_path / f"net{suffix}")]
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "pip install" in done.stderr
    assert contents(tmp_path) == {}


def test_packed_files_hold_the_trained_integers(exported, method) -> None:
    """The packed file and the ONNX file agree on every layer."""
    from crcore import QuantizedCheckpoint

    layers = QuantizedCheckpoint(method / FILES["safetensors"]).read(safetensors.safe_open)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(method / FILES["onnx"]).graph.initializer}
    quantized = [name for name, layer in layers.items() if "weight_quantizer" in layer.quantizers]
    assert len(quantized) == 10
    for name in quantized:
        trained, stored = layers[name].arrays["weight"], tensors[f"{name}.codes"].astype(np.int32)
        assert np.array_equal(trained, stored) or np.array_equal(trained.T, stored), name
