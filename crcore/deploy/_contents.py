"""What an exported file holds of the trained network: the integers of its layers, and the grids of their inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from crcore import CRCoreError
from crcore.deploy._graph import Graph, codes_by_layer
from crcore.deploy._loading import onnx_model

# In an ONNX file: the initializer <layer>.codes, and the codes that the layer reads, see `to_onnx`.
_CODES, INPUT_CODES = ".codes", ".input_codes"
_DEEPEST = 4  # Cast, Mul, Cast, DequantizeLinear


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight of a LiteRT file."""

    name: str
    codes: Any  # int32, in LiteRT's layout
    source: int  # the index of the tensor that is multiplied with it
    source_scale: float  # the step of that tensor's grid; 0 where it has none


class OnnxContents:
    """An ONNX file, with its initializers as arrays; packed integers are one to an element."""

    def __init__(self, path: Path) -> None:
        self.model = onnx_model(path, path.read_bytes())
        self.constants: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        self._readers = {name: node for node in self.model.graph.node for name in node.input}

    def grid(self, codes: str) -> tuple[Any, Any] | None:
        """The scale and the zero point with which a tensor of codes is dequantized, where it is.

        Between packed codes and their DequantizeLinear stand operators that change their type, and a whole number by
        which they are multiplied.
        """
        factor = 1
        for _ in range(_DEEPEST):
            node = self._readers.get(codes)
            if node is None:
                return None
            if node.op_type == "DequantizeLinear":
                scale, *zero_points = (self.constants.get(name) for name in node.input[1:])
                zero_point: Any = zero_points[0] if zero_points else np.uint8(0)
                return scale, zero_point if factor == 1 else zero_point / factor
            if node.op_type == "Mul":
                factor = int(self.constants[node.input[1]])
            codes = node.output[0]
        return None


