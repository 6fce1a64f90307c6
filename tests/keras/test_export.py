"""`export_onnx`, `export_litert`, `verify`: networks of Keras as graphs, and in the runtimes themselves."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import crcore_keras as crk
import crcore_torch as crt
import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from crcore_keras._graph import marker_graph
from keras import applications, layers, ops
from onnx import numpy_helper
from small_networks import (
    convnet,
    images,
    labels,
    mlp,
    numbers,
    quantized,
    quantizers,
    random,
    recipe,
    subclassed,
    tokens,
    trained,
    vectors,
)
from torch import nn

import crcore as cr
from crcore import deploy
from crcore.cli._keras_models import build_model

EIGHT = cr.Recipe(cr.LSQ(8, per_channel=True), cr.LSQ(8))
WEIGHTS_ONLY = cr.Recipe(cr.LSQ(8, per_channel=True), None)
# Compiling a network of this size takes half a minute on JAX.
LARGE = ["MobileNetV2"] if keras.backend.backend() == "jax" else ["mobilenetv2", "MobileNetV2", "EfficientNetB0"]


def vision() -> Any:
    """Images [N, 12, 12, 3] of bytes to probabilities: most layers that a network of images is made of."""
    inputs = keras.Input((12, 12, 3), name="pixels")
    x = layers.RandomFlip(name="flip")(layers.Rescaling(1 / 127.5, offset=-1.0)(inputs))
    x = layers.Normalization(mean=[0.1, 0.0, -0.1], variance=[0.5, 1.0, 0.3])(x)
    x = layers.ZeroPadding2D(((0, 1), (2, 1)))(x)  # 13 x 15
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu6")(x)  # 7 x 8
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(8, 3, dilation_rate=2, padding="same", groups=2, activation="silu")(x)
    x = layers.SpatialDropout2D(0.5)(x)
    wide = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, padding="same")(x)  # 4 x 4
    pooled = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    mean = layers.AveragePooling2D(2, padding="same")(x)
    x = layers.PReLU(shared_axes=[1, 2], alpha_initializer="random_uniform")(layers.Concatenate()([wide, pooled, mean]))
    squeezed = layers.Reshape((1, 1, 32))(layers.GlobalAveragePooling2D()(x))
    excited = layers.Conv2D(32, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="hard_swish")(squeezed))
    x = layers.BatchNormalization(center=False, scale=False)(layers.Multiply()([x, excited]))
    x = layers.SeparableConv2D(6, 3, strides=2, depth_multiplier=2, padding="same")(x)  # 2 x 2
    x = layers.Conv2DTranspose(6, 3, strides=2, padding="same", activation="leaky_relu")(x)  # 4 x 4
    x = cropped = layers.Cropping2D(((0, 1), (1, 0)))(layers.Conv2DTranspose(4, 2, strides=3)(x))  # 11 x 11
    x = layers.LayerNormalization()(layers.UpSampling2D((2, 1))(x))  # 22 x 11
    x = layers.Add()([layers.Permute((2, 1, 3))(x), layers.Dense(4)(layers.Reshape((11, 22, 4))(x))])
    x = layers.Concatenate()([layers.Flatten()(cropped), layers.Flatten()(x), layers.GlobalMaxPooling2D()(x)])
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Dropout(0.5)(x)), name="vision")


def sequence() -> Any:
    """Tokens [N, 5] of 11 kinds to three classes."""
    x = layers.Embedding(11, 8)(inputs := keras.Input((5,), dtype="int32", name="tokens"))
    x = layers.BatchNormalization()(layers.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="tanh")(x))
    x = layers.LayerNormalization(center=False)(layers.Add()([x, layers.Dense(8, "gelu")(x)]))
    x = layers.EinsumDense("abc,cd->abd", (5, 6), bias_axes="d", activation="elu")(x)
    x = layers.MaxPooling1D(2, padding="same")(layers.SeparableConv1D(6, 2)(x))
    pooled = [layers.GlobalAveragePooling1D()(x), layers.GlobalMaxPooling1D(keepdims=True)(x)]
    x = layers.Subtract()([pooled[0], layers.Flatten()(pooled[1])])
    return keras.Model(inputs, layers.Dense(3)(x), name="sequence")


def activations() -> Any:
    """Vectors [N, 6] to the results of every activation, as layers, by name and as functions."""
    x = layers.Dense(6)(inputs := keras.Input((6,)))
    names = ["elu", "gelu", "hard_sigmoid", "hard_silu", "leaky_relu", "linear", "relu", "relu6", "selu", "sigmoid"]
    names += ["silu", "softmax", "softplus", "softsign", "tanh"]
    found = [layers.Activation(name)(x) for name in names]
    kinds = [layers.ReLU(0.5), layers.ReLU(negative_slope=0.3), layers.LeakyReLU(0.1), layers.ELU(0.7), layers.PReLU()]
    found += [each(x) for each in [*kinds, layers.Softmax(), layers.Activation(layers.ReLU(1.0))]]
    found += [ops.relu(x), ops.gelu(x), ops.gelu(x, False), ops.leaky_relu(x, 0.4), ops.hard_silu(x), ops.softmax(x)]
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(found)), name="activations")


def functions() -> Any:
    """Images [N, 8, 8, 3] through functions on tensors and constants, on either side."""
    x = layers.Conv2D(4, 3)(inputs := keras.Input((8, 8, 3)))
    y = layers.Maximum()([x * np.array([1.0, -2.0, 0.5, 3.0], "float32"), layers.Minimum()([x, 0.5 - x])])
    z = ops.maximum(layers.Average()([x, y, x + y]), 0.1) / 3.0
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(z - y)), name="functions")


def pixels(n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 12, 12, 3)).astype("float32")


NETWORKS: dict[str, Any] = {
    "vision": (vision, pixels),
    "sequence": (sequence, tokens),
    "activations": (activations, vectors),
    "functions": (functions, images),
    "nested": (convnet, images),
}


def settled(model: Any, x: np.ndarray) -> Any:
    """A calibrated model whose normalizations have factors, and the statistics of ``x``, which nothing drops out of."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
            for variable in [*layer.trainable_variables]:
                variable.assign(rng.uniform(0.5, 1.5, variable.shape) * rng.choice([-1, 1], variable.shape))
    model(x, training=True)
    return model


