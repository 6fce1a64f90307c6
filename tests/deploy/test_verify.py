"""A file that is not what was trained is noticed, and the layer is named in which it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import numpy_helper
from small_graphs import GraphMaker

from crcore import CRCoreError
from crcore.deploy import Traced, codes_by_layer, expanded, float_twin, prepared_graph, to_onnx
from crcore.deploy._litert import to_litert
from crcore.deploy._litert_file import _read, _written
from crcore.deploy._loading import onnx_session
from crcore.deploy._verify import Verification, verify

LAYERS = ("stem", "mid", "late", "classifier")


@dataclass(frozen=True)
class Exported:
    """A small network: its graph, files of it, and what it computes on a sample."""

    graph: onnx.ModelProto
    sample: dict[str, Any]
    expected: Any
    folder: Path

    def verified(self, path: Path, *, labels: Any = None, float_path: Path | None = None) -> Verification:
        return verify(path, Traced(self.graph, self.sample, self.expected, labels), float_path=float_path)


def computed(graph: onnx.ModelProto, sample: dict[str, Any]) -> Any:
    return onnx_session(Path("net"), expanded(graph).SerializeToString()).run(None, sample)[0]


def _centre(graph: onnx.ModelProto, outputs: Any) -> None:
    """Choose the last bias so that every class is named now and then."""
    (bias,) = [node.input[2] for node in graph.graph.node if node.op_type == "Gemm"]
    (tensor,) = [tensor for tensor in graph.graph.initializer if tensor.name == bias]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) - outputs.mean(axis=0), bias))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    make = GraphMaker({"image": (3, 8, 8)})
    x = make.signed("image", 0.03, layer="stem")
    x = make.node("Relu", make.conv(x, (6, 3, 3, 3), layer="stem", bits=4, scale=make.scales(6, 0.06), pads=[1] * 4))
    x = make.quantized(x, 0.015, layer="mid")
    x = make.node("Relu", make.conv(x, (6, 6, 3, 3), layer="mid", bits=4, scale=make.scales(6, 0.06), pads=[1] * 4))
    x = make.quantized(x, 0.02, layer="late")
    x = make.node("Relu", make.conv(x, (6, 6, 3, 3), layer="late", bits=4, scale=make.scales(6, 0.06), pads=[1] * 4))
    x = make.node("Flatten", make.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), axis=1)
    x = make.quantized(x, 0.02, layer="classifier")
    graph = make.model(make.gemm(x, 96, 10, layer="classifier", scale=0.01))
    sample = make.sample(1000)
    _centre(graph, computed(graph, sample))
    first, second = np.sort(computed(graph, sample), axis=1)[:, :-3:-1].T
    clear = np.argsort(second - first)[:400]  # a random network is not sure of what it says; a trained one is
    sample = {"image": sample["image"][clear]}
    folder = tmp_path_factory.mktemp("exported")
    (folder / "net.onnx").write_bytes(to_onnx(prepared_graph(graph, sample))[0].SerializeToString())
    (folder / "net.tflite").write_bytes(to_litert(prepared_graph(graph, sample, entire=True)))
    (folder / "float.onnx").write_bytes(float_twin(graph).SerializeToString())
    expected = computed(graph, sample)
    assert len(set(expected.argmax(axis=1).tolist())) == 10, "agreement says nothing of a network with one answer"
    return Exported(graph, sample, expected, folder)


@pytest.mark.parametrize(("file", "runtime"), [("net.onnx", "onnxruntime"), ("net.tflite", "litert")])
def test_a_sound_file_passes(exported: Exported, file: str, runtime: str) -> None:
    labels = exported.expected.argmax(axis=1)
    labels[:100] = (labels[:100] + 1) % 10
    found = exported.verified(exported.folder / file, labels=labels)
    found.check()
    assert (found.runtime, found.samples, found.layers) == (runtime, 400, 4)
    assert found.agreement >= 99.5
    assert found.expected_accuracy == 75.0
    assert abs(found.accuracy - 75.0) <= 0.5
    assert (found.differing_layers, found.first_difference) == ((), None)
    assert 0 < found.max_code_difference <= 8
    assert found.size == (exported.folder / file).stat().st_size
    assert (found.float_size, found.float_latency) == (None, None)
    assert found.latency > 0


def test_size_and_latency_stand_beside_those_of_the_float_twin(exported: Exported) -> None:
    twin = exported.folder / "float.onnx"
    found = exported.verified(exported.folder / "net.onnx", float_path=twin)
    assert found.float_size == twin.stat().st_size
    assert found.float_latency > 0
    table = found.table()
    assert f"{found.size / twin.stat().st_size:.3f}" in table
    assert "of 400 inputs" in table
    assert "accuracy" not in table
    assert json.loads(json.dumps(found.to_dict()))["layers"] == 4


def broken_onnx(exported: Exported, **changes: Callable[[Any], Any]) -> Path:
    """The file with initializers changed; in names, __ stands for a dot."""
    model = onnx.load(exported.folder / "net.onnx")
    left = {name.replace("__", "."): change for name, change in changes.items()}
    for tensor in model.graph.initializer:
        if tensor.name in left:
            changed = left.pop(tensor.name)(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(changed), tensor.name))
    assert not left, f"no such initializers: {left}"
    path = exported.folder / "broken.onnx"
    onnx.save(model, path)
    return path


def classifier_scale(exported: Exported) -> str:
    tensors = onnx.load(exported.folder / "net.onnx").graph.initializer
    (name,) = [tensor.name for tensor in tensors if tensor.name.startswith("classifier.scale")]
    return name


def one_more(codes: Any) -> Any:
    codes.flat[5] += 1 if codes.flat[5] < 0 else -1
    return codes


def exchanged(codes: Any) -> Any:
    """Two weights in each other's place: the same integers in another order."""
    other = int((np.abs(codes.ravel()) != abs(codes.flat[0])).argmax())
    codes.flat[0], codes.flat[other] = codes.flat[other], codes.flat[0]
    return codes