def integers(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The integer weights of an exported file, int32.

    Returns:
        by layer for ``.onnx``; by tensor, in LiteRT's layout, for ``.tflite``, which has no place for layers' names.

    Raises:
        CRCoreError: the file cannot be read.
    """
    file = Path(path)
    if file.suffix == ".tflite":
        return {weight.name: weight.codes for weight in litert_weights(file)}
    constants = OnnxContents(file).constants
    named = {name.removesuffix(_CODES): codes for name, codes in constants.items() if name.endswith(_CODES)}
    return {layer: codes.astype(np.int32) for layer, codes in named.items()}


def differing_layers(path: Path, graph: onnx.ModelProto) -> tuple[str, ...]:
    """The layers that a file does not hold as they were trained, in the network's order.

    Args:
        path: an exported file.
        graph: the marker graph that was exported.
    """
    (weights, quantizers), codes = markers(graph), codes_by_layer(graph)
    if path.suffix == ".tflite":
        stored = litert_weights(path)
        return tuple(
            layer
            for layer, trained in codes.items()
            if not any(
                _has_step(weight.source_scale, quantizers.get(layer))
                for weight in found_in(stored, trained, weights.get(layer))
            )
        )
    contents = OnnxContents(path)
    return tuple(
        layer
        for layer, trained in codes.items()
        if not _is_written(trained, contents.constants.get(f"{layer}{_CODES}"))
        or not _has_zero_point(contents.grid(f"{layer}{_CODES}"), weights.get(layer))
        or not _has_grid(contents.grid(f"{layer}{INPUT_CODES}"), quantizers.get(layer))
    )


def markers(graph: onnx.ModelProto) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What the marker graph says of weights and of inputs, by layer.

    Returns:
        weights, with ``codes``, and inputs: attributes, ``scale``, ``zero_point``, and ``output``, the tensor's name.
    """
    parsed = Graph(graph)
    weights: dict[str, dict[str, Any]] = {}
    quantizers: dict[str, dict[str, Any]] = {}
    for node in parsed.nodes:
        if node.is_weight or node.is_quantizer:
            scale, zero_point = (parsed.constants[name] for name in node.inputs[1:])
            described = {**node.attributes, "scale": scale, "zero_point": zero_point, "output": node.output}
            if node.is_weight:
                described["codes"] = parsed.constants[node.inputs[0]]
            (weights if node.is_weight else quantizers).setdefault(node.attributes["layer"], described)
    return weights, quantizers


def found_in(stored: list[StoredWeight], codes: Any, described: Mapping[str, Any] | None) -> list[StoredWeight]:
    """The weights of a LiteRT file that are those of a layer: counted from real zero, up to the sign of a channel."""
    centred = codes.astype(np.int32)
    if described is not None:
        zero_point = described["zero_point"].astype(np.int32)
        if zero_point.ndim:
            shape = [-1 if axis == described["axis"] else 1 for axis in range(codes.ndim)]
            zero_point = zero_point.reshape(shape)
        centred = centred - zero_point
    # LiteRT's integers end at 127: a weight of 128 steps is stored as its neighbour, which is no damage to the file.
    centred = np.where(np.abs(centred) == 128, np.sign(centred) * 127, centred)
    return [weight for weight in stored if _is_same(centred, weight.codes)]


def litert_weights(path: Path) -> list[StoredWeight]:
    """The integer weights of a LiteRT file, in the order in which its operators read them."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        (graph,) = model.subgraphs
        int8 = schema.TensorType.INT8
        return [weight for operator in graph.operators for weight in _weights_of(operator, graph, model, int8)]
    except Exception as error:  # flatbuffers' own Python code raises whatever an odd offset makes of it
        raise CRCoreError(f"{path} cannot be read ({error}): it is damaged; export it again") from error


def _weights_of(operator: Any, graph: Any, model: Any, int8: int) -> Iterator[StoredWeight]:
    read = [(index, graph.tensors[index]) for index in operator.inputs if index >= 0]
    held = {index: model.buffers[tensor.buffer].data for index, tensor in read}
    computed = [(index, tensor) for index, tensor in read if held[index] is None]
    for index, tensor in read:
        if tensor.type == int8 and held[index] is not None and computed:
            codes = np.frombuffer(held[index].tobytes(), np.int8).reshape(tensor.shape).astype(np.int32)
            source, described = computed[-1]
            steps = described.quantization.scale if described.quantization is not None else None
            yield StoredWeight(tensor.name.decode(), codes, int(source), 0.0 if steps is None else float(steps[0]))


def _is_written(trained: Any, stored: Any | None) -> bool:
    """Whether an ONNX file's integers are these; matrices may be transposed for the operator that multiplies."""
    if stored is None:
        return False
    return np.array_equal(trained, stored) or (trained.ndim == 2 and np.array_equal(trained.T, stored))


def _is_same(trained: Any, stored: Any) -> bool:
    """Whether integers are equal, whatever the order of their axes and the sign of each channel."""
    a, b = np.squeeze(trained.astype(np.int32)), np.squeeze(stored.astype(np.int32))
    if sorted(a.shape) != sorted(b.shape) or not np.array_equal(_counts(a), _counts(b)):
        return False
    layouts = (b.transpose(order) for order in permutations(range(b.ndim)))
    return any(_is_equal(a, layout) for layout in layouts if layout.shape == a.shape)


def _counts(codes: Any) -> Any:
    """How often each magnitude occurs: a quick test that tells most weights apart."""
    return np.unique(np.abs(codes), return_counts=True)


def _is_equal(a: Any, b: Any) -> bool:
    if a.ndim == 0:
        return bool(abs(a) == abs(b))
    for axis in range(a.ndim):
        rows_a, rows_b = (np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1) for codes in (a, b))
        if ((rows_a == rows_b).all(axis=1) | (rows_a == -rows_b).all(axis=1)).all():
            return True
    return False


def _has_step(found: float, trained: Mapping[str, Any] | None) -> bool:
    """Whether a step is the trained one, but for the rounding of TensorFlow, which computes it from the ends."""
    return trained is None or found == 0.0 or math.isclose(found, float(trained["scale"]), rel_tol=1e-5)


def _has_zero_point(found: tuple[Any, Any] | None, trained: Mapping[str, Any] | None) -> bool:
    """Whether a weight's zero point is the trained one, for each channel or for all."""
    if trained is None or found is None:
        return trained is None
    stored, known = (np.asarray(value, np.float64).ravel() for value in (found[1], trained["zero_point"]))
    return (len(stored) in (1, len(known)) or len(known) == 1) and bool((stored == known).all())


def _has_grid(found: tuple[Any, Any] | None, trained: Mapping[str, Any] | None) -> bool:
    """Whether the grid of a layer's input is the trained one, which is stored as unsigned integers."""
    if trained is None or found is None:  # two values, and 16 bits in an old opset, are computed in float
        return trained is None or bool(trained.get("binary")) or trained["hi"] - trained["lo"] > np.iinfo(np.uint8).max
    scale, zero_point = found
    half = (int(np.iinfo(zero_point.dtype).max) + 1) // 2
    shifts = (0, half) if trained["lo"] < 0 else (0,)  # 0: behind a ReLU, which leaves the upper half of the grid
    return bool(scale == trained["scale"] and int(zero_point) - int(trained["zero_point"]) in shifts)
