"""`save_quantized` and `load_quantized`: small files that compute, bit for bit, what was trained."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import crcore_torch as crt
import pytest
import torch
from damaged_files import damaged, rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from small_nets import (
    ACTIVATIONS,
    PAIRS,
    WEIGHTS,
    assert_same_bits,
    compiles,
    convnet,
    images,
    mlp,
    recipe,
    snapshot,
    trained,
    vectors,
)
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import crcore as cr
from crcore.cli._models import MODELS


def calibrated(net: nn.Module, x: Any, chosen: cr.Recipe | None = None) -> nn.Module:
    student = crt.prepare(net, chosen or recipe())
    student(x)
    return student.eval()


def without_counters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in snapshot(model).items() if not name.endswith("num_batches_tracked")}


def assert_same_model(mine: nn.Module, theirs: nn.Module) -> None:
    """To the bit, in what they hold and in how they hold it."""
    kinds = [{name: type(module).__name__ for name, module in model.named_modules()} for model in (mine, theirs)]
    assert kinds[0] == kinds[1]
    assert_same_bits(without_counters(mine), without_counters(theirs))
    assert not any(parameter.requires_grad for parameter in mine.parameters())
    assert not any(module.training for module in mine.modules())
    for left, right in zip(mine.modules(), theirs.modules(), strict=True):
        if isinstance(left, crt.IntegerWeight):
            assert (left.quantizer, left.limits, left.dtype) == (right.quantizer, right.limits, right.dtype)
        if isinstance(left, crt.FakeQuantize):
            assert left.quantizer == right.quantizer
            assert (left._initialized, left._frozen, left.name) == (right._initialized, right._frozen, right.name)


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_what_is_loaded_is_what_convert_makes_to_the_bit(weights, activations, tmp_path):
    chosen = cr.Recipe(WEIGHTS[weights], ACTIVATIONS[activations], first_last_bits=None)
    student, teacher = trained(chosen)
    student.eval()
    x = 3 * images(16, seed=9)[0]
    for number, model in enumerate((student, teacher, crt.convert(student))):
        crt.save_quantized(model, tmp_path / "file")
        net = convnet()
        before = snapshot(net)
        loaded = crt.load_quantized(net, tmp_path / "file")
        assert_same_bits(before, snapshot(net))
        assert type(net[0]) is nn.Conv2d
        assert_same_model(loaded, crt.convert(model) if number < 2 else model)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
        crt.save_quantized(loaded, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    if WEIGHTS[weights] is not None:
        elements = [m._parameters["weight"].numel() for m in student.modules() if hasattr(m, "weight_quantizer")]
        packed = sum(math.ceil(n * WEIGHTS[weights].bits / 8) for n in elements)
        assert load_file(tmp_path / "file")["codes"].nbytes == packed


# Real networks


def parts_of(student: nn.Module) -> int:
    """The bytes of integers, scales, zero points, input quantizers and floats, each tensor once."""
    found: dict[int, float] = {}
    for module in student.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, crt.FakeQuantize):
            weight = module._parameters["weight"]
            found[id(weight)] = math.ceil(weight.numel() * quantizer.quantizer.bits / 8)
            found[id(quantizer)] = 4 * quantizer.scale.numel()
    weights = [m.weight_quantizer for m in student.modules() if hasattr(m, "weight_quantizer")]
    attached = {id(p) for quantizer in weights for p in quantizer.parameters()}
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        if id(tensor) not in attached and tensor.is_floating_point():
            found.setdefault(id(tensor), 4 * tensor.numel())
        assert not name.endswith("zero_point")
    return int(sum(found.values()))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenetv2"])
def test_a_file_is_as_large_as_its_parts(name, bits, tmp_path):
    def net() -> nn.Module:
        return MODELS[name](num_classes=10, in_channels=3)

    x = torch.randn(2, 3, 16, 16)
    student = calibrated(net(), x, cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(8)))
    crt.save_quantized(student, tmp_path / "file")
    size, parts = (tmp_path / "file").stat().st_size, parts_of(student)
    assert parts < size < 1.02 * parts
    if name == "resnet18":
        assert size < (0.07 if bits == 2 else 0.14) * sum(4 * p.numel() for p in net().parameters())
    loaded = crt.load_quantized(net(), tmp_path / "file")
    assert torch.equal(loaded(x), student(x))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8))


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=60, max_position_embeddings=16))


TRANSFORMERS = {
    "ViT": (vit, {"pixel_values": torch.randn(2, 3, 32, 32)}, "vit.embeddings.*"),
    "BERT": (bert, {"input_ids": torch.arange(14).reshape(2, 7)}, ()),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_load_to_the_bit(name, tmp_path):
    make, batch, skip = TRANSFORMERS[name]
    student = crt.prepare(make(), recipe(skip=skip))
    student(**batch)
    with torch.no_grad():  # tables of zeros and biases of zeros would hide that they were not loaded
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.rand(parameter.shape))
    student.eval()
    crt.save_quantized(student, tmp_path / "file")
    loaded = crt.load_quantized(make(), tmp_path / "file")
    assert_same_model(loaded, crt.convert(student))
    assert torch.equal(loaded(**batch).logits, student(**batch).logits)


# Layers of every kind


class Everything(nn.Module):
    """Layers left in float, tables, a permutation, a matrix of the user's own with a quantizer for it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.table = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
        self.conv = nn.ConvTranspose1d(16, 8, 2, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.slope = nn.PReLU(8)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.quantize = crt.FakeQuantize(cr.MinMax(4, per_channel=True), role="weight", shape=(8, 1), dtype=dtype)
        self.see = crt.FakeQuantize(cr.LSQ(8))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("mask", torch.rand(8) > 0.3)
        self.register_buffer("here only", torch.ones(3), persistent=False)
        self.out = nn.Linear(4, 3)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.table
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.encoder(self.rnn(x)[0])
        x = self.slope(self.norm(self.conv(x.mT))).mean(-1)[:, self.order] * self.mask
        return self.out(self.head(self.see(x) @ self.quantize(self.matrix)))


LEFT = ("table", "attention", "rnn", "matrix", "head", "encoder.self_attn")
TOKENS = torch.arange(10).reshape(2, 5)


def everything(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = Everything(dtype)
    net.quantize.initialize(net.matrix.float() if dtype.itemsize == 2 else net.matrix)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_that_no_other_backend_knows_load_to_the_bit(dtype, tmp_path):
    student = calibrated(everything(dtype), TOKENS, recipe(skip=LEFT))
    student.norm.running_mean.add_(0.3)
    crt.save_quantized(student, tmp_path / "file")
    torch.manual_seed(7)  # another permutation, mask and table, and quantizers that have not seen data
    loaded = crt.load_quantized(Everything(dtype), tmp_path / "file")
    assert_same_model(loaded, crt.convert(student))
    assert torch.equal(loaded(TOKENS), student(TOKENS))
    assert loaded(TOKENS).dtype == dtype
    if dtype == torch.bfloat16:
        with pytest.raises(cr.CRCoreError, match=r"dtype is 'bfloat16' in the file, None in the network"):
            crt.load_quantized(Everything(), tmp_path / "file")
    if dtype == torch.float64:
        with pytest.raises(cr.CRCoreError, match=r"is float64 .* in the file, float32"):
            crt.load_quantized(Everything(), tmp_path / "file")


def test_what_is_shared_stays_shared_and_is_stored_once(tmp_path):
    def net(tied: bool = True) -> nn.Module:
        net = nn.ModuleDict({"embed": nn.Embedding(40, 8), "between": nn.Linear(8, 8), "head": nn.Linear(8, 40)})
        net["free"], net["bound"] = nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            net["head"].weight = net["embed"].weight
            net["bound"].weight = net["free"].weight
        return net

    chosen = cr.Recipe(cr.LSQ(4, per_channel=True), None, skip=("free", "bound"), first_last_bits=None)
    crt.save_quantized(crt.prepare(net(), chosen), tmp_path / "tied")
    assert load_file(tmp_path / "tied")["codes"].nbytes == (40 * 8 + 8 * 8) // 2
    loaded = crt.load_quantized(net(), tmp_path / "tied")
    assert loaded["embed"].integer_weight is loaded["head"].integer_weight
    assert loaded["free"].weight is loaded["bound"].weight

    apart = crt.load_quantized(net(tied=False), tmp_path / "tied")  # which computes the same
    assert torch.equal(apart["bound"].weight, loaded["bound"].weight)
    assert torch.equal(apart["head"].weight, loaded["head"].weight)
    crt.save_quantized(crt.prepare(net(tied=False), cr.Recipe(cr.LSQ(4), None, skip=("free", "bound"))), tmp_path / "a")
    with pytest.raises(cr.CRCoreError, match=r"'free.weight' and 'bound.weight' are one tensor in this model"):
        crt.load_quantized(net(), tmp_path / "a")


def test_a_module_in_two_places_and_other_names(tmp_path):
    shared = nn.Linear(4, 4)
    student = calibrated(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(5, 4))
    crt.save_quantized(student, tmp_path / "file", names={"0": "both"})
    other = nn.Linear(4, 4)
    with pytest.raises(cr.CRCoreError, match=r"(?s)network: '0'.*file: 'both'.*names="):
        crt.load_quantized(nn.Sequential(other, nn.ReLU(), other), tmp_path / "file")
    loaded = crt.load_quantized(nn.Sequential(other, nn.ReLU(), other), tmp_path / "file", names={"0": "both"})
    assert loaded[0] is loaded[2]
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), student(x))


