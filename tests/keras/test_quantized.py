"""`save_quantized` and `load_quantized`: small files that compute what was trained, also in the other backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import crcore_keras as crk
import crcore_torch as crt
import keras
import numpy as np
import pytest
import torch
from damaged_files import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers
from safetensors import safe_open
from safetensors.numpy import load_file
from small_networks import (
    MODELS,
    assert_same_bits,
    compiled,
    labels,
    mlp,
    numbers,
    quantized,
    quantizers,
    random,
    recipe,
    snapshot,
    vectors,
)
from twin_networks import PAIRS, RECIPES, TorchNet, channels_first, images, keras_net, predicted, recipe_of

import crcore as cr
from crcore.cli._keras_models import build_model
from crcore.cli._models import MODELS as TORCH_MODELS

WEIGHTS = {
    "LSQ 1 bit": cr.LSQ(1, per_channel=True),
    "LSQ narrow 2 bits": cr.LSQ(2, per_channel=True, narrow=True),
    "LSQ 3 bits": cr.LSQ(3),
    "LSQ unsigned 8 bits": cr.LSQ(8, signed=False),
    "LSQ 16 bits": cr.LSQ(16),
    "DoReFa": cr.DoReFa(3),
    "DoReFa per channel": cr.DoReFa(4, per_channel=True),
    "MinMax": cr.MinMax(4),
    "MinMax affine": cr.MinMax(4, symmetric=False, per_channel=True),
    "none": None,
}
ACTIVATIONS = {
    "LSQ": cr.LSQ(4),
    "LSQPlus": cr.LSQPlus(4),
    "PACT": cr.PACT(4),
    "DoReFa": cr.DoReFa(4),
    "MinMax": cr.MinMax(4),
    "none": None,
}
PAIRS_OF_QUANTIZERS = [(weights, "LSQ") for weights in WEIGHTS] + [("LSQ 3 bits", name) for name in ACTIVATIONS]


def calibrated(net: Any, x: Any, chosen: cr.Recipe | None = None) -> Any:
    student = crk.prepare(net, chosen or recipe())
    student(x, training=True)
    return student


def assert_same_model(mine: Any, theirs: Any) -> None:
    """To the bit, in what they hold and in how they hold it."""
    assert [type(layer) for layer in mine._flatten_layers()] == [type(layer) for layer in theirs._flatten_layers()]
    assert_same_bits(snapshot(mine), snapshot(theirs))
    assert not mine.trainable_variables
    for left, right in zip(quantizers(mine), quantizers(theirs), strict=True):
        assert (left.quantizer, left.frozen, left.where) == (right.quantizer, right.frozen, right.where)
        assert left.initialized
    for left, right in zip(quantized(mine).values(), quantized(theirs).values(), strict=True):
        if left.integer_weight is not None:
            assert left.integer_weight.quantizer == right.integer_weight.quantizer
            assert left.integer_weight.limits == right.integer_weight.limits


@pytest.mark.parametrize(("weights", "activations"), PAIRS_OF_QUANTIZERS)
def test_what_is_loaded_is_what_convert_makes_to_the_bit(weights, activations, tmp_path):
    def net() -> Any:
        hidden = [
            layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"),
            layers.DepthwiseConv2D(2, name="deep"),
        ]
        return keras.Sequential([keras.Input((8, 8, 3)), *hidden, layers.Flatten(), layers.Dense(3, name="head")])

    chosen = cr.Recipe(WEIGHTS[weights], ACTIVATIONS[activations], first_last_bits=None)
    student = calibrated(net(), random(4, 8, 8, 3), chosen)
    crk.save_quantized(student, tmp_path / "file")
    converted = crk.convert(student)
    loaded = crk.load_quantized(net(), tmp_path / "file")
    assert_same_model(loaded, converted)
    x = 3 * random(8, 8, 8, 3, seed=9)
    np.testing.assert_array_equal(numbers(loaded(x)), numbers(converted(x)))
    for number, model in enumerate((converted, loaded)):
        crk.save_quantized(model, tmp_path / f"again{number}")
        assert (tmp_path / f"again{number}").read_bytes() == (tmp_path / "file").read_bytes()
    if WEIGHTS[weights] is not None:
        packed = sum(math.ceil(n * WEIGHTS[weights].bits / 8) for n in (3 * 3 * 3 * 4, 2 * 2 * 4, 2 * 2 * 4 * 3))
        assert load_file(tmp_path / "file")["codes"].nbytes == packed


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_loaded_to_the_bit_and_the_one_given_stays_as_it_is(name, tmp_path):
    make, batch = MODELS[name]
    student = calibrated(make(), batch())
    crk.save_quantized(student, tmp_path / "file")
    net = make()
    before, kinds = snapshot(net), [type(layer) for layer in net._flatten_layers()]
    loaded = crk.load_quantized(net, tmp_path / "file")
    assert_same_bits(before, snapshot(net))
    assert [type(layer) for layer in net._flatten_layers()] == kinds
    assert_same_model(loaded, crk.convert(student))
    x = batch(8, seed=5)
    np.testing.assert_array_equal(predicted(loaded, x), predicted(student, x))

    loaded.save(tmp_path / "loaded.keras")
    again = keras.saving.load_model(tmp_path / "loaded.keras")
    assert_same_model(again, loaded)
    np.testing.assert_array_equal(predicted(again, x), predicted(student, x))


def test_a_consistency_model_saves_its_average(tmp_path):
    chosen = recipe(consistency=cr.Consistency(), ema=cr.EMA(0.5))
    model = crk.ConsistencyModel(crk.prepare(mlp(), chosen), chosen, augment=layers.GaussianNoise(0.1))
    compiled(model).fit(vectors(8), labels(8), batch_size=4, verbose=0)
    crk.save_quantized(model, tmp_path / "average")
    crk.save_quantized(model.student, tmp_path / "student")
    x = vectors(8, seed=3)
    average, student = (crk.load_quantized(mlp(), tmp_path / name) for name in ("average", "student"))
    np.testing.assert_array_equal(numbers(average(x)), numbers(model.teacher(x)))
    np.testing.assert_array_equal(numbers(student(x)), numbers(model.student(x)))


# float64 is an option of JAX that has to be set before it starts.
POLICIES = ["bfloat16", "mixed_bfloat16", *([] if keras.backend.backend() == "jax" else ["float64"])]


@pytest.mark.parametrize("policy", POLICIES)
def test_models_of_other_precisions_are_loaded_to_the_bit(policy, tmp_path):
    def net(policy: str) -> Any:
        hidden = layers.Dense(8, "relu", name="hidden", dtype=policy)
        return keras.Sequential([keras.Input((6,)), hidden, layers.Dense(3, name="last", dtype=policy)])

    student = calibrated(net(policy), vectors())
    crk.save_quantized(student, tmp_path / "file")
    loaded = crk.load_quantized(net(policy), tmp_path / "file")
    assert_same_model(loaded, crk.convert(student))
    np.testing.assert_array_equal(numbers(loaded(vectors(seed=4))), numbers(student(vectors(seed=4))))
    if not policy.startswith("mixed"):
        with pytest.raises(cr.CRCoreError, match=f"(?s)'hidden'.*{policy}.* in the file"):
            crk.load_quantized(net("float32"), tmp_path / "file")


@keras.saving.register_keras_serializable("quantized files")
class Table(layers.Layer):
    """A table and a matrix of its own, with a quantizer for it."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=(1, *shape[1:]), name="table", initializer="normal")
        self.matrix = self.add_weight(shape=(shape[-1], 4), name="matrix", initializer="normal")
        self.choice = self.add_weight(shape=(4,), name="choice", initializer="zeros", dtype="int32", trainable=False)
        self.fake_quantize = crk.FakeQuantize(
            cr.LSQ(4, per_channel=True), role="weight", shape=(1, 4), name="of_matrix"
        )

    def call(self, x: Any) -> Any:
        mixed = keras.ops.matmul(x + self.table, self.fake_quantize(keras.ops.copy(self.matrix)))
        return keras.ops.take(mixed, keras.ops.copy(self.choice), axis=-1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], 4)


