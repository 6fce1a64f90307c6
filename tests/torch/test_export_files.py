"""`export_onnx`, `export_litert`, `verify`: networks of this library and of others, in the runtimes themselves."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import textwrap
from collections import Counter

import crcore_torch as crt
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from small_nets import convnet, mlp, recipe, vectors
from test_models_of_others import MODELS, prepared
from torch import nn

import crcore as cr
from crcore import deploy
from crcore.cli._models import MODELS as CIFAR_MODELS

# What the widths of weights and activations are stored in and run on; 8-bit first and last layers would hide it.
WIDTHS = {
    "W8A8": (8, 8, TensorProto.INT8),
    "W4A8": (4, 8, TensorProto.INT4),
    "W4A4": (4, 4, TensorProto.INT4),
    "W3A3": (3, 3, TensorProto.INT4),
    "W2A8": (2, 8, TensorProto.INT2),
    "W1A2": (1, 2, TensorProto.INT2),
}
QUANTIZERS = {
    "LSQ": (cr.LSQ(4, per_channel=True), cr.LSQ(4)),
    "LSQ per tensor": (cr.LSQ(8), cr.LSQ(8)),
    "LSQ narrow": (cr.LSQ(2, per_channel=True, narrow=True), cr.LSQ(8)),
    "LSQPlus": (cr.LSQ(8, per_channel=True), cr.LSQPlus(8)),
    "PACT and DoReFa": (cr.DoReFa(4), cr.PACT(4)),
    "DoReFa": (cr.DoReFa(2, per_channel=True), cr.DoReFa(8)),
    "MinMax": (cr.MinMax(8, per_channel=True), cr.MinMax(8)),
    "MinMax with zero points": (cr.MinMax(6, symmetric=False), cr.MinMax(8)),
    "1 bit": (cr.LSQ(1, per_channel=True), cr.LSQ(1)),
    "LSQ signed": (cr.LSQ(8, per_channel=True), cr.LSQ(8, signed=True)),
    "DoReFa weights of 9 bits": (cr.DoReFa(8), cr.LSQ(8)),
    "16 bits": (cr.LSQ(16), cr.LSQ(16)),
    "weights only": (cr.LSQ(4, per_channel=True), None),
    "activations only": (None, cr.LSQ(8)),
}


def pictures(n: int, *, size: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise on one of three patterns: what a network can learn in a few steps, with margins."""
    labels = torch.arange(n) % 3
    patterns = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(100 + seed))
    return patterns[labels] + 0.3 * noise, labels


def trained(net: nn.Module, chosen: cr.Recipe, *, size: int = 8, steps: int = 25) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(2 * steps):
        if step == steps:
            net = crt.prepare(net, chosen)
            optimizer = torch.optim.Adam(crt.parameter_groups(net, lr=0.005), lr=0.005)
        x, y = pictures(48, size=size, seed=step)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def students() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        name: trained(convnet(), cr.Recipe(cr.LSQ(w, per_channel=True), cr.LSQ(a), first_last_bits=None))
        for name, (w, a, _) in WIDTHS.items()
    }


def types(path) -> set[int]:
    return {t.data_type for t in onnx.load(path).graph.initializer if re.fullmatch(r"\d+\.codes", t.name)}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_computes_in_onnx_runtime_what_was_trained(students, width, tmp_path):
    student, path = students[width], tmp_path / "net.onnx"
    x, y = pictures(300)
    found = crt.export_onnx(student, x, path, labels=y)
    assert types(path) == {WIDTHS[width][2]}
    assert found.path == str(path)
    assert found.agreement >= 99.5
    assert found.differing_layers == ()
    assert found.accuracy == pytest.approx(found.expected_accuracy, abs=0.5)
    assert found.expected_accuracy > 95
    on_others = crt.verify(student, pictures(300, seed=7)[0], path)
    on_others.check()
    assert on_others.accuracy is None
    assert on_others.size == path.stat().st_size


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_is_exported(name, tmp_path):
    weights, activations = QUANTIZERS[name]
    student = trained(convnet(), cr.Recipe(weights, activations, first_last_bits=None))
    x, y = pictures(200)
    found = crt.export_onnx(student, x, tmp_path / "net.onnx", labels=y)
    assert found.agreement >= 99.5
    assert found.accuracy > 60  # 1 bit learns little in 25 steps
    exact = crt.export_onnx(student, x, tmp_path / "exact.onnx", integer_only=False)
    assert exact.max_code_difference < 0.01


