"""Where a file begins to compute something else than the trained network: layer by layer, by what each layer reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crcore.deploy._contents import INPUT_CODES, OnnxContents, found_in, litert_weights, markers
from crcore.deploy._graph import Graph, Node, expanded
from crcore.deploy._loading import litert_interpreter, onnx_session
from crcore.deploy._runtimes import to_codes

# Grids that were added for integer kernels round what training did not: codes differ by one here and there.
LIMIT = 0.1  # of the sum of the trained codes' magnitudes


def first_difference(path: Path, graph: onnx.ModelProto, sample: Mapping[str, Any]) -> str | None:
    """The first layer whose input differs from what it is in the trained network, as part of a sentence.

    Args:
        path: an exported file.
        graph: the marker graph that was exported.
        sample: arrays ``[N, ...]`` by input name.

    Returns:
        it names the layer, how far its input is off, and the layers that compute that input. None where the inputs of
        all layers agree, so that what differs comes from the last layer.
    """
    _, quantizers = markers(graph)
    trained = _trained_codes(graph, quantizers, sample)
    read = _litert_codes if path.suffix == ".tflite" else _onnx_codes
    found = read(path, graph, sample, quantizers)
    errors = {layer: _error(codes, found[layer]) for layer, codes in trained.items() if layer in found}
    first = next((layer for layer, error in errors.items() if error > LIMIT), None)
    if first is None:
        return None
    makers = " and ".join(map(repr, makers_of(graph, first))) or "no layer"
    return (
        f"the input of layer {first!r}, which is computed by {makers}: its codes are off by {100 * errors[first]:.0f} %"
    )


def makers_of(graph: onnx.ModelProto, layer: str | None) -> list[str]:
    """The layers that compute the input of a layer, or the network's output (None), in the network's order."""
    parsed = Graph(graph)
    makers = parsed.makers()
    readers = [node for node in parsed.nodes if node.is_quantizer and node.attributes["layer"] == layer]
    waiting = [node.inputs[0] for node in readers] if layer is not None else parsed.outputs[:1]
    layers: list[str] = []
    seen: set[str] = set()
    while waiting:
        tensor = waiting.pop()
        node = makers.get(tensor)
        if node is None or tensor in seen:
            continue
        seen.add(tensor)
        weights = list(_weights_of(node, makers))
        layers += weights
        waiting += [] if weights else node.inputs
    order = [node.attributes["layer"] for node in parsed.nodes if node.is_weight]
    return sorted(set(layers), key=order.index)


def _weights_of(node: Node, makers: Mapping[str, Node]) -> Iterator[str]:
    """The layer whose weight an operator takes, transposed or not."""
    for name in node.inputs[1:] if len(node.inputs) > 1 else node.inputs:
        maker = makers.get(name)
        if maker is not None and maker.op == "Transpose":
            maker = makers.get(maker.inputs[0])
        if maker is not None and maker.is_weight:
            yield maker.attributes["layer"]


def _trained_codes(
    graph: onnx.ModelProto, quantizers: Mapping[str, Mapping[str, Any]], sample: Mapping[str, Any]
) -> dict[str, Any]:
    """Codes of the layers' inputs in the trained network, counted from real zero."""
    model = expanded(graph)
    tensors = {layer: described["output"] for layer, described in quantizers.items() if layer}
    values = _computed(model, list(tensors.values()), sample)
    return {layer: values[tensor] / quantizers[layer]["scale"] for layer, tensor in tensors.items()}


def _onnx_codes(
    path: Path, graph: onnx.ModelProto, sample: Mapping[str, Any], quantizers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    contents = OnnxContents(path)
    grids = {layer: contents.grid(f"{layer}{INPUT_CODES}") for layer in quantizers}
    zero_points = {layer: grid[1] for layer, grid in grids.items() if grid is not None}
    values = _computed(contents.model, [f"{layer}{INPUT_CODES}" for layer in zero_points], sample)
    return {
        layer: values[f"{layer}{INPUT_CODES}"].astype(np.int32) - np.int32(zero_point)
        for layer, zero_point in zero_points.items()
    }


def _computed(model: onnx.ModelProto, tensors: list[str], sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a model computes for some of its tensors, each operator by itself."""
    if not tensors:
        return {}
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    # ONNX Runtime finds the types of outputs that give none.
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tensors))
    session = onnx_session(Path("model"), observed.SerializeToString(), optimised=False)
    return dict(zip(dict.fromkeys(tensors), session.run(None, dict(sample)), strict=True))


def _litert_codes(
    path: Path, graph: onnx.ModelProto, sample: Mapping[str, Any], quantizers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    from ai_edge_litert.interpreter import OpResolverType

    stored = litert_weights(path)
    interpreter = litert_interpreter(
        path,
        path.read_bytes(),
        num_threads=1,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    sources = {}
    for layer, described in markers(graph)[0].items():
        same = found_in(stored, described["codes"], described)
        if same and layer in quantizers:
            sources[layer] = same[0].source
    for entry in interpreter.get_input_details():
        interpreter.resize_tensor_input(entry["index"], sample[entry["name"]].shape)
    interpreter.allocate_tensors()
    for entry in interpreter.get_input_details():
        interpreter.set_tensor(entry["index"], to_codes(sample[entry["name"]], entry))
    interpreter.invoke()
    grids = {entry["index"]: entry["quantization"][1] for entry in interpreter.get_tensor_details()}
    return {layer: interpreter.get_tensor(index).astype(np.int32) - grids[index] for layer, index in sources.items()}


def _error(trained: Any, found: Any) -> float:
    """The sum of the differences of codes over the sum of the codes; images may have their channels last.

    Shapes do not always tell which it is (8 channels of 8x8), but codes in another order are far off.
    """
    if found.size != trained.size:
        return 0.0
    orders = [found, found.transpose(0, 3, 1, 2)] if trained.ndim == found.ndim == 4 else [found.reshape(trained.shape)]
    differences = [np.abs(order - trained).sum() for order in orders if order.shape == trained.shape]
    return float(min(differences) / max(np.abs(trained).sum(), 1.0))
