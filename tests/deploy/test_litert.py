"""Files for LiteRT compute, with int8 alone, what was trained: to one code, with exactly the trained integers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from small_graphs import GraphMaker

from crcore import CRCoreError, deploy
from crcore.deploy import codes_by_layer, expanded, float_twin
from crcore.deploy._litert import metadata_of, to_litert, with_metadata

IMAGE = (4, 9, 9)
KERNELS = {
    "XNNPACK": OpResolverType.AUTO,
    "built in": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}
Build = Callable[[GraphMaker], str]


@dataclass(frozen=True)
class Ran:
    """What a file computed: codes and values of its outputs, by kernels."""

    interpreter: Interpreter
    codes: list[Any]
    values: list[Any]


def run(tflite: bytes, sample: Mapping[str, Any], kernels: str = "XNNPACK") -> Ran:
    interpreter = Interpreter(model_content=tflite, experimental_op_resolver_type=KERNELS[kernels])
    for entry in interpreter.get_input_details():
        interpreter.resize_tensor_input(entry["index"], sample[entry["name"]].shape)
    interpreter.allocate_tensors()
    for entry in interpreter.get_input_details():
        interpreter.set_tensor(entry["index"], quantized(sample[entry["name"]], entry))
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    codes = [interpreter.get_tensor(entry["index"]) for entry in outputs]
    values = [dequantized(code, entry) for code, entry in zip(codes, outputs, strict=True)]
    return Ran(interpreter, codes, values)


def quantized(x: Any, entry: Mapping[str, Any]) -> Any:
    if entry["dtype"] == np.float32:
        return x
    scale, zero_point = entry["quantization"]
    return np.clip(np.rint(x / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)


def dequantized(codes: Any, entry: Mapping[str, Any]) -> Any:
    scale, zero_point = entry["quantization"]
    return codes if entry["dtype"] == np.float32 else (codes.astype(np.float32) - zero_point) * np.float32(scale)


def trained(model: onnx.ModelProto, sample: Mapping[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(expanded(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(sample))


def steps_apart(ran: Ran, expected: list[Any]) -> Any:
    """How many steps of its grid each output is from what was trained."""
    outputs = ran.interpreter.get_output_details()
    apart = []
    for entry, value, wanted in zip(outputs, ran.values, expected, strict=True):
        assert value.shape == wanted.shape
        apart.append(np.rint(np.abs(value - wanted) / entry["quantization"][0]).ravel())
    return np.concatenate(apart)


def kernels_of(tflite: bytes) -> list[str]:
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromPackedBuf(tflite, 0)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return [names[codes[operator.opcodeIndex]] for operator in model.subgraphs[0].operators]


def weights_of(tflite: bytes) -> list[tuple[Any, Any]]:
    """Codes and scales of the constants with scales per channel, in the file's order of operators."""
    model = schema.ModelT.InitFromPackedBuf(tflite, 0)
    (graph,) = model.subgraphs
    found = []
    for operator in graph.operators:
        for index in operator.inputs[1:2]:
            tensor = graph.tensors[index]
            data = model.buffers[tensor.buffer].data
            if tensor.type == schema.TensorType.INT8 and data is not None and len(tensor.shape) == 4:
                found.append((np.asarray(data).view(np.int8).reshape(tensor.shape), tensor.quantization.scale))
    return found


def check(build: Build, inputs: Mapping[str, tuple[int, ...]], *, different: float, spread: float = 1.0) -> bytes:
    """Export and run it; ``different``: the share of outputs that may be off, by one code."""
    maker = GraphMaker(inputs)
    model = maker.model(build(maker))
    sample = maker.sample(16, spread)
    tflite, expected = to_litert(model), trained(model, sample)
    assert len(np.unique(expected[0])) > 2, "the network does nothing"
    for kernels in KERNELS:
        apart = steps_apart(run(tflite, sample, kernels), expected)
        assert apart.max() <= 1, kernels
        if kernels == "XNNPACK":
            assert (apart > 0).mean() <= different
    return tflite


def s8(g: GraphMaker, x: str, scale: float) -> str:
    return g.signed(x, scale)