def test_a_single_layer_is_a_network_too(tmp_path):
    student = calibrated(nn.Linear(4, 3), torch.randn(5, 4))
    crt.save_quantized(student, tmp_path / "file")
    x = torch.randn(5, 4)
    assert torch.equal(crt.load_quantized(nn.Linear(4, 3), tmp_path / "file")(x), student(x))


def test_the_memory_order_is_that_of_the_model_given(tmp_path):
    student = calibrated(convnet().to(memory_format=torch.channels_last), images()[0])
    crt.save_quantized(student, tmp_path / "file")
    loaded = crt.load_quantized(convnet().to(memory_format=torch.channels_last), tmp_path / "file")
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded(images(seed=1)[0]), student(images(seed=1)[0]))


@compiles
def test_a_wrapped_model_is_what_is_inside(tmp_path):
    student, _ = trained(recipe())
    crt.save_quantized(torch.compile(student, backend="eager"), tmp_path / "file")
    loaded = crt.load_quantized(torch.compile(convnet(), backend="eager"), tmp_path / "file")
    assert_same_model(loaded, crt.convert(student))


def test_a_fresh_process_needs_the_architecture_alone(tmp_path):
    student = calibrated(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), vectors()[0])
    crt.save_quantized(student, tmp_path / "file")
    torch.save((vectors(seed=3)[0], student(vectors(seed=3)[0]).detach()), tmp_path / "expected")
    script = (
        "import torch, crcore_torch as crt\nfrom torch import nn\n"
        "net = crt.load_quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 'file')\n"
        "x, expected = torch.load('expected')\nassert torch.equal(net(x), expected)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Bad input


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    torch.manual_seed(0)
    crt.save_quantized(calibrated(mlp(), vectors()[0]), path)
    return path


def refused(path: Path, text: str, net: Any = None, **options: Any) -> None:
    """Loading says so, and changes nothing."""
    net = mlp() if net is None else net
    before = snapshot(net)
    with pytest.raises(cr.CRCoreError, match=text):
        crt.load_quantized(net, path, **options)
    assert_same_bits(before, snapshot(net))


def test_files_that_do_not_fit_are_refused(path, tmp_path):
    refused(tmp_path / "no", "no such file")
    refused(path, r"layer '0': weight is int8 \[8, 6\] in the file, int8 \[8, 7\] in the network", mlp((7, 8, 8, 3)))
    refused(path, r"layer '2': weight is int8 \[8, 8\]", mlp((6, 8, 9, 3)))
    refused(path, r"(?s)different layers.*only in the file: '4'", mlp((6, 8, 8)))
    refused(path, "kind is 'linear' in the file", nn.Sequential(*mlp()[:4], nn.Embedding(3, 8)))
    refused(path, r"bias is float32 \[3\] in the file, missing", nn.Sequential(*mlp()[:4], nn.Linear(8, 3, bias=False)))
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    refused(path, r"(?s)only in the network: '4\.parametrizations\.weight'", nn.Sequential(*mlp()[:4], computed))
    refused(path, "names has 'x'", names={"x": "y"})
    crt.save_portable(crt.prepare(mlp(), recipe()), tmp_path / "portable")
    refused(tmp_path / "portable", "of kind 'portable', no quantized one")
    with pytest.raises(cr.CRCoreError, match="of kind 'quantized', no portable one"):
        crt.load_portable(crt.prepare(mlp(), recipe()), path)

    def foreign(tensors: Any, file: Any) -> None:
        file["layers"]["2"]["settings"]["axes"] = "crcore_keras"

    refused(rewritten(path, tmp_path / "foreign", foreign), "the axis order of crcore_keras, which alone knows it")


def test_an_embedding_has_no_quantized_input(tmp_path):
    crt.save_quantized(crt.prepare(nn.Embedding(5, 4), cr.Recipe(cr.LSQ(4), None)), tmp_path / "file")

    def hostile(tensors: Any, file: Any) -> None:
        file["quantizers"].append(cr.Recipe(None, cr.DoReFa(4, signed=False)).to_dict())
        file["layers"][""]["quantizers"]["input_quantizer"] = 1

    bad = rewritten(tmp_path / "file", tmp_path / "bad", hostile)
    refused(bad, r"the file quantizes it \(.*\), which crcore cannot", nn.Embedding(5, 4))


def test_a_quantizer_of_the_users_own_must_be_the_files(tmp_path):
    def net(bits: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), crt.FakeQuantize(cr.LSQ(bits)))

    crt.save_quantized(calibrated(net(4), vectors()[0]), tmp_path / "file")
    refused(tmp_path / "file", r"'1': input_quantizer is LSQ\(bits=4.* in the file, LSQ\(bits=5", net(5))