def negated(codes: Any) -> Any:
    """One channel with the other sign, which is no layout of the same integers."""
    return codes * np.where(np.arange(len(codes)) == 0, -1, 1).reshape(-1, *[1] * (codes.ndim - 1)).astype(codes.dtype)


@pytest.mark.parametrize("change", [one_more, exchanged, negated])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_weight_that_is_another_is_named(exported: Exported, layer: str, change: Callable[[Any], Any]) -> None:
    found = exported.verified(broken_onnx(exported, **{f"{layer}__codes": change}))
    assert found.differing_layers == (layer,)
    with pytest.raises(CRCoreError, match=f"1 of 4 layers differ .* first '{layer}'"):
        found.check()


def test_layers_that_are_swapped_are_named(exported: Exported) -> None:
    codes = codes_by_layer(exported.graph)
    file = broken_onnx(
        exported,
        mid__codes=lambda old: codes["late"].astype(old.dtype),
        late__codes=lambda old: codes["mid"].astype(old.dtype),
    )
    found = exported.verified(file)
    assert found.differing_layers == ("mid", "late")
    assert found.first_difference.startswith("the input of layer 'late', which is computed by 'mid'")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_wrong_zero_point_is_named(exported: Exported, layer: str) -> None:
    found = exported.verified(broken_onnx(exported, **{f"{layer}__input_zero_point": lambda old: old + np.uint8(1)}))
    assert found.differing_layers == (layer,)


def test_a_weight_with_another_zero_point_is_named(tmp_path: Path) -> None:
    make = GraphMaker({"image": (3, 8, 8)})
    codes = make.random.integers(0, 16, (6, 3, 3, 3)).astype(np.uint8)
    weight = make.weight(codes, 0.02, zero_point=7, layer="stem", limits=(0, 15))
    graph = make.model(make.node("Flatten", make.node("Conv", make.signed("image", 0.03, layer="stem"), weight)))
    sample = make.sample(16)
    model, _ = to_onnx(prepared_graph(graph, sample))
    onnx.save(model, tmp_path / "net.onnx")
    traced = Traced(graph, sample, computed(graph, sample))
    assert verify(tmp_path / "net.onnx", traced).differing_layers == ()
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "stem.zero_point"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.uint8(1), tensor.name))
    onnx.save(model, tmp_path / "net.onnx")
    assert verify(tmp_path / "net.onnx", traced).differing_layers == ("stem",)


