"""QDQ files: what is stored, what ONNX Runtime makes of it, and that it computes what was trained."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from small_graphs import GraphMaker
from test_folding import batch_norm, residual_block, run

from crcore import deploy

INTEGER_KERNELS = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "MatMulIntegerToFloat"}


def optimized(model: onnx.ModelProto, tmp_path: Any) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def stored(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain == "")


def one_layer(make: GraphMaker, *, lo: int, hi: int, zero_point: int = 0) -> onnx.ModelProto:
    """A convolution whose codes have both ends of their grid, a rounding behind it, and a classifier."""
    codes = make.random.integers(lo, hi + 1, (4, 3, 3, 3))
    codes.flat[:2] = lo, hi
    kind = np.int8 if lo >= -128 and hi < 128 else np.uint8 if lo >= 0 and hi < 256 else np.int32
    scale = make.scales(4, 0.5 / max(hi, -lo))
    weight = make.weight(codes.astype(kind), scale, zero_point=zero_point, axis=0, limits=(lo, hi), layer="conv")
    y = make.node("Conv", make.signed("x", 0.03, layer="conv"), weight, make.floats(make.random.normal(0, 1, 4)))
    y = make.quantized(make.node("Relu", y), 0.02, layer="dense")
    return make.model(make.gemm(make.node("Flatten", y), 144, 5, layer="dense"))


WIDTHS = {
    "1 bit": (-1, 1, TensorProto.INT2, 25),
    "2 bits": (-2, 1, TensorProto.INT2, 25),
    "2 bits unsigned": (0, 3, TensorProto.UINT2, 25),
    "3 bits": (-4, 3, TensorProto.INT4, 21),
    "4 bits": (-8, 7, TensorProto.INT4, 21),
    "4 bits unsigned": (0, 15, TensorProto.UINT4, 21),
    "5 bits": (-16, 15, TensorProto.INT8, 20),
    "8 bits": (-128, 127, TensorProto.INT8, 20),
    "8 bits unsigned": (0, 255, TensorProto.UINT8, 20),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_stored_in_the_narrowest_type_and_convolve_on_an_integer_kernel(width, tmp_path):
    lo, hi, kind, opset = WIDTHS[width]
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = one_layer(make, lo=lo, hi=hi), make.sample(16)
    file, notices = deploy.to_onnx(deploy.prepared_graph(model, sample))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(file), full_check=True)
    tensor = stored(file)["conv.codes"]
    assert (tensor.data_type, opset_of(file), notices) == (kind, opset, ())
    assert np.array_equal(numpy_helper.to_array(tensor).astype(int), deploy.codes_by_layer(model)["conv"])
    assert optimized(file, tmp_path)["QLinearConv"] == 1
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)


@pytest.mark.parametrize(("opset", "kind"), [(20, TensorProto.INT8), (21, TensorProto.INT4), (14, TensorProto.INT8)])
def test_an_older_opset_stores_the_same_integers_in_a_wider_type_and_says_so(opset, kind, tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = one_layer(make, lo=-2, hi=1), make.sample(16)
    file, notices = deploy.to_onnx(deploy.prepared_graph(model, sample), opset=opset)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(file), full_check=True)
    assert (stored(file)["conv.codes"].data_type, opset_of(file)) == (kind, opset)
    (notice,) = notices
    assert f"opset {opset} has no type as narrow as the weights of 1 layer (conv)" in notice
    assert "opset=25 packs them" in notice
    packed, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    np.testing.assert_array_equal(run(file, sample), run(packed, sample))
    assert optimized(file, tmp_path)["QLinearConv"] == 1


@pytest.mark.parametrize("opset", [13, 26, 21.0, True, "20"])
def test_an_opset_that_is_not_supported_is_named(opset):
    make = GraphMaker({"x": (3, 8, 8)})
    prepared = deploy.prepared_graph(one_layer(make, lo=-2, hi=1), make.sample())
    with pytest.raises(deploy.CRCoreError, match=r"opset must be a whole number from 14 to 25, got .*; 25 suits"):
        deploy.to_onnx(prepared, opset=opset)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_residual_network_runs_on_integer_kernels_from_end_to_end(bits, tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = make.model(residual_block(make, bits=bits)), make.sample(16)
    prepared = deploy.prepared_graph(model, sample)
    file, _ = deploy.to_onnx(prepared)
    operators = optimized(file, tmp_path)
    assert {name: operators[name] for name in INTEGER_KERNELS} == {
        "QLinearConv": 3,
        "QLinearAdd": 2,  # the sum, and its change from the finer grid to the trained one
        "QLinearGlobalAveragePool": 1,
        "MatMulIntegerToFloat": 1,
    }
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (1, 0)
    assert not {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "GlobalAveragePool"} & set(operators)
    expected, found = run(deploy.expanded(prepared), sample), run(file, sample)
    assert np.abs(found - expected).max() < 3 * np.ptp(expected) / 255


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_in_float_the_file_computes_exactly_what_was_trained(bits, tmp_path):
    """Also where ONNX Runtime would round a bias that it finds beside integers."""
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = make.model(residual_block(make, bits=bits)), make.sample(16)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample, integer_only=False), integer_only=False)
    assert optimized(file, tmp_path)["QLinearConv"] == 0
    np.testing.assert_allclose(run(file, sample), run(deploy.expanded(model), sample), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_the_rounded_bias_of_a_low_bit_convolution_moves_next_to_no_code(negative):
    """4-bit weights on 4-bit data have an accumulator with coarse steps: a bias rounded to them would move many."""
    make = GraphMaker({"x": (8, 16, 16)})
    scale = make.scales(16, 0.2) * np.where(np.arange(16) % 3 == 0, -1, 1) if negative else make.scales(16, 0.2)
    x = make.quantized("x", 0.1, hi=15, layer="conv")
    y = make.node("Relu", make.conv(x, (16, 8, 1, 1), bits=4, scale=scale, layer="conv"))
    y = make.quantized(y, 0.05, hi=15, layer="next")
    model, sample = make.model(make.conv(y, (4, 16, 1, 1), layer="next")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    file.graph.output.append(onnx.helper.make_tensor_value_info("next.input_codes", TensorProto.UINT8, None))
    expanded = deploy.expanded(model)
    expanded.graph.output.append(onnx.helper.make_tensor_value_info(f"{y}.codes", TensorProto.FLOAT, None))
    sessions = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        for m in (file, expanded)
    ]
    codes, expected = (session.run(None, sample)[1].astype(int) for session in sessions)
    assert set(np.unique(expected)) == set(range(16))
    assert np.abs(codes - expected).max() <= 1
    assert (codes != expected).mean() < 0.004


def test_relu6_becomes_an_end_of_the_grid(tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    y = make.conv(make.signed("x", 0.03, layer="a"), (4, 3, 3, 3), layer="a", scale=0.05)
    y = make.quantized(make.node("Clip", y, make.floats(0.0), make.floats(6.0)), 8 / 255, layer="b")
    y = make.quantized(make.node("Relu", make.conv(y, (4, 4, 3, 3), layer="b")), 0.05, layer="c")
    model, sample = make.model(make.conv(y, (2, 4, 1, 1), layer="c")), make.sample(16)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    assert optimized(file, tmp_path)["QLinearConv"] == 2
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)


@pytest.mark.parametrize("integer_only", [True, False])
def test_an_offset_grid_keeps_its_zero_point(integer_only, tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    x = make.quantized("x", 0.02, zero_point=113, layer="conv")
    y = make.quantized(make.conv(x, (4, 3, 3, 3), layer="conv", pads=[1] * 4), 0.02, zero_point=90, layer="next")
    model, sample = make.model(make.conv(y, (2, 4, 1, 1), layer="next")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample, integer_only=integer_only), integer_only=integer_only)
    assert int(numpy_helper.to_array(stored(file)["conv.input_zero_point"])) == 113
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < (0.02 if integer_only else 1e-5) * np.ptp(expected)


@pytest.mark.parametrize("integer_only", [True, False])
def test_weights_with_a_zero_point(integer_only):
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = one_layer(make, lo=0, hi=255, zero_point=97), make.sample(16)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample, integer_only=integer_only), integer_only=integer_only)
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < (0.02 if integer_only else 1e-5) * np.ptp(expected)


def test_grids_of_more_than_8_bits_and_of_one_sign_bit():
    make = GraphMaker({"x": (3, 8, 8)})
    x = make.quantized("x", 0.001, lo=-2048, hi=2047, layer="a")
    weight = make.weight(make.random.integers(-2048, 2048, (4, 3, 3, 3)).astype(np.int16), 1e-4, limits=(-2048, 2047))
    y = make.node("Conv", x, weight)
    y = make.quantized(y, 0.5, lo=-1, hi=1, layer="b", binary=1)
    model, sample = make.model(make.conv(y, (2, 4, 1, 1), layer="b")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    assert opset_of(file) == 21
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(file), full_check=True)
    np.testing.assert_allclose(run(file, sample), run(deploy.expanded(model), sample), rtol=1e-5, atol=1e-6)
    with pytest.raises(deploy.CRCoreError, match=r"opset 20 has no integers of 16 bits, .* of 1 layer \(layer\) take"):
        deploy.to_onnx(deploy.prepared_graph(model, sample), opset=20)


def test_a_convolution_of_9_bit_weights_between_8_bit_grids_runs():
    """DoReFa of 8 bits is one; without a bias, ONNX Runtime once took it for one of its integer kernels."""
    make = GraphMaker({"x": (3, 8, 8)})
    codes = make.random.integers(-255, 256, (4, 3, 3, 3)).astype(np.int16)
    y = make.node("Conv", make.signed("x", 0.02, layer="a"), make.weight(codes, 1e-3, layer="a", limits=(-255, 255)))
    model, sample = make.model(make.conv(make.quantized(y, 0.01, layer="b"), (2, 4, 1, 1), layer="b")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    np.testing.assert_allclose(run(file, sample), run(deploy.expanded(model), sample), rtol=1e-5, atol=1e-6)


def test_a_bias_of_a_switched_off_channel_fits_the_accumulator_where_steps_are_made_finer():
    make = GraphMaker({"x": (3, 8, 8)})
    x = make.signed("x", 0.03, layer="a")
    codes, scale = make.codes(4, 3, 3, 3, bits=4), np.array([0.01, 1e-12, 0.02, 1e-30], np.float32)
    weight = make.weight(codes, scale, axis=0, limits=(-7, 7), layer="a")
    y = make.node("Relu", make.node("Conv", x, weight, make.floats([0.1, 2, 0.2, 1.5])))
    y = make.quantized(y, 0.02, layer="b")
    model, sample = make.model(make.conv(y, (2, 4, 1, 1), layer="b")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)


def test_weights_of_few_bits_keep_a_bias_in_fine_steps_beside_a_zero_point():
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = one_layer(make, lo=0, hi=7, zero_point=3), make.sample(16)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    factor, zero_point = (numpy_helper.to_array(stored(file)[f"conv.{name}"]) for name in ("finer", "zero_point"))
    assert factor > 1
    assert (zero_point == 3 * factor).all()
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)


def test_pairs_of_products_fit_16_bits():
    """In which x86 CPUs without VNNI add them."""
    make = GraphMaker({"x": (3, 8, 8)})
    file, _ = deploy.to_onnx(deploy.prepared_graph(one_layer(make, lo=-2, hi=1), make.sample(16)))
    factor = int(numpy_helper.to_array(stored(file)["conv.finer"]))
    assert factor > 1
    assert 2 * 255 * 2 * factor < 2**15


def test_a_weight_of_two_convolutions_with_too_coarse_accumulators():
    make = GraphMaker({"x": (3, 8, 8)})
    weight = make.weight(make.codes(3, 3, 1, 1), np.array([200.0, 0.01, 0.01]), axis=0, layer="both")
    x = make.node("Mul", "x", make.floats(1e-3))
    for layer in ("a", "b"):
        y = make.node("Conv", make.signed(x, 0.02, layer=layer), weight, make.floats([0.1, 0.2, 0.3]))
        x = make.node("Relu", y)
    y = make.conv(make.quantized(x, 0.02, layer="c"), (2, 3, 1, 1), layer="c")
    model, sample = make.model(y), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    assert np.isfinite(run(file, sample)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_in_float_no_convolution_runs_on_an_integer_kernel(bias, tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    y = make.quantized(make.conv(make.signed("x", 0.03), (4, 3, 3, 3), bias=bias), 0.02, layer="next")
    model, sample = make.model(make.conv(y, (2, 4, 1, 1), layer="next", bias=bias)), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample, integer_only=False), integer_only=False)
    assert optimized(file, tmp_path)["QLinearConv"] == 0


def test_a_signed_grid_behind_a_relu_is_the_trained_one(tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    y = make.node("Relu", make.conv(make.signed("x", 0.03, layer="a"), (4, 3, 3, 3), layer="a"))
    model, sample = make.model(make.conv(make.signed(y, 0.02, layer="b"), (2, 4, 1, 1), layer="b")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    assert optimized(file, tmp_path)["Clip"] == 1  # at 127; below zero the type ends
    (tmp_path / "net.onnx").write_bytes(file.SerializeToString())
    traced = deploy.Traced(model, sample, run(deploy.expanded(model), sample))
    assert deploy.verify(tmp_path / "net.onnx", traced).differing_layers == ()


def test_nodes_stand_in_the_order_in_which_they_compute():
    """Also where a trained grid serves readers that came before it."""
    make = GraphMaker({"x": (3, 8, 8)})
    pooled = make.node("AveragePool", "x", kernel_shape=[3, 3], pads=[1] * 4)
    y = make.conv(make.signed("x", 0.04, layer="a"), (3, 3, 1, 1), layer="a")
    y = make.node("Concat", pooled, y, axis=1)
    model = make.model(make.conv(make.signed(y, 0.02, layer="b"), (2, 6, 1, 1), layer="b"))
    sample = make.sample(8)
    for prepared in (deploy.prepared_graph(model, sample), deploy.prepared_graph(model, sample, entire=True)):
        file, _ = deploy.to_onnx(prepared)
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(file), full_check=True)


def test_a_grouped_transposed_convolution_with_a_scale_per_channel():
    make = GraphMaker({"x": (4, 8, 8)})
    weight = make.weight(make.codes(4, 2, 3, 3), make.scales(2), axis=1, layer="up")
    x, bias = make.signed("x", 0.03, layer="up"), make.floats([0.1, 0.2, 0.3, 0.4])
    y = make.node("ConvTranspose", x, weight, bias, group=2)
    model, sample = make.model(make.conv(make.quantized(y, 0.02, layer="b"), (2, 4, 1, 1), layer="b")), make.sample(8)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)


def test_the_float_twin_rounds_nothing():
    make = GraphMaker({"x": (3, 8, 8)})
    y = batch_norm(make, make.conv(make.signed("x", 0.5, bits=2), (4, 3, 3, 3)), 4)
    model, sample = make.model(y), make.sample(8)
    twin = deploy.float_twin(model)
    assert {node.op_type for node in twin.graph.node} == {"Conv", "BatchNormalization"}
    scaled = {"x": 3 * sample["x"]}
    at_zero = run(twin, {"x": 0 * sample["x"]})
    np.testing.assert_allclose(run(twin, scaled) - at_zero, 3 * (run(twin, sample) - at_zero), rtol=1e-4, atol=1e-4)


def test_a_convolution_whose_accumulator_is_too_coarse_for_its_bias_stays_in_float(tmp_path):
    make = GraphMaker({"x": (3, 8, 8)})
    scale = np.array([0.005, 200.0, 0.004, 0.003], np.float32)
    codes = make.codes(4, 3, 1, 1)
    codes[1] = [[[1]], [[0]], [[0]]]
    x = make.node("Mul", "x", make.floats(np.array([0, 1, 1]).reshape(1, 3, 1, 1)))  # what that channel reads is zero
    weight = make.weight(codes, scale, axis=0, limits=(-127, 127), layer="coarse")
    y = make.node("Conv", make.signed(x, 0.02, layer="coarse"), weight, make.floats([0.1, 0.5, -0.2, 0.3]))
    y = make.conv(make.quantized(make.node("Relu", y), 0.01, layer="fine"), (4, 4, 3, 3), layer="fine")
    y = make.signed(make.node("Flatten", make.node("Relu", y)), 0.02, layer="head")
    model, sample = make.model(make.gemm(y, 144, 5, layer="head")), make.sample(16)
    file, _ = deploy.to_onnx(deploy.prepared_graph(model, sample))
    operators = optimized(file, tmp_path)
    assert (operators["QLinearConv"], operators["Conv"] + operators["FusedConv"]) == (1, 1)
    expected, found = run(deploy.expanded(model), sample), run(file, sample)
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)
