"""Folding and completion of marker graphs: what changes, and what may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import GraphMaker

from crcore import deploy
from crcore.deploy._complete import Grid, subdivided
from crcore.deploy._graph import Graph


def run(model: onnx.ModelProto, sample: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, sample)[0]


def folded(model: onnx.ModelProto, sample: dict[str, Any]) -> onnx.ModelProto:
    return deploy.prepared_graph(model, sample, integer_only=False)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def batch_norm(make: GraphMaker, x: str, channels: int, *, gamma: Any = None) -> str:
    random = make.random
    gamma = random.normal(0, 1, channels) if gamma is None else np.broadcast_to(gamma, channels)
    parts = [gamma, random.normal(0, 0.3, channels), random.normal(0, 0.3, channels), random.uniform(0.5, 2, channels)]
    return make.node("BatchNormalization", x, *(make.floats(part) for part in parts), epsilon=1e-3)


def check_same(model: onnx.ModelProto, sample: dict[str, Any], *, without: str) -> onnx.ModelProto:
    """Folded, it has no such operator, the same integers, and computes the same."""
    found = folded(model, sample)
    assert without in operators(model)
    assert without not in operators(found)
    before, after = deploy.codes_by_layer(model), deploy.codes_by_layer(found)
    assert before.keys() == after.keys()
    for layer, codes in before.items():
        assert np.array_equal(codes, after[layer]), layer
    expected, values = (run(deploy.expanded(each), sample) for each in (model, found))
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("scale", [0.01, "per channel"])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_behind_a_convolution_goes_into_its_scales_and_bias(scale, bias):
    make = GraphMaker({"x": (3, 8, 8)})
    scale = make.scales(6) if scale == "per channel" else scale
    x = make.quantized("x", 0.02)
    y = make.conv(x, (6, 3, 3, 3), scale=scale, bias=bias, pads=[1, 1, 1, 1])
    found = check_same(make.model(batch_norm(make, y, 6)), make.sample(), without="BatchNormalization")
    weight = next(node for node in Graph(found).nodes if node.is_weight)
    assert (Graph(found).constants[weight.inputs[1]] < 0).any()  # a negative gamma: the sign goes into the scale


def test_batch_norm_behind_a_matrix_product_is_folded():
    make = GraphMaker({"x": (10,)})
    y = make.gemm(make.quantized("x", 0.02), 10, 6)
    check_same(make.model(batch_norm(make, y, 6)), make.sample(), without="BatchNormalization")


def test_batch_norm_behind_a_float_convolution_is_folded():
    make = GraphMaker({"x": (3, 6, 6)})
    y = make.node("Conv", "x", make.floats(make.random.normal(0, 1, (4, 3, 3, 3))))
    y = make.conv(make.signed(batch_norm(make, y, 4), 0.05), (5, 4, 1, 1))
    check_same(make.model(y), make.sample(), without="BatchNormalization")


def test_batch_norm_with_nothing_to_fold_it_into_is_a_product_and_a_sum():
    make = GraphMaker({"x": (3, 6, 6)})
    y = make.conv(make.signed(batch_norm(make, "x", 3), 0.05), (5, 3, 1, 1))
    found = check_same(make.model(y), make.sample(), without="BatchNormalization")
    assert {"Mul", "Add"} <= set(operators(found))


def test_a_convolution_that_something_else_reads_too_keeps_its_scale():
    make = GraphMaker({"x": (3, 6, 6)})
    y = make.conv(make.signed("x", 0.05), (5, 3, 1, 1))
    model = make.model(make.node("Add", batch_norm(make, y, 5), y))
    check_same(model, make.sample(), without="BatchNormalization")


def test_a_weight_of_two_layers_gets_two_scales():
    make = GraphMaker({"x": (4, 6, 6)})
    weight = make.weight(make.codes(4, 4, 1, 1), make.scales(4), axis=0)
    y = batch_norm(make, make.node("Conv", make.signed("x", 0.05), weight), 4)
    y = batch_norm(make, make.node("Conv", make.signed(y, 0.05), weight), 4)
    check_same(make.model(y), make.sample(), without="BatchNormalization")


def test_a_transposed_weight_is_transposed_as_integers():
    make = GraphMaker({"x": (5, 10)})
    weight = make.weight(make.codes(6, 10), make.scales(6), axis=0)
    y = make.node("MatMul", make.signed("x", 0.02), make.node("Transpose", weight, perm=[1, 0]))
    sample = make.sample()
    model = make.model(y)
    found = folded(model, sample)
    assert "Transpose" not in operators(found)
    assert np.array_equal(deploy.codes_by_layer(found)["layer"], deploy.codes_by_layer(model)["layer"].T)
    np.testing.assert_allclose(run(deploy.expanded(found), sample), run(deploy.expanded(model), sample), rtol=1e-5)


@pytest.mark.parametrize("quantized", [True, False])
def test_zeros_around_an_image_become_the_convolutions_own(quantized):
    make = GraphMaker({"x": (3, 7, 7)})
    pads = make.constant(np.array([0, 0, 1, 0, 0, 0, 2, 1], np.int64))
    x = make.node("Pad", make.node("Relu", "x"), pads)
    x = make.quantized(x, 0.02) if quantized else x
    model = make.model(make.conv(x, (4, 3, 3, 3), strides=[2, 2], pads=[1, 0, 0, 0]))
    found = check_same(model, make.sample(), without="Pad")
    conv = next(node for node in Graph(found).nodes if node.op == "Conv")
    assert conv.attributes["pads"] == [2, 0, 2, 1]


def test_other_values_around_an_image_stay():
    make = GraphMaker({"x": (3, 7, 7)})
    pads = make.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    x = make.quantized(make.node("Pad", "x", pads, make.floats(0.5)), 0.02)
    assert "Pad" in operators(folded(make.model(make.conv(x, (4, 3, 3, 3))), make.sample()))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_height_and_width_is_a_pooling(keepdims):
    make = GraphMaker({"x": (3, 5, 5)})
    x = make.conv(make.signed("x", 0.05), (4, 3, 1, 1))
    y = make.node("ReduceMean", x, make.constant(np.array([-1, -2], np.int64)), keepdims=keepdims)
    model = make.model(y)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["N", 4, 5, 5]))
    found = check_same(model, make.sample(), without="ReduceMean")
    assert "GlobalAveragePool" in operators(found)


# Completion


def residual_block(make: GraphMaker, *, bits: int = 8) -> str:
    """Two convolutions, a shortcut, a pooled classifier; quantized as training does it."""
    hi = 2**bits - 1
    x = make.node("Relu", make.conv(make.signed("x", 0.03, layer="stem"), (8, 3, 3, 3), layer="stem", pads=[1] * 4))
    y = make.conv(make.quantized(x, 4 / hi, hi=hi, layer="one"), (8, 8, 3, 3), layer="one", pads=[1] * 4)
    y = make.quantized(make.node("Relu", y), 3 / hi, hi=hi, layer="two")
    y = make.conv(y, (8, 8, 3, 3), layer="two", pads=[1] * 4, bits=bits)
    y = make.node("Relu", make.node("Add", y, x))
    y = make.node("Flatten", make.node("GlobalAveragePool", y))
    return make.gemm(make.quantized(y, 0.02, layer="classifier"), 8, 5, layer="classifier")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_tensor_between_integer_operators_gets_a_grid_and_trained_grids_stay(bits):
    make = GraphMaker({"x": (3, 8, 8)})
    model, sample = make.model(residual_block(make, bits=bits)), make.sample(8)
    found = deploy.prepared_graph(model, sample, integer_only=True)
    before, after = ({n.attributes["layer"]: n for n in g.nodes if n.is_quantizer} for g in map(Graph, (model, found)))
    assert before.keys() <= after.keys()
    for layer, node in before.items():
        assert after[layer].attributes == node.attributes
        assert [Graph(model).constants[name] for name in node.inputs[1:]] == [
            Graph(found).constants[name] for name in after[layer].inputs[1:]
        ]
    graph = Graph(found)
    makers, readers = graph.makers(), graph.readers()
    for node in graph.nodes:
        if node.op in ("Add", "GlobalAveragePool"):
            assert all(makers[name].is_quantizer for name in node.inputs), node.op
        if node.op in ("Conv", "Add", "GlobalAveragePool"):
            after_activation = readers[node.output]
            if after_activation[0].op == "Relu":
                after_activation = readers[after_activation[0].output]
            assert [reader.is_quantizer for reader in after_activation] == [True], node.op
    expected, values = (run(deploy.expanded(each), sample) for each in (model, found))
    step = np.ptp(expected) / 255
    assert 0 < np.abs(values - expected).max() < 8 * step


def test_a_sum_that_a_float_operator_reads_stays_in_float():
    make = GraphMaker({"x": (3, 8, 8)})
    y = make.conv(make.signed("x", 0.03), (4, 3, 3, 3), layer="a")
    y = make.node("Add", y, make.conv(make.signed("x", 0.04), (4, 3, 3, 3), layer="b"))
    y = make.gemm(make.signed(make.node("Flatten", make.node("Erf", y)), 0.02), 144, 3, layer="c")
    model, sample = make.model(y), make.sample()
    found = deploy.prepared_graph(model, sample, integer_only=True)
    assert operators(found).count("FakeQuantize") == 3
    np.testing.assert_array_equal(run(deploy.expanded(found), sample), run(deploy.expanded(model), sample))


def test_outputs_get_a_grid_only_where_asked_for():
    make = GraphMaker({"x": (10,)})
    model, sample = make.model(make.gemm(make.signed("x", 0.03), 10, 4)), make.sample()
    without, with_grid = (deploy.prepared_graph(model, sample, entire=entire) for entire in (False, True))
    assert operators(without)[-1] == "Gemm"
    assert operators(with_grid)[-1] == "FakeQuantize"
    assert [v.name for v in with_grid.graph.output] == [v.name for v in model.graph.output]


def test_a_channel_that_batch_norm_switched_off_keeps_its_bias():
    make = GraphMaker({"x": (3, 8, 8)})
    gamma = np.array([1.0, 0.0, 1e-30, -1e-12])
    y = batch_norm(make, make.conv(make.signed("x", 0.03), (4, 3, 3, 3)), 4, gamma=gamma)
    y = make.gemm(make.signed(make.node("Flatten", y), 0.02), 144, 3, layer="dense")
    model, sample = make.model(y), make.sample()
    found = deploy.prepared_graph(model, sample, integer_only=True)
    file, _ = deploy.to_onnx(found)
    bias = {name: value for name, value in Graph(file).constants.items() if name.endswith(".bias.codes")}
    assert all(np.abs(value.astype(np.int64)).max() < 2**31 - 1 for value in bias.values())
    expected = run(deploy.expanded(model), sample)
    np.testing.assert_allclose(run(file, sample), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize(("step", "divided_by"), [(1 / 110, 1), (1 / 40, 3), (1 / 70, None)])
def test_a_sum_divides_the_steps_of_a_trained_grid_where_that_is_not_much_coarser_than_its_range(step, divided_by):
    make = GraphMaker({"x": (4, 6, 6)})
    y = make.conv(make.signed("x", 0.01, layer="a"), (4, 4, 1, 1), layer="a", scale=1e-6, bias=False)
    total = make.node("Add", "x", y)  # from -1 to 1, next to nothing being added
    last = make.conv(make.signed(total, step, layer="b"), (4, 4, 1, 1), layer="b")
    model = make.model(make.node("Add", last, total, name="end"))
    graph = Graph(deploy.prepared_graph(model, {"x": np.linspace(-1, 1, 288, dtype=np.float32).reshape(2, 4, 6, 6)}))
    (maker,) = (node for node in graph.nodes if node.output == total)
    (reader,) = graph.readers()[maker.output]
    expected = 2 / 255 if divided_by is None else step / divided_by
    np.testing.assert_allclose(graph.constants[reader.inputs[1]], expected, rtol=1e-2)


def test_a_pad_with_a_value_counts_in_the_range():
    make = GraphMaker({"x": (3, 6, 6)})
    y = make.node("Relu", make.conv(make.signed("x", 0.03, layer="a"), (3, 3, 1, 1), layer="a"))
    pads = make.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    y = make.node("Add", make.node("Pad", y, pads, make.floats(20.0)), make.node("Pad", y, pads, make.floats(20.0)))
    y = make.conv(make.quantized(y, 0.2, layer="b"), (2, 3, 1, 1), layer="b")
    model, sample = make.model(y), make.sample()
    expected, found = (
        run(deploy.expanded(each), sample) for each in (model, deploy.prepared_graph(model, sample, integer_only=True))
    )
    assert np.abs(found - expected).max() < 0.03 * np.ptp(expected)


def test_a_binary_grid_behind_a_pooling_sees_the_signs_that_training_saw():
    make = GraphMaker({"x": (3, 6, 6)})
    y = make.conv(make.signed("x", 0.03, layer="a"), (3, 3, 1, 1), layer="a")
    pooled = make.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = make.quantized(pooled, 500.0, lo=-1, hi=1, layer="b", binary=1)
    model, sample = make.model(make.conv(y, (2, 3, 1, 1), layer="b")), make.sample(16)
    expected, found = (
        run(deploy.expanded(each), sample) for each in (model, deploy.prepared_graph(model, sample, integer_only=True))
    )
    assert (np.abs(found - expected) > 1e-5 * np.ptp(expected)).mean() < 0.15  # only what is next to zero


def test_a_grid_without_a_zero_is_not_subdivided():
    assert subdivided(Grid(np.float32(1), -200, 0, 15), None) is None


def test_a_sample_on_which_the_network_overflows_is_refused():
    make = GraphMaker({"x": (10,)})
    model = make.model(make.gemm(make.signed("x", 0.03), 10, 4))
    with pytest.raises(deploy.CRCoreError, match="NaN or infinity on the sample"):
        deploy.prepared_graph(model, {"x": np.full((2, 10), np.nan, np.float32)}, entire=True)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    bits = draw(st.integers(1, 8))
    lo = draw(st.sampled_from([0, -(2 ** (bits - 1))])) if bits > 1 else 0
    hi = lo + 2**bits - 1
    return Grid(np.float32(draw(st.floats(2.0**-7, 4.0, width=32))), draw(st.integers(lo, hi)), lo, hi)


@given(trained=grids(), data=st.data())
def test_rounding_to_a_subdivided_grid_and_then_to_the_trained_one_is_rounding_once(trained, data):
    reach = data.draw(st.none() | st.floats(0.0, 3.0))
    width = (trained.hi - trained.lo) * float(trained.scale)
    needed = None if reach is None else (trained.low * reach, trained.low * reach + width * reach)
    finer = subdivided(trained, needed)
    if finer is None:
        assert reach is not None
        assert reach > 0.9
        return
    assert finer.hi - finer.lo == 255
    low, high = (trained.low, trained.high) if needed is None else needed
    half = 0.5 * float(finer.scale) * (1 + 1e-5)
    assert finer.low - half <= min(low, 0)
    assert max(high, 0) <= finer.high + half
    # Eighths of the finer steps, ties of the trained grid among them, within what the finer grid holds and beyond.
    steps = data.draw(st.lists(st.integers(-3000, 3000), min_size=1, max_size=40))
    x = np.array([*steps, -3000, 3000, 0], np.float64) / 8 * float(finer.scale)
    x = np.clip(x, finer.low, finer.high) if needed is not None else x

    def rounded(grid: Grid, values: Any) -> Any:
        codes = np.clip(np.round(values / float(grid.scale)) + grid.zero_point, grid.lo, grid.hi)
        return (codes - grid.zero_point) * float(grid.scale)

    once, twice = rounded(trained, x), rounded(trained, rounded(finer, x))
    # A tie of the trained grid is the middle of a finer step, which may round to either side: as ties may.
    position = x / float(trained.scale)
    tie = np.abs(position - np.floor(position) - 0.5) < 1e-4
    np.testing.assert_allclose(twice[~tie], once[~tie], atol=1e-5 * float(trained.scale))