# Operators that multiply with trained integers

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "valid": {"shape": (8, 4, 3, 3)},
    "same": {"shape": (8, 4, 3, 3), "pads": [1, 1, 1, 1]},
    "asymmetric padding and strides": {"shape": (8, 4, 3, 3), "pads": [0, 2, 1, 0], "strides": [2, 1]},
    "more padding before": {"shape": (8, 4, 2, 3), "auto_pad": "SAME_LOWER", "strides": [2, 1]},
    "more padding after": {"shape": (8, 4, 2, 3), "auto_pad": "SAME_UPPER", "strides": [2, 1]},
    "dilated": {"shape": (8, 4, 3, 3), "pads": [2, 2, 2, 2], "dilations": [2, 2]},
    "groups": {"shape": (8, 2, 3, 3), "pads": [1, 1, 1, 1], "group": 2},
    "depthwise": {"shape": (4, 1, 3, 3), "pads": [0, 0, 1, 1], "strides": [2, 2], "group": 4},
    "depthwise with padding of its own": {"shape": (4, 1, 3, 3), "pads": [1, 0, 2, 1], "strides": [2, 2], "group": 4},
    "depthwise, dilated, with a multiplier": {
        "shape": (8, 1, 3, 3), "pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 4,
    },
    "one scale and no bias": {"shape": (8, 4, 1, 1), "scale": 0.01, "bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_computes_what_was_trained(name: str) -> None:
    given = dict(CONVOLUTIONS[name])
    shape = given.pop("shape")
    tflite = check(
        lambda g: s8(g, g.conv(s8(g, "image", 0.02), shape, **given), 0.03), {"image": IMAGE}, different=0.01
    )
    assert ("DEPTHWISE_CONV_2D" in kernels_of(tflite)) == (given.get("group") == 4)


def test_trained_integers_and_scales_stand_in_the_file() -> None:
    g = GraphMaker({"image": IMAGE})
    signs = np.array([1, -1] * 4, np.float32)
    conv_scale, depthwise_scale, dense_scale = g.scales(8) * signs, g.scales(16), g.scales(5)
    x = g.conv(s8(g, "image", 0.02), (8, 4, 3, 3), layer="conv", scale=conv_scale)
    x = g.quantized(g.node("Relu", x), 0.031)
    x = s8(g, g.conv(x, (16, 1, 3, 3), group=8, layer="depthwise", scale=depthwise_scale), 0.027)
    x = s8(g, g.node("Flatten", s8(g, g.node("GlobalAveragePool", x), 0.011)), 0.011)
    model = g.model(s8(g, g.gemm(x, 16, 5, layer="dense", scale=dense_scale), 0.013))
    tflite = to_litert(model)
    codes = codes_by_layer(model)
    conv, depthwise, dense = weights_of(tflite)
    np.testing.assert_array_equal(conv[0], codes["conv"].transpose(0, 2, 3, 1) * signs.astype(int).reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(depthwise[0], codes["depthwise"].transpose(1, 2, 3, 0))
    np.testing.assert_array_equal(dense[0], codes["dense"].reshape(5, 1, 1, 16))
    for found, scale in ((conv, conv_scale), (depthwise, depthwise_scale), (dense, dense_scale)):
        np.testing.assert_allclose(found[1], np.abs(scale), rtol=3e-7)
    details = run(tflite, g.sample(3)).interpreter
    for entry, scale in ((details.get_input_details()[0], 0.02), (details.get_output_details()[0], 0.013)):
        assert entry["dtype"] == np.int8
        assert entry["quantization"] == (pytest.approx(scale, rel=3e-7), 0)
    assert {"FULLY_CONNECTED", "DEQUANTIZE", "QUANTIZE"}.isdisjoint(kernels_of(tflite))


def test_a_channel_that_is_switched_off_keeps_its_integers() -> None:
    g = GraphMaker({"image": IMAGE})
    scale = np.array([0.01, 0.0, 1e-30, 0.02], np.float32)
    model = g.model(s8(g, g.conv(s8(g, "image", 0.02), (4, 4, 3, 3), scale=scale, bias=False), 0.03))
    tflite, sample = to_litert(model), g.sample()
    np.testing.assert_array_equal(weights_of(tflite)[0][0], codes_by_layer(model)["conv"].transpose(0, 2, 3, 1))
    assert steps_apart(run(tflite, sample), trained(model, sample)).max() <= 1


def test_a_zero_point_of_a_weight_moves_its_integers() -> None:
    g = GraphMaker({"image": (10,)})
    codes = g.random.integers(0, 16, (10, 6)).astype(np.uint8)
    weight = g.weight(codes, g.scales(6, 0.1), zero_point=7, axis=1, limits=(0, 15))
    model = g.model(s8(g, g.node("MatMul", s8(g, "image", 0.02), weight), 0.02))
    tflite, sample = to_litert(model), g.sample()
    np.testing.assert_array_equal(weights_of(tflite)[0][0].reshape(6, 10), codes.astype(int).T - 7)
    assert steps_apart(run(tflite, sample), trained(model, sample)).max() <= 1


@pytest.mark.parametrize("scale", [None, 0.01])
def test_a_matrix_product_computes_what_was_trained(scale: float | None) -> None:
    check(lambda g: s8(g, g.gemm(s8(g, "x", 0.02), 10, 7, scale=scale), 0.03), {"x": (10,)}, different=0.02)


def test_a_product_with_sequences_computes_what_was_trained() -> None:
    def build(g: GraphMaker) -> str:
        return s8(g, g.node("MatMul", s8(g, "x", 0.02), g.weight(g.codes(10, 6), g.scales(6), axis=1)), 0.03)

    check(build, {"x": (5, 10)}, different=0.01)


# Grids of activations

GRIDS: dict[str, dict[str, Any]] = {
    "signed": {"scale": 0.03, "lo": -128, "hi": 127},
    "signed, narrow": {"scale": 0.02, "lo": -127, "hi": 127},
    "unsigned": {"scale": 0.02},
    "offset": {"scale": 0.02, "zero_point": 113},
    "signed, offset": {"scale": 0.02, "lo": -128, "hi": 127, "zero_point": -30},
    "4 bits, signed": {"scale": 0.3, "lo": -8, "hi": 7},
    "4 bits, unsigned": {"scale": 0.2, "hi": 15},
    "4 bits, offset": {"scale": 0.2, "hi": 15, "zero_point": 6},
    "2 bits, signed": {"scale": 0.7, "lo": -2, "hi": 1},
    "2 bits, unsigned": {"scale": 0.7, "hi": 3},
}


@pytest.mark.parametrize("relu", [True, False], ids=["behind a ReLU", "alone"])
@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_clipped_at_the_ends_of_a_trained_grid(name: str, relu: bool) -> None:
    """At the input and behind a convolution; the codes that occur are counted."""
    g = GraphMaker({"image": IMAGE})
    given = {"lo": 0, "hi": 255, **GRIDS[name]}
    first = g.quantized("image", **given)
    x = g.conv(first, (8, 4, 3, 3), bits=4, scale=g.scales(8, 0.1))
    x = g.quantized(g.node("Relu", x) if relu else x, **given)
    model, sample = g.model(first, x), g.sample(16, spread=3.0)
    tflite, expected = to_litert(model), trained(model, sample)
    for kernels in KERNELS:
        ran = run(tflite, sample, kernels)
        np.testing.assert_allclose(ran.values[0], expected[0], rtol=1e-6)
        apart = steps_apart(ran, expected)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.03
        for value, wanted in zip(ran.values, expected, strict=True):
            assert (value.min(), value.max()) == pytest.approx((wanted.min(), wanted.max()), rel=1e-6)
            assert len(np.unique(value)) <= given["hi"] - given["lo"] + 1


def test_a_rounding_to_a_narrower_grid_is_one_change_of_grid() -> None:
    def build(g: GraphMaker) -> str:
        fine = g.quantized(g.node("Relu", g.conv(s8(g, "image", 0.02), (4, 4, 1, 1))), 0.02)
        return g.quantized(fine, 0.3, hi=15)

    tflite = check(build, {"image": IMAGE}, different=0.005, spread=2.0)
    assert sorted(kernels_of(tflite)) == ["CONV_2D", "MUL", "TRANSPOSE", "TRANSPOSE"]


@pytest.mark.parametrize(
    ("fine", "coarse", "products"),
    [
        ({"lo": -128, "hi": 127, "scale": 0.13 / 5}, {"lo": -8, "hi": 7, "scale": 0.13}, 2),
        ({"lo": 0, "hi": 255, "scale": 0.13 / 9}, {"lo": 0, "hi": 15, "scale": 0.13}, 1),
        ({"lo": 0, "hi": 255, "scale": 0.13 / 27}, {"lo": 0, "hi": 15, "scale": 0.13}, 1),
        ({"lo": -128, "hi": 127, "scale": 0.11 / 21}, {"lo": -7, "hi": 7, "scale": 0.11}, 1),
    ],
)
def test_codes_are_clipped_where_one_grid_ends_before_the_other(
    fine: dict[str, Any], coarse: dict[str, Any], products: int
) -> None:
    tflite = check(lambda g: g.quantized(g.quantized("x", **fine), **coarse), {"x": (64,)}, different=0.0, spread=2.0)
    assert kernels_of(tflite) == ["MUL"] * products


@pytest.mark.parametrize(
    ("ends", "scale"), [((0.0, 6.0), 6 / 255), ((0.0, 6.0), 0.1), ((-0.5, 1.0), 0.03), ((None, 1.0), 0.03)]
)
def test_a_clip_needs_no_kernel(ends: tuple[float | None, float], scale: float) -> None:
    def build(g: GraphMaker) -> str:
        low = "" if ends[0] is None else g.floats(ends[0])
        x = g.node("Clip", g.conv(s8(g, "image", 0.05), (8, 4, 1, 1)), low, g.floats(ends[1]))
        return g.quantized(x, scale, lo=0 if ends[0] == 0 else -128, hi=255 if ends[0] == 0 else 127)

    tflite = check(build, {"image": IMAGE}, different=0.01, spread=3.0)
    assert {"MINIMUM", "MAXIMUM", "RELU6", "RELU"}.isdisjoint(kernels_of(tflite))


# The other operators: what makes the last tensor, its grid, and the share of codes that may differ


def channels(g: GraphMaker) -> str:
    return g.floats(g.random.normal(size=(4, 1, 1)))


UNARY: dict[str, tuple[Build, dict[str, Any], float]] = {
    "Mul of a number": (lambda g: g.node("Mul", "q", g.floats(-0.3)), {"scale": 0.0067, "lo": -128, "hi": 127}, 0.001),
    "Add of a number": (lambda g: g.node("Add", "q", g.floats(0.3)), {"scale": 0.023, "lo": -128, "hi": 127}, 0.001),
    "Sub from a number": (lambda g: g.node("Sub", g.floats(1), "q"), {"scale": 0.023, "lo": -128, "hi": 127}, 0.001),
    "Mul per channel": (lambda g: g.node("Mul", "q", channels(g)), {"scale": 0.02, "lo": -128, "hi": 127}, 0.001),
    "Add per channel": (lambda g: g.node("Add", channels(g), "q"), {"scale": 0.02, "lo": -128, "hi": 127}, 0.001),
    "Sub from channels": (lambda g: g.node("Sub", channels(g), "q"), {"scale": 0.02, "lo": -128, "hi": 127}, 0.001),
    "Sub per channel": (lambda g: g.node("Sub", "q", channels(g)), {"scale": 0.02, "lo": -128, "hi": 127}, 0.001),
    "Div per channel": (lambda g: g.node("Div", "q", channels(g)), {"scale": 0.2, "lo": -128, "hi": 127}, 0.001),
    "Relu": (lambda g: g.node("Relu", "q"), {"scale": 0.05}, 0.0),
    "LeakyRelu": (lambda g: g.node("LeakyRelu", "q", alpha=0.1), {"scale": 0.05, "lo": -128, "hi": 127}, 0.05),
    "Sigmoid": (lambda g: g.node("Sigmoid", "q"), {"scale": 1 / 256}, 0.0),
    "Sigmoid, 4 bits": (lambda g: g.node("Sigmoid", "q"), {"scale": 0.06, "hi": 15}, 0.12),
    "HardSigmoid": (lambda g: g.node("HardSigmoid", "q", alpha=1 / 6, beta=0.5), {"scale": 1 / 255}, 0.05),
    "HardSwish": (lambda g: g.node("HardSwish", "q"), {"scale": 0.05, "lo": -128, "hi": 127}, 0.02),
    "Gelu": (lambda g: g.node("Gelu", "q"), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
    "Tanh": (lambda g: g.node("Tanh", "q"), {"scale": 1 / 128, "lo": -128, "hi": 127}, 0.0),
    "Identity": (lambda g: g.node("Identity", "q"), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
    "Dropout": (lambda g: g.node("Dropout", "q"), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
    "GlobalAveragePool": (lambda g: g.node("GlobalAveragePool", "q"), {"scale": 0.01, "lo": -128, "hi": 127}, 0.001),
    "ReduceMean": (
        lambda g: g.node("ReduceMean", "q", g.constant([2, 3]), keepdims=0),
        {"scale": 0.01, "lo": -128, "hi": 127},
        0.001,
    ),
    "MaxPool": (
        lambda g: g.node("MaxPool", "q", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "MaxPool with padding of its own": (
        lambda g: g.node("MaxPool", "q", kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 0, 0]),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "MaxPool, rounded up": (
        lambda g: g.node("MaxPool", "q", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "AveragePool": (
        lambda g: g.node("AveragePool", "q", kernel_shape=[3, 3], strides=[3, 3]),
        {"scale": 0.023, "lo": -128, "hi": 127},
        0.001,
    ),
    "AveragePool, padding counted": (
        lambda g: g.node("AveragePool", "q", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        {"scale": 0.023, "lo": -128, "hi": 127},
        0.001,
    ),
    "AveragePool, padding left out": (
        lambda g: g.node("AveragePool", "q", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.1,
    ),
    "Pad": (
        lambda g: g.node("Pad", "q", g.constant([0, 0, 1, 2, 0, 0, 0, 1])),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "Pad with a number": (
        lambda g: g.node("Pad", "q", g.constant([1, 2, 0, 1]), g.floats(0.5), g.constant([2, 3])),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "Flatten": (lambda g: g.node("Flatten", "q"), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
    "Reshape": (
        lambda g: g.node("Reshape", "q", g.constant([0, 2, -1, 9])),
        {"scale": 0.05, "lo": -128, "hi": 127},
        0.0,
    ),
    "Transpose": (lambda g: g.node("Transpose", "q", perm=[0, 3, 2, 1]), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
    "Unsqueeze": (lambda g: g.node("Unsqueeze", "q", g.constant([1])), {"scale": 0.05, "lo": -128, "hi": 127}, 0.0),
}


@pytest.mark.parametrize("name", UNARY)
def test_an_operator_computes_what_was_trained(name: str) -> None:
    """On images in LiteRT's layout, behind a convolution, and on images as they come."""
    operator, grid, different = UNARY[name]

    def build(g: GraphMaker, *, convolution: bool) -> str:
        x = g.signed("image", 0.05)
        if convolution:  # which permutes the channels, so that it is exact
            codes = (100 * np.eye(4)[[2, 0, 3, 1]]).astype(np.int8).reshape(4, 4, 1, 1)
            x = g.signed(g.node("Conv", x, g.weight(codes, 0.01)), 0.05)
        g.node("Identity", x, name="q")
        return g.quantized(operator(g), **grid)

    for convolution in (True, False):
        check(partial(build, convolution=convolution), {"image": IMAGE}, different=different, spread=2.0)


BINARY: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "Add": ("Add", {"a": IMAGE, "b": IMAGE}, {}),
    "Sub": ("Sub", {"a": IMAGE, "b": IMAGE}, {}),
    "Mul": ("Mul", {"a": IMAGE, "b": IMAGE}, {}),
    "Mul with a gate": ("Mul", {"a": IMAGE, "b": (4, 1, 1)}, {}),
    "Concat": ("Concat", {"a": IMAGE, "b": (2, 9, 9)}, {"axis": 1}),
    "Concat of vectors": ("Concat", {"a": (7,), "b": (5,)}, {"axis": -1}),
}


@pytest.mark.parametrize("name", BINARY)
def test_an_operator_of_two_tensors_computes_what_was_trained(name: str) -> None:
    op, inputs, attributes = BINARY[name]
    check(
        lambda g: s8(g, g.node(op, s8(g, "a", 0.02), s8(g, "b", 0.015), **attributes), 0.023), inputs, different=0.002
    )


def test_softmax_computes_what_was_trained() -> None:
    check(lambda g: g.quantized(g.node("Softmax", s8(g, "x", 0.05)), 1 / 256), {"x": (10,)}, different=0.0, spread=3.0)


# Networks


def calibrated(g: GraphMaker, x: str, shape: tuple[int, int, int, int], layer: str, **attributes: Any) -> str:
    """A convolution whose outputs have about the range of its inputs, so that one code in is about one code out."""
    scale = g.scales(shape[0], 1 / 64) / np.sqrt(np.prod(shape[1:]))
    return g.conv(x, shape, layer=layer, scale=scale, **attributes)


def residual(g: GraphMaker) -> str:
    x = g.quantized(g.node("Relu", calibrated(g, s8(g, "image", 0.02), (8, 4, 3, 3), "stem", pads=[1] * 4)), 0.01)
    y = g.quantized(g.node("Relu", calibrated(g, x, (8, 8, 3, 3), "first", pads=[1] * 4)), 0.008)
    y = s8(g, calibrated(g, y, (8, 8, 3, 3), "second", pads=[1] * 4), 0.01)
    x = g.quantized(g.node("Relu", g.node("Add", y, x)), 0.012)
    x = s8(g, g.node("Flatten", s8(g, g.node("GlobalAveragePool", x), 0.005)), 0.005)
    return s8(g, g.gemm(x, 8, 5, scale=0.002), 0.005)


def test_a_residual_network_computes_what_was_trained_for_any_batch() -> None:
    g = GraphMaker({"image": IMAGE})
    model = g.model(residual(g))
    tflite = to_litert(model)
    for n in (1, 3, 64):
        sample = g.sample(n)
        assert steps_apart(run(tflite, sample), trained(model, sample)).max() <= 1
    assert kernels_of(tflite).count("CONV_2D") == 4
    assert "QUANTIZE" not in kernels_of(tflite)


def test_a_gate_over_channels_computes_what_was_trained() -> None:
    def build(g: GraphMaker) -> str:
        x = s8(g, "image", 0.02)
        pooled = s8(g, g.node("GlobalAveragePool", x), 0.01)
        few = g.quantized(g.node("Relu", calibrated(g, pooled, (2, 4, 1, 1), "reduce")), 0.01)
        gate = g.quantized(g.node("Sigmoid", s8(g, calibrated(g, few, (4, 2, 1, 1), "expand"), 0.01)), 1 / 256)
        return s8(g, g.node("Mul", x, gate), 0.02)

    check(build, {"image": IMAGE}, different=0.01)


def test_a_network_in_layout_nhwc_is_transposed_nowhere() -> None:
    def build(g: GraphMaker) -> str:
        x = s8(g, g.node("Transpose", s8(g, "image", 0.02), perm=[0, 3, 1, 2]), 0.02)
        x = s8(g, g.conv(x, (8, 4, 3, 3)), 0.03)
        return s8(g, g.node("Transpose", x, perm=[0, 2, 3, 1]), 0.03)

    assert kernels_of(check(build, {"image": (9, 9, 4)}, different=0.01)) == ["CONV_2D"]


def test_a_map_is_flattened_in_the_order_of_the_graph() -> None:
    def build(g: GraphMaker) -> str:
        x = s8(g, g.conv(s8(g, "image", 0.02), (4, 4, 1, 1)), 0.03)
        batch = g.node("Shape", x, start=0, end=1)
        shape = g.node("Concat", batch, g.constant([36]), axis=0)
        return s8(g, g.gemm(s8(g, g.node("Reshape", x, shape), 0.03), 36, 5, scale=0.002), 0.02)

    tflite = check(build, {"image": (4, 3, 3)}, different=0.04)
    assert kernels_of(tflite) == ["TRANSPOSE", "CONV_2D", "TRANSPOSE", "RESHAPE", "CONV_2D", "RESHAPE"]


def test_inputs_and_outputs_have_the_names_and_the_order_of_the_graph() -> None:
    g = GraphMaker({"z/last": (5,), "a.first": (5,)})
    z, a = s8(g, "z/last", 0.02), s8(g, "a.first", 0.03)
    model = g.model(s8(g, g.node("Sub", z, a), 0.03), s8(g, g.node("Mul", z, a), 0.02))
    sample = g.sample()
    ran = run(to_litert(model), sample)
    assert [entry["name"] for entry in ran.interpreter.get_input_details()] == ["z/last", "a.first"]
    assert [entry["name"] for entry in ran.interpreter.get_output_details()] == [o.name for o in model.graph.output]
    assert steps_apart(ran, trained(model, sample)).max() <= 1
    signature = ran.interpreter.get_signature_list()["serving_default"]
    assert sorted(signature["inputs"]) == ["a.first", "z/last"]


def test_more_than_ten_inputs_keep_their_order() -> None:
    inputs = {f"x{i}": (3,) for i in range(12)}

    def build(g: GraphMaker) -> str:
        return s8(g, g.node("Concat", *(s8(g, name, 0.02) for name in inputs), axis=1), 0.02)

    tflite = check(build, inputs, different=0.0)
    assert [entry["name"] for entry in Interpreter(model_content=tflite).get_input_details()] == [*inputs]


def test_a_float_twin_computes_in_float() -> None:
    g = GraphMaker({"image": IMAGE})
    x = g.node("Clip", g.conv(s8(g, "image", 0.02), (8, 4, 3, 3), pads=[2, 1, 0, 1]), g.floats(0), g.floats(6))
    x = g.node("HardSwish", g.quantized(x, 0.02))
    pads = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 0, 0]}
    x = g.node("Add", g.node("MaxPool", x, **pads), g.node("AveragePool", x, count_include_pad=1, **pads))
    x = g.node("Mul", x, g.node("HardSigmoid", g.conv(s8(g, x, 0.02), (8, 8, 1, 1), layer="gate")))
    model = float_twin(g.model(g.gemm(g.node("Flatten", g.node("GlobalAveragePool", x)), 8, 5)))
    sample = g.sample()
    ran = run(to_litert(model), sample)
    assert ran.codes[0].dtype == np.float32
    np.testing.assert_allclose(ran.values[0], trained(model, sample)[0], rtol=1e-4, atol=1e-5)


# Metadata


def test_metadata_is_stored_and_replaced_and_the_file_still_runs() -> None:
    g = GraphMaker({"image": IMAGE})
    tflite, sample = to_litert(g.model(residual(g))), g.sample()
    assert metadata_of(tflite) is None
    once = with_metadata(tflite, '{"bits": 4}')
    twice = with_metadata(once, '{"Größe": "ä"}' * 100)
    assert metadata_of(once) == '{"bits": 4}'
    assert metadata_of(twice) == '{"Größe": "ä"}' * 100
    for stored in (once, twice):
        np.testing.assert_array_equal(run(stored, sample).codes[0], run(tflite, sample).codes[0])
        assert kernels_of(stored) == kernels_of(tflite)


def test_numbers_in_the_file_are_aligned() -> None:
    g = GraphMaker({"image": IMAGE})
    tflite = with_metadata(to_litert(g.model(residual(g))), "x")
    packed = schema.Model.GetRootAs(tflite, 0)
    tables = [packed.Buffers(i) for i in range(packed.BuffersLength())]
    places = [table._tab.Vector(table._tab.Offset(4)) for table in tables if table.DataLength() > 0]
    assert len(places) > 5
    assert {place % 16 for place in places} == {0}


@pytest.mark.parametrize("damage", [lambda f: b"PK\x03\x04" * 9, lambda f: f[:40], lambda f: f[: len(f) // 3]])
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes]) -> None:
    g = GraphMaker({"x": (3,)})
    tflite = to_litert(g.model(s8(g, g.gemm(s8(g, "x", 0.02), 3, 2), 0.02)))
    with pytest.raises(CRCoreError, match="export it again"):
        metadata_of(damage(tflite))


# What cannot be written


def refused(build: Build, inputs: Mapping[str, tuple[int, ...]] | None = None) -> str:
    g = GraphMaker(inputs or {"image": IMAGE})
    with pytest.raises(CRCoreError) as raised:
        to_litert(g.model(build(g)))
    return str(raised.value)


def test_weights_of_minus_128_become_their_neighbours_and_are_counted(tmp_path: Path) -> None:
    g = GraphMaker({"x": (10,)})
    codes = g.codes(6, 10)
    codes[0, :3] = -128
    weight = g.weight(codes, g.scales(6), layer="head", axis=0, limits=(-128, 127))
    model, sample = g.model(g.node("Gemm", s8(g, "x", 0.02), weight, transB=1)), g.sample(64)
    path = tmp_path / "net.tflite"
    (expected,) = trained(model, sample)
    found = deploy.write_litert(deploy.Traced(model, sample, expected), path, minimum_agreement=90)
    assert found.differing_layers == ()
    assert "3 weights of 1 layer (head) have the code -128" in found.notices[0]
    assert "narrow=True" in found.notices[0]
    ((stored, _),) = weights_of(path.read_bytes())
    assert np.array_equal(stored.reshape(6, 10), np.maximum(codes, -127))


def test_a_channel_that_normalization_blew_up_is_kept_within_what_the_kernels_take(tmp_path: Path) -> None:
    g = GraphMaker({"x": (3, 8, 8)})
    scale = np.array([0.005, 2000.0, 0.004, 0.003], np.float32)
    codes = g.codes(4, 3, 1, 1)
    codes[1] = [[[1]], [[0]], [[0]]]
    x = g.node(
        "Mul", "x", g.floats(np.array([0, 1, 1], np.float32).reshape(1, 3, 1, 1))
    )  # what it reads is always zero
    weight = g.weight(codes, scale, axis=0, limits=(-127, 127), layer="conv")
    y = g.node("Relu", g.node("Conv", s8(g, x, 0.02), weight, g.floats([0.1, 0.5, -0.2, 0.3])))
    model, sample = g.model(g.gemm(s8(g, g.node("Flatten", y), 0.02), 256, 5, layer="head")), g.sample(64)
    (expected,) = trained(model, sample)
    found = deploy.write_litert(deploy.Traced(model, sample, expected), tmp_path / "net.tflite", minimum_agreement=0)
    assert found.differing_layers == ()  # its bias, rounded to the steps of its accumulator, is another matter


def test_one_tensor_on_two_other_grids_stays_in_integers() -> None:
    def build(g: GraphMaker) -> str:
        x = g.quantized(g.node("Relu", g.conv(s8(g, "x", 0.03), (4, 3, 3, 3), layer="a")), 0.004)
        parts = [
            g.conv(g.quantized(x, scale), (4, 4, 1, 1), layer=layer) for scale, layer in ((0.005, "b"), (0.006, "c"))
        ]
        return s8(g, g.node("Add", *(s8(g, part, 0.02) for part in parts)), 0.03)

    check(build, {"x": (3, 8, 8)}, different=0.02)


def test_a_weight_whose_zero_point_is_too_far_off_is_named() -> None:
    def build(g: GraphMaker) -> str:
        codes = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
        return s8(g, g.node("MatMul", s8(g, "x", 0.02), g.weight(codes.T, 0.01, zero_point=3, limits=(0, 255))), 0.02)

    assert "found -3..233 about zero" in refused(build, {"x": (10,)})


def test_binary_and_wide_activations_are_named() -> None:
    binary = refused(lambda g: g.quantized("image", 0.5, lo=-1, hi=1, layer="conv1", binary=1))
    assert "'conv1'" in binary
    assert "2 bits or more" in binary
    wide = refused(lambda g: g.quantized("image", 0.001, lo=-2048, hi=2047, layer="conv1"))
    assert "'conv1' has codes from -2048 to 2047" in wide


def test_a_grid_without_zero_is_named() -> None:
    assert "zero at 300" in refused(lambda g: g.quantized("image", 0.1, zero_point=300, layer="conv1"))


def test_an_operator_without_a_form_is_named_with_the_layer_before_it() -> None:
    def build(g: GraphMaker) -> str:
        x = s8(g, g.conv(g.signed("image", 0.02, layer="stem"), (8, 4, 3, 3), layer="stem"), 0.02)
        ones, zeros = g.floats(np.ones(7)), g.floats(np.zeros(7))
        return s8(g, g.node("LayerNormalization", x, ones, zeros), 0.02)

    message = refused(build)
    assert message.startswith("LayerNormalization (makes 'LayerNormalization_")
    assert "behind layer 'stem'" in message
    assert "it has Add, AveragePool" in message


def test_a_layer_that_was_left_in_float_is_named() -> None:
    def build(g: GraphMaker) -> str:
        x = s8(g, g.conv(g.signed("image", 0.02, layer="stem"), (8, 4, 3, 3), layer="stem"), 0.02)
        return s8(g, g.node("Conv", x, g.floats(g.random.normal(size=(4, 8, 1, 1)))), 0.02)

    message = refused(build)
    assert "behind layer 'stem'" in message
    assert "left in float" in message


def test_what_stays_in_float_is_named() -> None:
    def build(g: GraphMaker) -> str:
        return s8(g, g.conv(g.node("Relu", g.conv(s8(g, "image", 0.02), (8, 4, 3, 3), layer="a")), (4, 8, 1, 1)), 0.02)

    message = refused(build)
    assert "operators stay in float" in message
    assert "CONV_2D (makes 'Conv_" in message


def test_integer_weights_without_quantized_activations_are_named() -> None:
    assert "layer 'conv' has integer weights" in refused(lambda g: g.conv("image", (8, 4, 3, 3)))


def test_an_input_with_two_grids_is_named() -> None:
    message = refused(lambda g: s8(g, g.node("Add", s8(g, "image", 0.02), s8(g, "image", 0.03)), 0.05))
    assert "input 'image' is rounded to 2 different grids" in message


def test_a_missing_tensorflow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "pip install tensorflow" in refused(lambda g: s8(g, g.conv(s8(g, "image", 0.02), (8, 4, 3, 3)), 0.02))


def test_importing_deployment_imports_no_tensorflow() -> None:
    program = "import sys, crcore.deploy._litert; assert not {'tensorflow', 'ai_edge_litert'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_converting_says_nothing() -> None:
    program = """
        from small_graphs import GraphMaker
        from crcore.deploy._litert import to_litert
        g = GraphMaker({"image": (4, 9, 9)})
        to_litert(g.model(g.signed(g.conv(g.signed("image", 0.02), (8, 4, 3, 3)), 0.02)))
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
