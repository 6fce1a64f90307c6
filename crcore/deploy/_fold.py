"""Folding: what has no integer operator of its own becomes part of one that has.

Batch normalization goes into the scale and the bias of the convolution or matrix product before it. The integers stay
those that were trained; a negative ``gamma`` makes the scale of its channel negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from crcore.deploy._graph import Graph, Node

# Operators with a weight, and the axis of the output channels in it.
_CHANNELS: dict[str, Callable[[Node], int]] = {
    "Conv": lambda node: 0,
    "ConvTranspose": lambda node: 1,
    "Gemm": lambda node: 0 if node.attributes.get("transB") else 1,
}
LINEAR = (*_CHANNELS, "MatMul")


def fold(graph: Graph) -> None:
    """Transposed weights, zeros around an image, batch normalization and means over an image, in place."""
    _transposed_weights(graph)
    _pads_into_convolutions(graph)
    for node in [node for node in graph.nodes if node.op == "BatchNormalization"]:
        if not _into_weight(graph, node):
            _into_affine(graph, node)
    _means_over_images(graph)


def _transposed_weights(graph: Graph) -> None:
    """``Transpose(IntegerWeight)``: the integers themselves are transposed."""
    makers = graph.makers()
    for node in graph.nodes:
        weight = makers.get(node.inputs[0]) if node.op == "Transpose" else None
        if weight is None or not weight.is_weight:
            continue
        codes = graph.constants[weight.inputs[0]]
        order = list(node.attributes.get("perm", range(codes.ndim)[::-1]))
        node.op, node.attributes = weight.op, dict(weight.attributes)
        node.inputs = [graph.constant(np.transpose(codes, order), f"{weight.inputs[0]}.transposed"), *weight.inputs[1:]]
        if "axis" in node.attributes:
            node.attributes["axis"] = order.index(node.attributes["axis"])


def _pads_into_convolutions(graph: Graph) -> None:
    """``Conv(FakeQuantize(Pad(x)))``: the convolution pads. A quantizer keeps real zero."""
    for conv in [node for node in graph.nodes if node.op == "Conv"]:
        makers, readers = graph.makers(), graph.readers()
        reader, pad = conv, makers.get(conv.inputs[0])
        if pad is not None and pad.is_quantizer:
            reader, pad = pad, makers.get(pad.inputs[0])
        alone = len(readers[reader.output]) == 1 or reader is conv
        if pad is None or pad.op != "Pad" or len(readers[pad.output]) > 1 or not alone:
            continue
        sizes = _zeros_around_image(graph, pad)
        given = conv.attributes.get("auto_pad", "NOTSET")
        if sizes is None or given not in ("NOTSET", "VALID") or reader.attributes.get("binary"):
            continue
        own = conv.attributes.get("pads", [0] * len(sizes))
        conv.attributes |= {"auto_pad": "NOTSET", "pads": [a + b for a, b in zip(own, sizes, strict=True)]}
        reader.inputs[0] = pad.inputs[0]
        graph.nodes.remove(pad)


def _zeros_around_image(graph: Graph, pad: Node) -> list[int] | None:
    """How many zeros a ``Pad`` puts around an image, as a convolution counts them; None if it does something else."""
    sizes = graph.constants.get(pad.inputs[1])
    value = (
        graph.constants.get(pad.inputs[2], np.float32(0)) if len(pad.inputs) > 2 and pad.inputs[2] else np.float32(0)
    )
    has_axes = len(pad.inputs) > 3 and pad.inputs[3]
    if sizes is None or np.any(value != 0) or pad.attributes.get("mode", "constant") != "constant" or has_axes:
        return None
    before, after = np.split(np.asarray(sizes), 2)
    if (before < 0).any() or (after < 0).any() or before[:2].any() or after[:2].any():
        return None
    return [int(size) for size in (*before[2:], *after[2:])]


def _into_weight(graph: Graph, norm: Node) -> bool:
    """Fold a normalization into the operator before it; False where there is none to fold it into."""
    makers, readers = graph.makers(), graph.readers()
    linear = makers.get(norm.inputs[0])
    if (
        linear is None
        or linear.op not in _CHANNELS
        or len(readers[linear.output]) > 1
        or linear.output in graph.outputs
    ):
        return False
    if linear.op == "ConvTranspose" and linear.attributes.get("group", 1) > 1:  # its weight mixes groups on one axis
        return False
    axis = _CHANNELS[linear.op](linear)
    weight = makers.get(linear.inputs[1])
    factor, shift = _affine_of(graph, norm)
    bias = graph.constants.get(linear.inputs[2]) if len(linear.inputs) > 2 else np.float32(0)
    if bias is None or (weight is None and linear.inputs[1] not in graph.constants):
        return False
    if weight is None:
        shape = [-1 if i == axis else 1 for i in range(graph.constants[linear.inputs[1]].ndim)]
        folded = graph.constants[linear.inputs[1]] * factor.reshape(shape)
        linear.inputs[1] = graph.constant(folded.astype(np.float32), f"{linear.inputs[1]}.folded")
    elif weight.is_weight and weight.attributes.get("axis", axis) == axis:
        own = Node(weight.op, list(weight.inputs), [graph.fresh(f"{weight.output}.folded")], {**weight.attributes})
        scale, zero_point = (graph.constants[name] for name in weight.inputs[1:])
        own.inputs[1] = graph.constant((scale * factor).astype(np.float32), f"{weight.inputs[1]}.folded")
        own.inputs[2] = graph.constant(np.broadcast_to(zero_point, factor.shape).copy(), f"{weight.inputs[2]}.folded")
        own.attributes["axis"] = axis
        graph.insert([own], before=linear)
        linear.inputs[1] = own.output
    else:
        return False
    # In float64: the bias of an integer kernel is exact to a fraction of the accumulator's step.
    total = (np.asarray(bias, np.float64) * factor + shift).astype(np.float32)
    linear.inputs[2:] = [graph.constant(total, f"{linear.output}.bias")]
    linear.outputs = [norm.output]
    graph.nodes.remove(norm)
    return True


def _into_affine(graph: Graph, norm: Node) -> None:
    """A normalization with nothing to fold it into is a product and a sum."""
    factor, shift = (
        value.astype(np.float32).reshape(-1, *[1] * _spatial(graph, norm)) for value in _affine_of(graph, norm)
    )
    product = graph.fresh(f"{norm.output}.product")
    graph.insert(
        [
            Node("Mul", [norm.inputs[0], graph.constant(factor, f"{norm.output}.factor")], [product]),
            Node("Add", [product, graph.constant(shift, f"{norm.output}.shift")], [norm.output]),
        ],
        before=norm,
    )
    graph.nodes.remove(norm)


def _affine_of(graph: Graph, norm: Node) -> tuple[Any, Any]:
    """``(factor, shift)`` of ``y = x * factor + shift``, float64."""
    gamma, beta, mean, variance = (graph.constants[name].astype(np.float64) for name in norm.inputs[1:5])
    factor = gamma / np.sqrt(variance + norm.attributes.get("epsilon", 1e-5))
    return factor, beta - mean * factor


def _spatial(graph: Graph, node: Node) -> int:
    """How many axes follow the channel axis in what the node makes."""
    rank = graph.rank(node.output)
    return 2 if rank is None else rank - 2


def _means_over_images(graph: Graph) -> None:
    """``ReduceMean`` over height and width is ``GlobalAveragePool``, which has an integer kernel."""
    for node in [node for node in graph.nodes if node.op == "ReduceMean" and graph.rank(node.inputs[0]) == 4]:
        axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        flat = not node.attributes.get("keepdims", 1)
        node.op, node.inputs, node.attributes = "GlobalAveragePool", node.inputs[:1], {}
        if flat:
            pooled = graph.fresh(f"{node.output}.pooled")
            place = graph.nodes.index(node)
            graph.nodes.insert(place + 1, Node("Flatten", [pooled], [node.output], {"axis": 1}))
            node.outputs = [pooled]