def left_in_float(choice: tuple[int, ...] = (0, 0, 0, 0)) -> Any:
    net = keras.Sequential([
        keras.Input((5, 6)), layers.Normalization(name="scaled"), layers.Dense(6, name="first"),
        Table(name="table"), layers.LSTM(4, return_sequences=True, name="rnn"),
        layers.EinsumDense("abc,bcd->abd", (5, 4), bias_axes="d", name="batched"), layers.Flatten(),
        layers.Dense(3, name="last"),
    ])  # fmt: skip
    table = net.get_layer("table")
    table.choice.assign(np.array(choice))
    table.fake_quantize.initialize(table.matrix)
    return net


def test_layers_that_no_other_backend_knows_load_to_the_bit_and_only_here(tmp_path):
    net = left_in_float((3, 0, 0, 2))
    x = random(4, 5, 6)
    net.get_layer("scaled").adapt(3.0 * x + 1.0)
    student = crk.prepare(net, cr.Recipe(cr.LSQ(4, per_channel=True), cr.LSQ(4), skip=("table", "rnn")))
    student(x, training=True)
    crk.save_quantized(student, tmp_path / "file")
    loaded = crk.load_quantized(left_in_float(), tmp_path / "file")
    assert_same_model(loaded, crk.convert(student))
    np.testing.assert_array_equal(numbers(loaded(x)), numbers(student(x)))

    alone = keras.Sequential([keras.Input((5, 6)), layers.EinsumDense("abc,bcd->abd", (5, 4), name="0")])
    crk.save_quantized(calibrated(alone, x), tmp_path / "alone")
    with pytest.raises(cr.CRCoreError, match="'0': its arrays in the file have the axis order of crcore_keras"):
        crt.load_quantized(torch.nn.Sequential(torch.nn.Linear(6, 4)), tmp_path / "alone")


