"""Where integer kernels can follow each other: the operators between two roundings that training put in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crcore.deploy._fold import LINEAR
from crcore.deploy._graph import Graph, Node, fits_byte

# Operators whose results are values that they were given, or zero: see `is_passive`.
_PASSIVE = ("Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# Operators that follow another one without a rounding in between: integer kernels clip where they round.
_ACTIVATIONS = ("Relu", "Clip")
_ELEMENTWISE = ("Add", "Mul", "Sub", "Concat", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu")
_POOLS = ("GlobalAveragePool", "AveragePool")
# Without an integer kernel in ONNX Runtime, where they stay in float, as do the matrix products that they read.
_LITERT = ("Gelu", "Tanh")
FIXED = ("Sigmoid", "Softmax")  # values in [0, 1); integer kernels insist on a scale of 1 / 256


def is_passive(graph: Graph, node: Node) -> bool:
    """Whether an operator only moves values about; a ``Pad`` adds zeros at most."""
    fills = node.op == "Pad" and node.attributes.get("mode", "constant") == "constant" and node.inputs[2:]
    if fills and fills[0] and np.any(graph.constants.get(fills[0], 1)):
        return False
    return node.op in _PASSIVE


def integer_region(graph: Graph, *, litert: bool) -> list[Node]:
    """The operators that can compute with integers: their inputs come from such, and such read their results.

    A sum that a layer normalization reads, for instance, is better left in float, with what leads to it.

    Args:
        graph: folded.
        litert: whether operators count for which LiteRT alone has integer kernels.
    """
    operators = (*_ELEMENTWISE, *_POOLS, *FIXED, *(_LITERT if litert else ()))
    makers, readers = graph.makers(), graph.readers()
    region = {id(node) for node in graph.nodes if _can_be_integer(graph, node, operators, makers)}
    parts = {id(node) for node in graph.nodes if is_passive(graph, node) or _belongs(graph, node, makers)}
    while True:
        leaving = {
            id(node)
            for node in graph.nodes
            if id(node) in region
            and not (
                _reads_integers(graph, node, region, makers)
                and _is_read_by_integers(graph, node, parts, region, readers)
            )
        }
        if not leaving:
            return [node for node in graph.nodes if id(node) in region]
        region -= leaving


def _can_be_integer(graph: Graph, node: Node, operators: tuple[str, ...], makers: Mapping[str, Node]) -> bool:
    if node.op not in LINEAR:
        return node.op in operators and not _belongs(graph, node, makers)
    data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
    return data is not None and data.is_quantizer and weight is not None and weight.is_weight and fits_byte(data)


def _belongs(graph: Graph, node: Node, makers: Mapping[str, Node]) -> bool:
    """Whether the operator is part of the one before it: an activation, or the bias of a matrix product."""
    if node.op in _ACTIVATIONS:
        return True
    before = makers.get(node.inputs[0]) if node.op == "Add" else None
    return before is not None and before.op == "MatMul" and node.inputs[1] in graph.constants


def _reads_integers(graph: Graph, node: Node, region: set[int], makers: Mapping[str, Node]) -> bool:
    if node.op in LINEAR:
        return True
    for name in node.inputs:
        maker = makers.get(name)
        while maker is not None and (is_passive(graph, maker) or _belongs(graph, maker, makers)):
            name, maker = maker.inputs[0], makers.get(maker.inputs[0])
        known = name in graph.constants or name in graph.inputs or name == ""
        if not known and (maker is None or not (maker.is_quantizer or id(maker) in region)):
            return False
    return True


def _is_read_by_integers(
    graph: Graph, node: Node, parts: set[int], region: set[int], readers: Mapping[str, list[Node]]
) -> bool:
    if node.output in graph.outputs:
        return True
    return all(
        reader.is_quantizer
        or id(reader) in region
        or (id(reader) in parts and _is_read_by_integers(graph, reader, parts, region, readers))
        for reader in readers[node.output]
    )


def result_of(graph: Graph, node: Node) -> str:
    """Where the operator's result is rounded: behind the activation that belongs to it."""
    makers, readers = graph.makers(), graph.readers()
    tensor = node.output
    while tensor not in graph.outputs and len(readers[tensor]) == 1 and _belongs(graph, readers[tensor][0], makers):
        tensor = readers[tensor][0].output
    return tensor


def is_used_by(graph: Graph, tensor: str, region: list[Node]) -> bool:
    """Whether an operator of the region reads the tensor as it is, or moved about."""
    inside = {id(node) for node in region}
    return any(
        id(reader) in inside or (is_passive(graph, reader) and is_used_by(graph, reader.output, region))
        for reader in graph.readers()[tensor]
    )