def test_a_grid_that_the_file_does_not_name_is_not_taken_for_the_trained_one(exported: Exported) -> None:
    model = onnx.load(exported.folder / "net.onnx")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["hidden" if name == "mid.input_codes" else name for name in names]
    onnx.save(model, exported.folder / "renamed.onnx")
    assert exported.verified(exported.folder / "renamed.onnx").differing_layers == ("mid",)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_wrong_step_of_an_input_is_named(exported: Exported, layer: str) -> None:
    found = exported.verified(broken_onnx(exported, **{f"{layer}__input_scale": lambda old: old * np.float32(1.001)}))
    assert found.differing_layers == (layer,)


@pytest.mark.parametrize(("layer", "reader"), list(pairwise(LAYERS)))
def test_a_wrong_scale_of_a_weight_is_named(exported: Exported, layer: str, reader: str) -> None:
    found = exported.verified(broken_onnx(exported, **{f"{layer}__scale": lambda old: old[::-1] * np.float32(2)}))
    assert found.differing_layers == ()
    with pytest.raises(CRCoreError, match=f"the input of layer '{reader}', which is computed by '{layer}': its codes"):
        found.check()


def test_a_wrong_scale_in_the_last_layer_is_named(exported: Exported) -> None:
    found = exported.verified(broken_onnx(exported, **{classifier_scale(exported): lambda old: -old}))
    with pytest.raises(CRCoreError, match="the output, which is computed by 'classifier'"):
        found.check()


def broken_litert(exported: Exported, change: Callable[[Any, Any], None]) -> Path:
    model = _read((exported.folder / "net.tflite").read_bytes())
    change(model, model.subgraphs[0])
    path = exported.folder / "broken.tflite"
    path.write_bytes(_written(model))
    return path


def weight_of(model: Any, graph: Any, layer: int) -> tuple[Any, Any]:
    """The operator of a layer, and the tensor of its weight."""
    found = [
        (operator, graph.tensors[operator.inputs[1]])
        for operator in graph.operators
        if len(operator.inputs) == 3 and graph.tensors[operator.inputs[1]].type == schema.TensorType.INT8
    ]
    return found[layer]


@pytest.mark.parametrize("change_codes", [one_more, exchanged])
@pytest.mark.parametrize(("number", "layer"), [(0, "stem"), (1, "mid"), (2, "late"), (-1, "classifier")])
def test_a_weight_that_is_another_is_named_in_litert(
    exported: Exported, number: int, layer: str, change_codes: Callable[[Any], Any]
) -> None:
    def change(model: Any, graph: Any) -> None:
        buffer = model.buffers[weight_of(model, graph, number)[1].buffer]
        buffer.data = change_codes(np.array(buffer.data).view(np.int8)).view(np.uint8)

    assert exported.verified(broken_litert(exported, change)).differing_layers == (layer,)


def test_a_wrong_step_of_an_input_is_named_in_litert(exported: Exported) -> None:
    def change(model: Any, graph: Any) -> None:
        grid = graph.tensors[weight_of(model, graph, 2)[0].inputs[0]].quantization
        grid.scale = grid.scale * np.float32(1.001)

    assert exported.verified(broken_litert(exported, change)).differing_layers == ("late",)


def test_a_wrong_scale_of_a_weight_is_named_in_litert(exported: Exported) -> None:
    def change(model: Any, graph: Any) -> None:
        operator, weight = weight_of(model, graph, 1)
        weight.quantization.scale = weight.quantization.scale[::-1] * np.float32(2)
        graph.tensors[operator.inputs[2]].quantization.scale = (
            weight.quantization.scale * graph.tensors[operator.inputs[0]].quantization.scale
        )

    found = exported.verified(broken_litert(exported, change))
    with pytest.raises(CRCoreError, match="the input of layer 'late', which is computed by 'mid': its codes"):
        found.check()


def test_layers_that_are_swapped_are_noticed_in_litert(exported: Exported) -> None:
    def change(model: Any, graph: Any) -> None:
        (mid, _), (late, _) = (weight_of(model, graph, number) for number in (1, 2))
        a, b = mid.inputs, late.inputs
        mid.inputs, late.inputs = (np.array([x, w, bias], np.int32) for x, w, bias in ((a[0], *b[1:]), (b[0], *a[1:])))

    found = exported.verified(broken_litert(exported, change))
    with pytest.raises(CRCoreError, match="'mid'"):
        found.check()