# From one backend to the other


def torch_student(net: torch.nn.Module, x: Any, chosen: cr.Recipe) -> Any:
    """Calibrated, and its floats not their defaults."""
    student = crt.prepare(net, chosen)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape)).add_(0.01)
        student(x)
    return student.eval()


def assert_close(mine: Any, expected: Any) -> None:
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assert_same_codes(mine: Path, theirs: Path) -> None:
    """Read without a framework."""
    left, right = (cr.QuantizedCheckpoint(path).read(safe_open) for path in (mine, theirs))
    assert left.keys() == right.keys()
    assert any("weight_quantizer" in layer.quantizers for layer in left.values())
    for name, layer in left.items():
        for entry in ("weight", "weight_quantizer.scale", "weight_quantizer.zero_point"):
            np.testing.assert_array_equal(layer.arrays.get(entry), right[name].arrays.get(entry))


@pytest.mark.parametrize("chosen", [*RECIPES])
def test_torch_saves_and_keras_loads(chosen, tmp_path):
    x = images(4)[0]
    student = torch_student(TorchNet(), channels_first(x), recipe_of(chosen))
    crt.save_quantized(student, tmp_path / "torch")
    loaded = crk.load_quantized(keras_net(), tmp_path / "torch")
    with torch.no_grad():
        assert_close(predicted(loaded, x), student(channels_first(x)).numpy())
    crk.save_quantized(loaded, tmp_path / "keras")
    assert_same_codes(tmp_path / "keras", tmp_path / "torch")
    assert (tmp_path / "keras").read_bytes() == (tmp_path / "torch").read_bytes()


def test_keras_saves_and_torch_loads(tmp_path):
    x = images(4)[0]
    student = calibrated(keras_net(), x, recipe_of("all of them"))
    crk.save_quantized(student, tmp_path / "keras")
    loaded = crt.load_quantized(TorchNet(), tmp_path / "keras")
    assert_close(loaded(channels_first(x)).numpy(), predicted(student, x))
    crt.save_quantized(loaded, tmp_path / "torch")
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "keras").read_bytes()


@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_of_layer_goes_both_ways(pair, tmp_path):
    make_torch, make_keras, shape, names = PAIRS[pair]
    numbers_of = np.random.default_rng(0)
    x = numbers_of.integers(0, 9, (3, 7)) if shape is None else numbers_of.normal(size=(3, *shape)).astype("float32")
    for_torch = torch.from_numpy(x if shape is None or pair == "1d" else np.moveaxis(x, -1, 1).copy())
    student = torch_student(make_torch(), for_torch, cr.Recipe(cr.LSQ(6, per_channel=True), cr.LSQPlus(6)))
    crt.save_quantized(student, tmp_path / "torch")
    mine = crk.load_quantized(make_keras(), tmp_path / "torch", names=names)
    with torch.no_grad():
        assert_close(predicted(mine, x), student(for_torch).numpy())
    crk.save_quantized(mine, tmp_path / "keras", names=names)
    assert (tmp_path / "keras").read_bytes() == (tmp_path / "torch").read_bytes()
    loaded = crt.load_quantized(make_torch(), tmp_path / "keras")
    with torch.no_grad():
        assert torch.equal(loaded(for_torch), student(for_torch))


# A network of this size is minutes of compiling on JAX.
REAL = ["resnet20"] if keras.backend.backend() == "jax" else ["resnet20", "mobilenetv2"]