def test_models_that_are_not_the_float_one_are_refused(path):
    student = calibrated(mlp(), vectors()[0])
    refused(path, "'0' is prepared or converted already; load_quantized takes the float model", student)
    refused(path, "'0' is prepared or converted already", crt.convert(student))
    others = [
        (crt.Teacher(student), r"takes the float network as a torch\.nn\.Module, got Teacher"),
        ("a model", r"takes the float network as a torch\.nn\.Module, got str"),
        (nn.Linear(4, 3, device="meta"), "no values yet"),
        (nn.Sequential(nn.LazyLinear(4)), "no values yet"),
    ]
    for other, text in others:
        with pytest.raises(cr.CRCoreError, match=text):
            crt.load_quantized(other, path)


def test_models_that_cannot_be_saved_are_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(cr.CRCoreError, match="Sequential has no quantized layer"):
        crt.save_quantized(mlp(), path)
    with pytest.raises(cr.CRCoreError, match=r"takes a model from prepare.* got str"):
        crt.save_quantized("a model", path)
    with pytest.raises(cr.CRCoreError, match="have not seen data yet"):
        crt.save_quantized(crt.prepare(mlp(), recipe()), path)
    student = calibrated(mlp(), vectors()[0])
    with pytest.raises(cr.CRCoreError, match="float teacher"):
        crt.save_quantized(crt.Teacher(student, cr.EMA(quantized=False)), path)
    with pytest.raises(cr.CRCoreError, match=r"was cast to torch.float16 after convert; cast first"):
        crt.save_quantized(crt.convert(student).half(), path)
    student[0].register_buffer("phase", torch.ones(3, dtype=torch.complex64))
    with pytest.raises(cr.CRCoreError, match=r"layer '0' has phase of type torch\.complex64"):
        crt.save_quantized(student, path)
    assert not [*tmp_path.iterdir()]


FULL_DISK = """
import resource, sys, torch, crcore, crcore_torch as crt
student = crt.prepare(torch.nn.Linear(64, 64), crcore.Recipe(crcore.LSQ(4), None))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    crt.save_quantized(student, sys.argv[1])
except crcore.CRCoreError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{path} cannot be written" in done.stdout
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"before")]
    with pytest.raises(cr.CRCoreError, match="cannot be written"):
        crt.save_quantized(calibrated(mlp(), vectors()[0]), tmp_path / "no" / "folder")


FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
def test_a_file_with_any_other_bytes_is_loaded_or_refused(path, tmp_path, data):
    bad = data.draw(damaged(path, tmp_path / "bad"))
    try:
        loaded = crt.load_quantized(mlp(), bad)
    except cr.CRCoreError:
        return
    assert loaded(vectors()[0]).shape == (5, 3)


def test_nothing_in_a_file_is_executed(path, tmp_path):
    def hostile(tensors: Any, file: Any) -> None:
        file["quantizers"][0]["weights"] = {"type": "os.system", "command": f"touch {tmp_path / 'executed'}"}

    refused(rewritten(path, tmp_path / "bad", hostile), "can name")
    assert os.listdir(tmp_path) == ["bad"]