def computed(graph: Any, *inputs: np.ndarray) -> np.ndarray:
    """What a marker graph computes in float."""
    model = deploy.expanded(graph)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: x for each, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def markers(graph: Any, kind: str) -> list[tuple[dict[str, Any], list[np.ndarray]]]:
    """Attributes and constants of the markers of one kind, in order."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    return [
        (
            {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            [constants[name] for name in node.input if name in constants],
        )
        for node in graph.graph.node
        if node.op_type == kind
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_computes_what_the_model_does(name):
    make, data = NETWORKS[name]
    converted = crk.convert(settled(crk.prepare(make(), WEIGHTS_ONLY), data(8)))
    expected = converted.predict(data(8), verbose=0)
    found = computed(marker_graph(converted), data(8))
    assert np.ptp(expected, axis=0).min() > 1e-3  # or it would say nothing
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_have_a_graph(name):
    x = 100.0 * np.abs(random(16, 32, 32, 3))
    if name == "mobilenetv2":
        model = build_model(name, num_classes=5, in_channels=3, size=(32, 32))
    else:
        model = getattr(applications, name)(
            input_shape=(32, 32, 3), weights=None, classes=5, classifier_activation=None
        )
    student = settled(crk.prepare(model, EIGHT, inplace=True), x)
    converted = crk.convert(student)
    graph = marker_graph(converted)
    names = [given["layer"].decode() for given, _ in markers(graph, deploy.INTEGER_WEIGHT)]
    assert sorted(names) == sorted(quantized(converted))
    assert [given["layer"].decode() for given, _ in markers(graph, deploy.FAKE_QUANTIZE)] == names
    assert np.isfinite(computed(graph, x)).all()

    # Without rounding, since what falls the other way at a tie grows from layer to layer of an untrained network.
    switch(student, False)
    student(x, training=True)  # for statistics without rounding
    switch(student, True)
    converted = crk.convert(student)
    switch(converted, False)
    expected = converted.predict(x, verbose=0)
    found = computed(marker_graph(converted), x)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def switch(model: Any, on: bool) -> None:
    """Let activations be rounded, or not."""
    for quantizer in quantizers(model):
        if quantizer.role == "activation":
            quantizer.enabled = on


QUANTIZERS = {
    "LSQ of 8 bits": (cr.LSQ(8, per_channel=True), cr.LSQ(8)),
    "LSQ of 4 bits": (cr.LSQ(4), cr.LSQ(4)),
    "LSQ of 2 bits, narrow": (cr.LSQ(2, per_channel=True, narrow=True), cr.LSQ(2)),
    "LSQ of 1 bit": (cr.LSQ(1, per_channel=True), cr.LSQ(1)),
    "LSQ of 16 bits": (cr.LSQ(16), cr.LSQ(16)),
    "LSQPlus": (cr.LSQ(8), cr.LSQPlus(8)),
    "PACT and DoReFa": (cr.DoReFa(4), cr.PACT(4)),
    "DoReFa": (cr.DoReFa(2, per_channel=True), cr.DoReFa(8)),
    "MinMax": (cr.MinMax(8, per_channel=True), cr.MinMax(8)),
    "MinMax with zero points": (cr.MinMax(6, symmetric=False), cr.MinMax(8, symmetric=False)),
    "activations only": (None, cr.LSQ(8)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_is_exported_as_it_was_trained(name):
    weights, activations = QUANTIZERS[name]
    student = crk.prepare(mlp(), cr.Recipe(weights, activations, first_last_bits=None))
    student(vectors(64), training=True)
    converted = crk.convert(student)
    graph = marker_graph(converted)
    for layer, (given, (scale, zero_point)) in zip(converted.layers, markers(graph, deploy.FAKE_QUANTIZE), strict=True):
        quantizer = layer.input_quantizer
        assert given["layer"].decode() == layer.name
        assert (given["lo"], given["hi"]) == quantizer.code_limits(np.zeros(1))
        assert given.get("binary", 0) == ((given["lo"], given["hi"]) == (-1, 1) and "1 bit" in name)
        assert (scale.dtype, scale.shape, zero_point.dtype, zero_point.shape) == ("float32", (), "int32", ())
        assert (scale, zero_point) == (numbers(quantizer.scale), numbers(quantizer.zero_point))
    for layer, (given, (codes, scale, zero_point)) in zip(
        [layer for layer in converted.layers if weights], markers(graph, deploy.INTEGER_WEIGHT), strict=True
    ):
        integers = layer.integer_weight
        assert (given["layer"].decode(), (given["lo"], given["hi"])) == (layer.name, integers.limits)
        assert given.get("axis") == (0 if weights.per_channel else None)
        assert codes.dtype == integers.codes.dtype
        np.testing.assert_array_equal(codes, numbers(integers.codes).T)  # [out, in]
        np.testing.assert_array_equal(scale, numbers(integers.scale).reshape(scale.shape))
        np.testing.assert_array_equal(zero_point, numbers(integers.zero_point).reshape(scale.shape))
    found, expected = computed(graph, vectors(64)), numbers(converted(vectors(64)))
    same = np.isclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert same.mean() > 0.95  # but for ties


def test_each_call_of_a_shared_layer_has_its_quantizer_and_all_one_weight():
    converted = crk.convert(settled(crk.prepare(convnet(), EIGHT), images(8)))
    graph = marker_graph(converted)
    weights = [given["layer"].decode() for given, _ in markers(graph, deploy.INTEGER_WEIGHT)]
    calls = [given["layer"].decode() for given, _ in markers(graph, deploy.FAKE_QUANTIZE)]
    assert weights.count("shared") == 1
    assert calls.count("shared") == 2
    assert {"block.depthwise", "block.separable.depthwise", "block.separable.pointwise"} <= {*weights} & {*calls}


def test_a_model_that_is_called_twice_is_written_twice_with_one_weight():
    tower = keras.Sequential([keras.Input((6,)), layers.Dense(4, "relu", name="dense")], name="tower")
    pair = [keras.Input((6,), name=name) for name in ("left", "right")]
    model = keras.Model(pair, layers.Dense(3, name="head")(layers.Concatenate()([tower(each) for each in pair])))
    x = [vectors(8), vectors(8, seed=1)]
    student = crk.prepare(model, WEIGHTS_ONLY)
    student(x, training=True)
    converted = crk.convert(student)
    graph = marker_graph(converted)
    assert [given["layer"] for given, _ in markers(graph, deploy.INTEGER_WEIGHT)] == [b"tower.dense", b"head"]
    assert [each.name for each in graph.graph.input] == ["left", "right"]
    np.testing.assert_allclose(computed(graph, *x), numbers(converted(x)), rtol=1e-5, atol=1e-6)


def test_maps_leave_in_the_layout_of_keras():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(5, 3, strides=2)])
    student = crk.prepare(model, WEIGHTS_ONLY)
    student(images(), training=True)
    converted = crk.convert(student)
    found = computed(marker_graph(converted), images())
    assert found.shape == (4, 3, 3, 5)
    np.testing.assert_allclose(found, numbers(converted(images())), rtol=1e-5, atol=1e-6)


def test_an_input_and_an_output_given_twice_are_outputs_of_their_own():
    y = layers.Dense(3)(inputs := keras.Input((6,), name="inputs"))
    student = crk.prepare(keras.Model(inputs, [y, inputs, y]), WEIGHTS_ONLY)
    student(vectors(), training=True)
    model = deploy.expanded(marker_graph(crk.convert(student)))
    assert len({"inputs", *(each.name for each in model.graph.output)}) == 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    first, second, third = session.run(None, {"inputs": vectors()})
    np.testing.assert_array_equal(second, vectors())
    np.testing.assert_array_equal(third, first)


def test_images_of_bytes_are_taken(tmp_path):
    x = layers.Rescaling(1 / 255)(inputs := keras.Input((8, 8, 3), dtype="uint8", name="pixels"))
    student = crk.prepare(keras.Model(inputs, layers.Flatten()(layers.Conv2D(2, 8)(x))), EIGHT)
    bytes_ = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype("uint8")
    student(bytes_, training=True)
    result = crk.export_onnx(student, bytes_, tmp_path / "net.onnx", minimum_agreement=95)
    assert result.differing_layers == ()
    with pytest.raises(cr.CRCoreError, match="'pixels' takes uint8"):
        crk.export_onnx(student, bytes_ - 0.5, tmp_path / "net.onnx")


def test_images_of_any_size_are_taken_where_padding_allows():
    x = layers.Conv2D(4, 3, padding="same")(inputs := keras.Input((None, None, 3)))
    student = crk.prepare(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)), WEIGHTS_ONLY)
    student(images(), training=True)
    converted = crk.convert(student)
    for size in (7, 10):
        x = random(2, size, size + 1, 3)
        np.testing.assert_allclose(computed(marker_graph(converted), x), numbers(converted(x)), rtol=1e-4, atol=1e-5)


def test_a_quantizer_of_the_users_own_is_exported():
    x = layers.Dense(4)(inputs := keras.Input((6,)))
    x = crk.FakeQuantize(cr.LSQ(3, signed=True), name="own")(x)
    student = crk.prepare(keras.Model(inputs, layers.Dense(2)(x)), WEIGHTS_ONLY)
    student(vectors(32), training=True)
    converted = crk.convert(student)
    graph = marker_graph(converted)
    ((given, _),) = markers(graph, deploy.FAKE_QUANTIZE)
    assert (given["layer"], given["lo"], given["hi"]) == (b"own", -4, 3)
    np.testing.assert_allclose(computed(graph, vectors(32)), numbers(converted(vectors(32))), rtol=1e-4, atol=1e-5)


def test_layers_left_in_float_are_constants():
    student = crk.prepare(convnet(), cr.Recipe(cr.LSQ(8), None, skip=("stem", "block.separable", "head")))
    student(images(), training=True)
    converted = crk.convert(student)
    graph = marker_graph(converted)
    assert [given["layer"] for given, _ in markers(graph, deploy.INTEGER_WEIGHT)] == [b"shared", b"block.depthwise"]
    np.testing.assert_allclose(computed(graph, images()), numbers(converted(images())), rtol=1e-4, atol=1e-5)


# Whole exports


def resnet8() -> Any:
    model = build_model("resnet8", num_classes=3, in_channels=3, size=(16, 16))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.5  # for the few steps of a test
    return model


def residual() -> Any:
    """Images [N, 8, 8, 3] to three classes: a residual and a depthwise convolution, normalized with momentum 0.5."""

    def conv(x: Any, kind: Any, *options: Any) -> Any:
        x = kind(*options, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.5)(x)

    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(conv(inputs, layers.Conv2D, 8, 3, 2))
    x = layers.ReLU()(layers.Add()([x, conv(x, layers.Conv2D, 8, 3)]))
    x = layers.ReLU(6.0)(conv(x, layers.DepthwiseConv2D, 3))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)), name="residual")


def pictures(n: int, *sizes: int, seed: int = 0) -> np.ndarray:
    """Noise on one of three patterns: what a network can learn in a few steps, with margins."""
    return random(3, *sizes, seed=99)[labels(n)] + 0.3 * random(n, *sizes, seed=seed)


@pytest.fixture(scope="module")
def student() -> Any:
    """A trained convolutional network of images [N, 8, 8, 3]."""
    keras.utils.set_random_seed(0)
    return trained(crk.prepare(residual(), EIGHT), pictures(48, 8, 8, 3), steps=15)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return pictures(96, 8, 8, 3, seed=5)


def test_images_are_transposed_once_where_they_come_in(student):
    graph = marker_graph(crk.convert(student)).graph
    assert [size.dim_param or size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == ["N", 8, 8, 3]
    assert [node.op_type for node in graph.node].count("Transpose") == 1
    assert (graph.node[0].op_type, list(graph.node[0].input)) == ("Transpose", [graph.input[0].name])


def test_a_trained_network_runs_in_onnxruntime(student, sample, tmp_path):
    result = crk.export_onnx(student, sample, tmp_path / "net.onnx", labels=labels(96), metadata={"task": "patterns"})
    assert result.agreement >= 99.5
    assert result.differing_layers == ()
    assert result.expected_accuracy > 90
    runtime = deploy.open_runtime(tmp_path / "net.onnx")
    np.testing.assert_allclose(
        runtime.run(sample), student.predict(sample, verbose=0), atol=0.1 * np.abs(runtime.run(sample)).max()
    )
    assert runtime.metadata() == {"task": "patterns"}
    again = crk.verify(crk.convert(student), pictures(60, 8, 8, 3, seed=6), tmp_path / "net.onnx")
    assert again.samples == 60
    again.check()


@pytest.mark.parametrize("bits", [(4, 8), (4, 4), (2, 4)], ids=["W4A8", "W4A4", "W2A4"])
def test_few_bits_are_packed(bits, tmp_path):
    recipe = cr.Recipe(cr.LSQ(bits[0], per_channel=True), cr.LSQ(bits[1]), first_last_bits=None)
    student = trained(crk.prepare(mlp(), recipe), pictures(48, 6), steps=20)
    result = crk.export_onnx(student, pictures(96, 6, seed=5), tmp_path / "net.onnx")
    assert result.differing_layers == ()
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert (onnx.TensorProto.INT4 if bits[0] == 4 else onnx.TensorProto.INT2) in kinds


def test_a_trained_network_runs_in_litert(student, sample, tmp_path):
    result = crk.export_litert(student, sample, tmp_path / "net.tflite", labels=labels(96))
    assert result.agreement >= 99.5
    assert result.differing_layers == ()
    assert deploy.open_runtime(tmp_path / "net.tflite").run(sample[:3]).shape == (3, 3)


def test_a_network_trained_in_pytorch_reaches_litert_by_a_portable_file(tmp_path):
    net = nn.Sequential()
    for name, module in (
        ("stem", nn.Conv2d(3, 8, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(8)),
        ("relu", nn.ReLU()),
        ("body", nn.Conv2d(8, 6, 3, padding=1)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flat", nn.Flatten()),
        ("head", nn.Linear(6, 4)),
    ):
        net.add_module(name, module)
    student = crt.prepare(net, recipe()).train()
    x = random(64, 8, 8, 3)
    channels_first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    student(channels_first)
    crt.save_portable(student.eval(), tmp_path / "portable")
    twin = keras.Sequential([
        keras.Input((8, 8, 3)), layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem"),
        layers.BatchNormalization(epsilon=1e-5, name="norm"), layers.ReLU(),
        layers.Conv2D(6, 3, padding="same", name="body"), layers.GlobalAveragePooling2D(),
        layers.Dense(4, name="head"),
    ])  # fmt: skip
    mine = crk.load_portable(crk.prepare(twin, recipe()), tmp_path / "portable")
    found = crk.export_litert(mine, x, tmp_path / "net.tflite", minimum_agreement=0)
    assert found.differing_layers == ()
    expected = student(channels_first).detach().numpy()
    in_litert = deploy.open_runtime(tmp_path / "net.tflite").run(x)
    assert np.abs(in_litert - expected).max() < 0.1 * np.ptp(expected)


def test_the_networks_of_the_command_are_exported_with_the_padding_of_torch(tmp_path):
    x = pictures(48, 16, 16, 3)
    student = trained(crk.prepare(resnet8(), EIGHT), x, steps=10)
    result = crk.export_onnx(student, x, tmp_path / "net.onnx")
    assert result.differing_layers == ()
    pads = {
        node.name: list(onnx.helper.get_attribute_value(attribute))
        for node in marker_graph(crk.convert(student)).graph.node
        for attribute in node.attribute
        if attribute.name == "pads"
    }
    assert pads["blocks_1_residual_0.Conv"] == [1, 1, 1, 1]  # strides of 2, and nothing on the far side alone


def test_the_average_of_a_consistency_model_is_exported(tmp_path):
    recipe = cr.Recipe(cr.LSQ(8), cr.LSQ(8), ema=cr.EMA(decay=0.5))
    both = trained(crk.ConsistencyModel(crk.prepare(mlp(), recipe), recipe), pictures(48, 6), steps=12)
    x = pictures(48, 6, seed=5)
    result = crk.export_onnx(both, {both.student.inputs[0].name: x}, tmp_path / "net.onnx", minimum_agreement=90)
    assert result.differing_layers == ()
    graph = marker_graph(crk.convert(both.teacher))
    ((_, (codes, *_)), *_) = markers(graph, deploy.INTEGER_WEIGHT)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    np.testing.assert_array_equal(np.sort(stored["first.codes"], axis=None), np.sort(codes, axis=None))


# Errors


@keras.saving.register_keras_serializable("test_export")
class Doubled(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return 2.0 * super().call(inputs)


@keras.saving.register_keras_serializable("test_export")
class Padded(Doubled):
    explicit_padding = ((1, 1),)


@keras.saving.register_keras_serializable("test_export")
class Renamed(layers.Dense):
    """Computes what a Dense does."""

    def build(self, shape: Any) -> None:
        super().build(shape)

    def note(self) -> str:
        return self.name


def test_a_subclass_that_computes_the_same_is_exported(tmp_path):
    student = crk.prepare(keras.Sequential([keras.Input((6,)), Renamed(3)]), WEIGHTS_ONLY)
    student(vectors(), training=True)
    converted = crk.convert(student)
    np.testing.assert_allclose(
        computed(marker_graph(converted), vectors()), numbers(converted(vectors())), rtol=1e-5, atol=1e-6
    )


def behind_dense(*more: Any) -> Any:
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, name="dense"), *more])


REFUSED = {
    "kind": (lambda: behind_dense(layers.Reshape((2, 4)), layers.GroupNormalization(2, name="odd")), "no form"),
    "subclass": (lambda: behind_dense(Doubled(3, name="odd")), "explicit_padding"),
    "padding of no convolution": (lambda: behind_dense(Padded(3, name="odd")), "explicit_padding"),
    "activation": (lambda: behind_dense(layers.Dense(3, "log_softmax", name="odd")), "'log_softmax'.*relu6"),
    "relu": (lambda: behind_dense(layers.ReLU(threshold=0.5, name="odd")), "threshold"),
    "equation": (
        lambda: behind_dense(layers.Reshape((2, 4)), layers.EinsumDense("abc,bd->acd", (4, 3), name="odd")),
        "'abc,bd->acd'",
    ),
    "axis": (
        lambda: behind_dense(layers.Reshape((2, 2, 2)), layers.BatchNormalization(axis=2, name="odd")),
        "axis=2",
    ),
    "sizes": (
        lambda: keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(2, 3, 2, padding="same", name="odd")]),
        "fixed size",
    ),
    "mask": (
        lambda: keras.Sequential([keras.Input((5,)), layers.Embedding(11, 4, mask_zero=True, name="odd")]),
        "mask_zero",
    ),
    "scale per channel": (
        lambda: behind_dense(crk.FakeQuantize(cr.LSQ(4, signed=True), shape=(1, 8), name="odd")),
        "per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_is_named_with_a_way_out(name):
    make, message = REFUSED[name]
    student = crk.prepare(make(), WEIGHTS_ONLY)
    student(np.ones((4, *(size or 8 for size in student.input_shape[1:])), "float32"), training=True)
    with pytest.raises(cr.CRCoreError, match=rf"layer 'odd' \(.*{message}"):
        marker_graph(crk.convert(student))


def test_a_function_without_a_graph_is_named():
    x = layers.Dense(4)(inputs := keras.Input((6,)))
    student = crk.prepare(keras.Model(inputs, ops.cumsum(x)), WEIGHTS_ONLY)
    student(vectors(), training=True)
    with pytest.raises(cr.CRCoreError, match=r"layer 'cumsum.*' \(Cumsum\) is a function"):
        marker_graph(crk.convert(student))


def test_a_subclassed_model_is_refused(tmp_path):
    student = crk.prepare(subclassed(), WEIGHTS_ONLY)
    student(vectors(), training=True)
    with pytest.raises(cr.CRCoreError, match=r"'subclassed' \(Subclassed\).*Functional"):
        crk.export_onnx(student, vectors(), tmp_path / "net.onnx")


WRONG_SAMPLES = {
    "shape": (random(4, 8, 8), r"\[N, 8, 8, 3\] of float32, sample has \[4, 8, 8\]"),
    "channels": (random(4, 3, 8, 8), r"\[4, 3, 8, 8\]"),
    "empty": (random(0, 8, 8, 3), r"\[0, 8, 8, 3\].*few hundred real inputs"),
    "dtype": (np.full((4, 8, 8, 3), "a"), r"of <U1"),
    "kind": (object(), "sample has object|of object"),
    "names": ({"image": random(4, 8, 8, 3)}, r"the inputs \['input_layer.*'\], sample has \['image'\]"),
    "number": ([random(4, 8, 8, 3)] * 2, "sample has 2 arrays"),
}


@pytest.mark.parametrize("name", WRONG_SAMPLES)
def test_a_sample_that_does_not_fit_is_refused(name, student, tmp_path):
    wrong, message = WRONG_SAMPLES[name]
    with pytest.raises(cr.CRCoreError, match=message):
        crk.export_onnx(student, wrong, tmp_path / "net.onnx")
    assert [*tmp_path.iterdir()] == []


def test_a_sample_of_integers_must_be_integers(tmp_path):
    student = crk.prepare(sequence(), WEIGHTS_ONLY)
    student(tokens(), training=True)
    with pytest.raises(cr.CRCoreError, match=r"'tokens' takes int32"):
        crk.export_onnx(student, random(4, 5), tmp_path / "net.onnx")


def test_wrong_paths_and_labels_are_refused(student, sample, tmp_path):
    for path, message in (("net.tflite", r"must end in \.onnx"), ("none/net.onnx", "no folder")):
        with pytest.raises(cr.CRCoreError, match=message):
            crk.export_onnx(student, sample, tmp_path / path)
    with pytest.raises(cr.CRCoreError, match=r"must end in \.tflite"):
        crk.export_litert(student, sample, tmp_path / "net.onnx")
    with pytest.raises(cr.CRCoreError, match=r"labels must have the shape \(96,\)"):
        crk.export_onnx(student, sample, tmp_path / "net.onnx", labels=labels(5))
    assert [*tmp_path.iterdir()] == []


def test_models_that_were_not_trained_are_refused(tmp_path):
    with pytest.raises(cr.CRCoreError, match="have not seen data"):
        crk.export_onnx(crk.prepare(mlp(), EIGHT), vectors(), tmp_path / "net.onnx")
    with pytest.raises(cr.CRCoreError, match="no quantized layer"):
        crk.export_onnx(mlp(), vectors(), tmp_path / "net.onnx")


def test_a_package_that_is_missing_is_named():
    program = """
        import sys
        sys.modules["onnx"] = None
        import crcore, crcore_keras
        try:
            crcore_keras.export_onnx(None, None, "net.onnx")
        except crcore.CRCoreError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "pip install 'crcore[onnx]'" in result.stdout