@pytest.mark.parametrize("name", REAL)
def test_a_file_of_a_real_network_is_as_large_as_its_parts_and_goes_to_the_other_backend(name, tmp_path):
    chosen = cr.Recipe(cr.LSQ(4, per_channel=True), cr.LSQ(8))
    x = random(2, 16, 16, 3)
    theirs = TORCH_MODELS[name](num_classes=10, in_channels=3)
    student = torch_student(theirs, channels_first(x), chosen)
    crt.save_quantized(student, tmp_path / "torch")
    named = {layer.replace(".", "_"): layer for layer, _ in theirs.named_modules()}
    net = build_model(name, num_classes=10, in_channels=3, size=(16, 16))
    names = {layer.name: named[layer.name] for layer in net.layers if layer.weights}
    loaded = crk.load_quantized(net, tmp_path / "torch", names=names)
    with torch.no_grad():
        # An activation on an edge between two codes may fall on the other side.
        expected = student(channels_first(x)).numpy()
        np.testing.assert_allclose(predicted(loaded, x), expected, rtol=0, atol=0.05 * np.abs(expected).max())
    crk.save_quantized(loaded, tmp_path / "keras", names=names)
    assert (tmp_path / "keras").read_bytes() == (tmp_path / "torch").read_bytes()

    parts = sum(4 * layer.count_params() for layer in net.layers if isinstance(layer, layers.BatchNormalization))
    for layer in quantized(loaded).values():
        weight = layer.integer_weight
        parts += math.ceil(math.prod(weight.codes.shape) * weight.bits / 8) + 4 * math.prod(weight.scale.shape) + 4
        parts += 4 * math.prod(layer.bias.shape) if layer.use_bias else 0
    assert parts < (tmp_path / "keras").stat().st_size < 1.02 * parts


# Bad input


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    crk.save_quantized(calibrated(mlp(), vectors()), path)
    return path


def refused(path: Path, text: str, net: Any = None) -> None:
    """Loading says so, and changes nothing."""
    net = mlp() if net is None else net
    before = snapshot(net)
    with pytest.raises(cr.CRCoreError, match=text):
        crk.load_quantized(net, path)
    assert_same_bits(before, snapshot(net))


def another(name: str, width: int) -> Any:
    hidden = [layers.Dense(8, name="first"), layers.Dense(width, name=name)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3, name="last")])


def test_files_that_do_not_fit_are_refused(path, tmp_path):
    refused(tmp_path / "no", "no such file")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-1])
    refused(tmp_path / "short", "cut short")
    refused(path, r"'middle': bias is float32 \[8\] in the file, .*\[9\]", another("middle", 9))
    refused(path, r"(?s)network: 'other'.*file: 'middle'", another("other", 8))
    crk.save_portable(crk.prepare(mlp(), recipe()), tmp_path / "portable")
    refused(tmp_path / "portable", "of kind 'portable', no quantized one")
    table = keras.Sequential([keras.Input((5, 6)), Table(name="first")])
    with pytest.raises(cr.CRCoreError, match="different layers"):
        crk.load_quantized(table, path)


def test_models_that_are_not_the_float_one_are_refused(path):
    student = calibrated(mlp(), vectors())
    refused(path, "'first' is prepared or converted already; load_quantized takes the float model", student)
    refused(path, "'first' is prepared or converted already", crk.convert(student))
    model = crk.ConsistencyModel(student, recipe(consistency=cr.Consistency()), augment=layers.GaussianNoise(0.1))
    with pytest.raises(cr.CRCoreError, match="takes the float"):
        crk.load_quantized(model, path)
    for other in ("a model", keras.Sequential([layers.Dense(3)])):
        with pytest.raises(cr.CRCoreError, match=r"takes the float network as a built keras\.Model"):
            crk.load_quantized(other, path)


def test_models_that_cannot_be_saved_are_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(cr.CRCoreError, match="has no quantized layer"):
        crk.save_quantized(mlp(), path)
    with pytest.raises(cr.CRCoreError, match="str has no quantized layer"):
        crk.save_quantized("a model", path)
    with pytest.raises(cr.CRCoreError, match="have not seen data yet"):
        crk.save_quantized(crk.prepare(mlp(), recipe()), path)
    assert not [*tmp_path.iterdir()]


FULL_DISK = """
import resource, sys, crcore, crcore_keras as crk, keras
net = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
student = crk.prepare(net, crcore.Recipe(crcore.LSQ(4), None))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    crk.save_quantized(student, sys.argv[1])
except crcore.CRCoreError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{path} cannot be written" in done.stdout
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"before")]


FUZZ = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
def test_a_file_with_any_other_bytes_is_loaded_or_refused(path, tmp_path, data):
    bad = data.draw(damaged(path, tmp_path / "bad"))
    try:
        loaded = crk.load_quantized(mlp(), bad)
    except cr.CRCoreError:
        return
    assert loaded(vectors()).shape == (4, 3)