@pytest.mark.parametrize("width", ["W8A8", "W4A8", "W4A4"])
def test_litert_runs_the_trained_integers_in_int8(students, width, tmp_path):
    student, path = students[width], tmp_path / "net.tflite"
    x, y = pictures(300)
    found = crt.export_litert(student, x, path, labels=y)
    assert (found.runtime, found.differing_layers) == ("litert", ())
    assert found.agreement >= 99.5
    crt.verify(student, pictures(300, seed=7)[0], path).check()


def operators_that_run(path, optimized) -> Counter[str]:
    """Those of the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 4)])
def test_networks_in_cifar_form(name, weights, activations, tmp_path):
    net = CIFAR_MODELS[name](num_classes=3, in_channels=3)
    steps = 25 if name == "resnet8" else 6
    student = trained(net, recipe(weights) if weights == activations else recipe(), size=12, steps=steps)
    x, y = pictures(200, size=12)
    # Six steps leave MobileNetV2 with small margins: what is asked for is that no integer differs.
    found = crt.export_onnx(student, x, tmp_path / "net.onnx", labels=y, minimum_agreement=0)
    assert found.differing_layers == ()
    operators = operators_that_run(tmp_path / "net.onnx", tmp_path / "optimized.onnx")
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    if activations == 8:  # depthwise convolutions, sums, pooling and classifier too
        assert operators["QLinearConv"] == convolutions
        assert not {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "GlobalAveragePool", "ReduceMean"} & set(operators)
        assert {"QLinearAdd", "QLinearGlobalAveragePool", "MatMulIntegerToFloat"} < set(operators)
    exact = crt.export_onnx(student, x, tmp_path / "exact.onnx", labels=y, integer_only=False)
    assert exact.agreement >= 99.5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_models_that_other_people_wrote(name, bits, tmp_path):
    make, batch, _ = MODELS[name]
    student = prepared(make()).train()
    for seed in range(2):
        student(**batch(seed))
    student.eval()
    sample = {key: torch.cat([batch(seed)[key] for seed in range(8)]) for key in batch(0)}
    exact = crt.export_onnx(student, sample, tmp_path / "exact.onnx", integer_only=False)
    assert exact.max_code_difference < 0.1
    assert exact.differing_layers == ()
    assert sum(name.endswith(".codes") for name in names(tmp_path / "exact.onnx")) >= 7


def names(path) -> list[str]:
    return [tensor.name for tensor in onnx.load(path).graph.initializer]


def test_a_teacher_and_a_converted_model_are_exported_too(students, tmp_path):
    student = students["W8A8"]
    teacher = crt.Teacher(student, cr.EMA(0.5))
    x, _ = pictures(100)
    files = []
    for model in (student, crt.convert(student), teacher):
        crt.export_onnx(model, x, tmp_path / "net.onnx")
        files.append((tmp_path / "net.onnx").read_bytes())
    assert files[0] == files[1] == files[2]


def test_exporting_leaves_the_model_as_it_is(tmp_path):
    student = trained(convnet(), recipe(), steps=2).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    crt.export_onnx(student, pictures(60)[0], tmp_path / "net.onnx", minimum_agreement=0)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_older_opset_says_what_it_costs(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    student = trained(net, cr.Recipe(cr.LSQ(4), cr.LSQ(8), first_last_bits=None))
    found = crt.export_onnx(student, pictures(100)[0], tmp_path / "net.onnx", opset=17)
    assert types(tmp_path / "net.onnx") == {TensorProto.INT8}
    assert "opset=21 packs them" in found.notices[0]
    assert "opset 17" in found.table()


def test_metadata_are_stored_in_the_file(students, tmp_path):
    x, _ = pictures(100)
    for export, name in ((crt.export_onnx, "net.onnx"), (crt.export_litert, "net.tflite")):
        export(students["W8A8"], x, tmp_path / name, metadata={"classes": ["a", "b"], "mean": [0.5]})
        assert deploy.open_runtime(tmp_path / name).metadata() == {"classes": ["a", "b"], "mean": [0.5]}


def test_several_inputs_and_inputs_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    student = crt.prepare(Two(), recipe()).train()
    left, right = torch.randn(40, 6), torch.randn(40, 3)
    student(left, right)
    for sample in ((left, right), {"left": left, "right": right}, {"right": right, "left": left}):
        found = crt.export_onnx(student, sample, tmp_path / "net.onnx", integer_only=False)
        assert found.max_code_difference < 0.01


def test_a_file_that_does_not_compute_the_same_is_not_kept(students, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there before")
    noise = torch.randn(2000, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # of no class: small margins
    with pytest.raises(cr.CRCoreError, match=r"agrees with the trained network on the class of .* 100 % are required"):
        crt.export_onnx(students["W4A4"], noise, path, integer_only=True, minimum_agreement=100.0)
    assert path.read_bytes() == b"what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


class _Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(1 + int(x.abs().sum()) % 2):
            x = self.linear(x)
        return x


def bad_inputs():
    student = trained(convnet(), recipe(), steps=1)
    x, y = pictures(8)
    waiting = crt.prepare(convnet(), recipe())
    loops = crt.prepare(_Loops(), recipe()).train()
    loops(torch.randn(4, 6))
    return {
        "never calibrated": (waiting, x, "net.onnx", {}, r"'0.input_quantizer'.*have not seen data yet"),
        "not prepared": (convnet(), x, "net.onnx", {}, "convert takes a model from prepare"),
        "wrong shape": (student, x[:, :2], "net.onnx", {}, "does not take the sample"),
        "no batch": (student, torch.zeros(0, 3, 8, 8), "net.onnx", {}, r"must hold a batch .* got the shape \(0, 3"),
        "an array": (student, x.numpy(), "net.onnx", {}, "not ndarray; torch.as_tensor makes"),
        "no sample": (student, None, "net.onnx", {}, "sample must be a tensor .* not NoneType"),
        "another dtype": (
            student,
            x.double(),
            "net.onnx",
            {},
            r"torch.float64 and the model torch.float32; give sample",
        ),
        "no model": ("net", x, "net.onnx", {}, r"a model from prepare\(...\) is needed, got str"),
        "labels beyond the classes": (student, x, "net.onnx", {"labels": y + 3}, "whole numbers from 0 to 2, got 3 to"),
        "metadata": (student, x, "net.onnx", {"metadata": {"a": object()}}, "metadata must be a dictionary for JSON"),
        "agreement": (student, x, "net.onnx", {"minimum_agreement": 200}, "a number from 0 to 100; got 200"),
        "integer_only": (student, x, "net.onnx", {"integer_only": "no"}, "integer_only must be True, False or None"),
        "labels of another length": (student, x, "net.onnx", {"labels": y[:5]}, r"labels must have the shape \(8,\)"),
        "another suffix": (student, x, "net.pt", {}, "must end in .onnx, got 'net.pt'"),
        "no folder": (student, x, "none/net.onnx", {}, "there is no folder"),
        "opset": (student, x, "net.onnx", {"opset": 9}, "opset must be a whole number from 14 to 25"),
        "NaN": (student, x * np.nan, "net.onnx", {}, "sample holds NaN or infinity"),
        "a loop over data": (loops, torch.randn(4, 6), "net.onnx", {}, "_Loops cannot be traced to ONNX"),
    }


BAD_INPUTS = (
    "never calibrated",
    "not prepared",
    "wrong shape",
    "no batch",
    "an array",
    "no sample",
    "another dtype",
    "no model",
    "labels beyond the classes",
    "metadata",
    "agreement",
    "integer_only",
    "labels of another length",
    "another suffix",
    "no folder",
    "opset",
    "NaN",
    "a loop over data",
)


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named_and_nothing_is_written(case, tmp_path):
    model, sample, name, options, message = bad_inputs()[case]
    with pytest.raises(cr.CRCoreError, match=message):
        crt.export_onnx(model, sample, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 5, b"net.onnx", ["net.onnx"]])
def test_what_is_no_path_is_named(path):
    student, x = trained(convnet(), recipe(), steps=1), pictures(8)[0]
    for use in (
        lambda: crt.export_onnx(student, x, path),
        lambda: crt.export_litert(student, x, path),
        lambda: crt.verify(student, x, path),
        lambda: crt.save_quantized(student, path),
        lambda: crt.load_quantized(convnet(), path),
    ):
        with pytest.raises(cr.CRCoreError, match=r"a path must be a str or a pathlib.Path, got"):
            use()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_of_another_precision_is_exported_in_float32(dtype, tmp_path):
    student, x = trained(convnet(), recipe(), steps=5), pictures(100)[0]
    found = crt.export_onnx(student.to(dtype), x.to(dtype), tmp_path / "net.onnx", minimum_agreement=90)
    assert found.differing_layers == ()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y.sum(), "got one number; a loss"),
        (lambda _: {"logits": None}, "got none"),
        (lambda y: y[:, 0], r"must be \[N, classes\], got the shape \(40,\)"),
    ],
)
def test_an_output_without_classes_is_named(output, message, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return output(self.linear(x))

    student = crt.prepare(Net(), recipe()).train()
    x = torch.randn(40, 6)
    student(x)
    with pytest.raises(cr.CRCoreError, match=message):
        crt.export_onnx(student, x, tmp_path / "net.onnx")


def test_pixels_have_classes_along_the_axis_of_channels(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    student = crt.prepare(net, recipe()).train()
    x, _ = pictures(40)
    student(x)
    labels = student.eval()(x).argmax(dim=1)
    found = crt.export_onnx(student, x, tmp_path / "net.onnx", labels=labels, integer_only=False)
    assert (found.classes, found.expected_accuracy) == (4, 100.0)


def test_files_have_the_mode_that_the_folder_gives_and_links_stay_links(students, tmp_path):
    (tmp_path / "plain").write_text("")
    mode = (tmp_path / "plain").stat().st_mode
    (tmp_path / "link.onnx").symlink_to(tmp_path / "net.onnx")
    crt.export_onnx(students["W8A8"], pictures(40)[0], tmp_path / "link.onnx")
    crt.save_quantized(students["W8A8"], tmp_path / "net.safetensors")
    assert (tmp_path / "link.onnx").is_symlink()
    assert {(tmp_path / name).stat().st_mode for name in ("net.onnx", "net.safetensors")} == {mode}


def test_a_full_disk_leaves_nothing_behind(students, tmp_path):
    x, _ = pictures(40)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # In another process: the limit holds for every file of a process.
    torch.save((students["W8A8"], x), tmp_path / "student.pt")
    program = f"""
        import resource, signal, torch, crcore, crcore_torch as crt
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        student, x = torch.load({str(tmp_path / "student.pt")!r}, weights_only=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {hard}))
        try:
            crt.export_onnx(student, x, {str(tmp_path / "net.onnx")!r})
        except crcore.CRCoreError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert "net.onnx cannot be written" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["student.pt"]


def test_importing_the_backend_needs_no_onnx():
    program = """
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("onnx", "onnxruntime", "onnxscript"):
                    raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        sys.meta_path.insert(0, Refuse())
        import torch, crcore, crcore_torch as crt
        student = crt.prepare(torch.nn.Sequential(torch.nn.Linear(3, 2)), crcore.Recipe(crcore.LSQ(8), crcore.LSQ(8)))
        student(torch.randn(4, 3))
        try:
            crt.export_onnx(student, torch.randn(4, 3), "net.onnx")
        except crcore.CRCoreError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert "pip install 'crcore[onnx]'" in done.stdout, done.stderr


def test_a_multilayer_perceptron_runs_on_integer_products(tmp_path):
    student = crt.prepare(mlp(), recipe(8)).train()
    student(vectors(64)[0])
    found = crt.export_onnx(student, vectors(200, seed=3)[0], tmp_path / "net.onnx", minimum_agreement=0)
    assert found.max_code_difference < 2