def test_images_with_as_many_channels_as_pixels_are_compared_in_litert_layout(tmp_path: Path) -> None:
    make = GraphMaker({"x": (8, 8, 8)})
    y = make.node("Relu", make.conv(make.signed("x", 0.03, layer="a"), (8, 8, 1, 1), layer="a"))
    y = make.node("Flatten", make.conv(make.quantized(y, 0.02, layer="b"), (8, 8, 1, 1), layer="b"))
    graph, sample = make.model(y), make.sample(32)
    (tmp_path / "net.tflite").write_bytes(to_litert(prepared_graph(graph, sample, entire=True)))
    found = verify(tmp_path / "net.tflite", Traced(graph, sample, computed(graph, sample)))
    assert found.first_difference is None or "the output" in found.first_difference


def test_an_output_of_one_value_is_compared_as_a_value(tmp_path: Path) -> None:
    make = GraphMaker({"x": (16,)})
    graph, sample = make.model(make.gemm(make.signed("x", 0.03, layer="only"), 16, 1, layer="only")), make.sample(200)
    traced = Traced(graph, sample, computed(graph, sample))
    model, _ = to_onnx(prepared_graph(graph, sample))
    onnx.save(model, tmp_path / "net.onnx")
    found = verify(tmp_path / "net.onnx", traced)
    found.check()
    assert "same value" in found.table()
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("only.scale")]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(CRCoreError, match="on the value of"):
        verify(tmp_path / "net.onnx", traced).check()
    with pytest.raises(CRCoreError, match="the network's output is one value; leave labels out"):
        Traced(graph, sample, traced.expected, np.zeros(200, int))


def test_the_class_is_looked_for_along_the_given_axis(tmp_path: Path) -> None:
    make = GraphMaker({"x": (3, 8, 8)})
    graph, sample = make.model(make.conv(make.signed("x", 0.03), (4, 3, 1, 1))), make.sample(50)
    expected = computed(graph, sample)
    onnx.save(to_onnx(prepared_graph(graph, sample, integer_only=False), integer_only=False)[0], tmp_path / "net.onnx")
    labels = expected.argmax(axis=1)
    found = verify(tmp_path / "net.onnx", Traced(graph, sample, expected, labels, class_axis=1))
    assert (found.classes, found.agreement, found.expected_accuracy, found.accuracy) == (4, 100.0, 100.0, 100.0)
    with pytest.raises(CRCoreError, match=r"labels must have the shape \(50, 8, 8\), got \(50,\)"):
        Traced(graph, sample, expected, labels[:, 0, 0], class_axis=1)


@pytest.mark.parametrize("labels", [[10] * 400, [-1] * 400, [0.5] * 400, ["a"] * 400, [True] * 400])
def test_labels_that_are_no_classes_are_named(exported: Exported, labels: list[Any]) -> None:
    with pytest.raises(CRCoreError, match="labels must be whole numbers from 0 to 9, got"):
        Traced(exported.graph, exported.sample, exported.expected, labels)


def test_further_outputs_are_mentioned(tmp_path: Path) -> None:
    make = GraphMaker({"x": (16,)})
    x = make.signed("x", 0.03, layer="a")
    graph, sample = make.model(make.gemm(x, 16, 3, layer="a"), make.gemm(x, 16, 5, layer="b")), make.sample(50)
    onnx.save(to_onnx(prepared_graph(graph, sample))[0], tmp_path / "net.onnx")
    found = verify(tmp_path / "net.onnx", Traced(graph, sample, computed(graph, sample)))
    assert found.notices == (
        f"the network has 2 outputs; agreement is that of the first, '{graph.graph.output[0].name}'",
    )


def test_outputs_that_are_no_numbers_do_not_agree(exported: Exported) -> None:
    found = exported.verified(
        broken_onnx(exported, **{classifier_scale(exported): lambda old: old * np.float32("nan")})
    )
    assert found.agreement == 0.0
    assert found.max_code_difference == np.inf


def test_an_output_of_another_shape_is_an_error(exported: Exported) -> None:
    with pytest.raises(CRCoreError, match=r"shape \(400, 10\), the trained network \(400, 3\)"):
        verify(exported.folder / "net.onnx", Traced(exported.graph, exported.sample, exported.expected[:, :3]))
