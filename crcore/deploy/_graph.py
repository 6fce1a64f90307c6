"""The graph that is exported: ONNX with two operators of our own, which say what was trained.

A backend traces a converted network into an ``onnx.ModelProto``: standard operators in float32, images as
``[N, C, H, W]``, and in the domain ``crcore``

``FakeQuantize(x, scale, zero_point) {lo, hi, layer}``
    ``(clip(round(x / scale) + zero_point, lo, hi) - zero_point) * scale``; with ``lo = -1, hi = 1, binary = 1`` the
    codes are -1 and 1 alone. ``scale`` (float32, > 0) and ``zero_point`` (int32) are initializers of shape ``[]``.
``IntegerWeight(codes, scale, zero_point) {lo, hi, layer}``
    ``(codes - zero_point) * scale``. ``codes`` is an int8, uint8, int16 or int32 initializer in the axis order of the
    operator that takes it, ``scale`` and ``zero_point`` are 0-d, or vectors along ``axis`` (an attribute then).

``lo`` and ``hi`` are the ends of the trained grid, whatever codes occur; ``layer`` is the name in the user's model.
Everything that follows (folding, calibration, writing for a runtime) works on this one form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

DOMAIN = "crcore"
FAKE_QUANTIZE, INTEGER_WEIGHT = "FakeQuantize", "IntegerWeight"
# What backends trace to. Every operator of a usual network has its present form there, but for packed integers.
OPSET, IR_VERSION = 20, 10


@dataclass(eq=False)
class Node:
    """One operator. ``op`` is ``"crcore.FakeQuantize"`` for those of our own."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]

    @property
    def is_quantizer(self) -> bool:
        """Whether it is a ``FakeQuantize``."""
        return self.op == f"{DOMAIN}.{FAKE_QUANTIZE}"

    @property
    def is_weight(self) -> bool:
        """Whether it is an ``IntegerWeight``."""
        return self.op == f"{DOMAIN}.{INTEGER_WEIGHT}"


class Graph:
    """A model that can be edited: nodes in order, constants by name.

    `makers` and `readers` describe the nodes as they are when called; call them again after a change.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in self.constants]
        self.outputs = [v.name for v in model.graph.output]
        self.nodes: list[Node] = []
        for proto in model.graph.node:
            node = _node(proto)
            if node.op == "Constant" and "value" in node.attributes:
                self.constants[node.output] = numpy_helper.to_array(node.attributes["value"])
            else:
                self.nodes.append(node)
        self._taken = {*self.constants, *self.inputs, *(name for node in self.nodes for name in node.outputs)}

    def makers(self) -> dict[str, Node]:
        """The node that makes each tensor; inputs and constants have none."""
        return {name: node for node in self.nodes for name in node.outputs}

    def readers(self) -> defaultdict[str, list[Node]]:
        """The nodes that read each tensor, in order, each once."""
        found: defaultdict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return found

    def fresh(self, hint: str) -> str:
        """A name for a tensor that no other has: ``hint`` itself where it is free."""
        name, count = hint, 1
        while name in self._taken:
            name, count = f"{hint}.{count}", count + 1
        self._taken.add(name)
        return name

    def constant(self, value: Any, hint: str) -> str:
        """The name of a new constant."""
        name = self.fresh(hint)
        self.constants[name] = np.asarray(value)
        return name

    def rank(self, tensor: str) -> int | None:
        """The number of axes of a tensor of the traced model, where that says so."""
        described = [*self.model.graph.value_info, *self.model.graph.input, *self.model.graph.output]
        return next((len(v.type.tensor_type.shape.dim) for v in described if v.name == tensor), None)

    def insert(self, new: Iterable[Node], *, before: Node) -> None:
        """Put nodes in front of another one."""
        place = self.nodes.index(before)
        self.nodes[place:place] = list(new)

    def to_model(self, *, standard: bool = False) -> onnx.ModelProto:
        """The model with the changes, without what nobody reads; ``standard``: it has no operators of ours any more."""
        self.drop_unread()
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(_proto(node) for node in self.nodes)
        read = {name for node in self.nodes for name in node.inputs} | set(self.outputs)
        graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in self.constants.items() if k in read)
        if standard:
            kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
            del model.opset_import[:]
            model.opset_import.extend(kept)
        return model

    def drop_unread(self) -> None:
        """Remove the nodes whose results nobody reads."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]


def marker_model(
    nodes: Iterable[onnx.NodeProto],
    *,
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    constants: Iterable[onnx.TensorProto],
) -> onnx.ModelProto:
    """A marker graph from its parts, with the versions that the rest expects."""
    graph = helper.make_graph(list(nodes), "crcore", list(inputs), list(outputs), list(constants))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in standard operators, which any runtime computes in float32 as the trained network did."""
    graph = Graph(model)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.is_quantizer:
            nodes += quantize_in_float(graph, node)
        elif node.is_weight:
            graph.constants[node.output] = weight_values(graph, node)
        else:
            nodes.append(node)
    graph.nodes = nodes
    return graph.to_model(standard=True)


def float_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float: nothing is rounded. What an exported file's size and speed are compared with."""
    graph = Graph(model)
    same: dict[str, str] = {}
    for node in graph.nodes:  # in order, so that what a quantizer reads is resolved before it
        node.inputs = [same.get(name, name) for name in node.inputs]
        if node.is_quantizer:
            same[node.output] = node.inputs[0]
            if node.output in graph.outputs:
                node.op, node.inputs = "Identity", node.inputs[:1]
                node.attributes = {}
    graph.nodes = [node for node in graph.nodes if not node.is_quantizer]
    return expanded(graph.to_model())


def codes_by_layer(model: onnx.ModelProto) -> dict[str, Any]:
    """Every trained integer weight, int32, by the name of its layer, in the network's order."""
    graph = Graph(model)
    weights = [node for node in graph.nodes if node.is_weight]
    return {node.attributes["layer"]: graph.constants[node.inputs[0]].astype(np.int32) for node in weights}


def fits_byte(quantizer: Node) -> bool:
    """Whether the codes of a ``FakeQuantize`` fit the 8 bits of an integer kernel, a zero among them."""
    given = quantizer.attributes
    return given["hi"] - given["lo"] < 2**8 and not given.get("binary")


def counted(layers: list[str]) -> str:
    """How many layers, and the first of them."""
    return f"{len(layers)} layer{'s' * (len(layers) > 1)} ({', '.join([*layers[:3], *['...'] * (len(layers) > 3)])})"


def weight_values(graph: Graph, node: Node) -> Any:
    """The float32 values of an ``IntegerWeight``."""
    codes, scale, zero_point = (graph.constants[name] for name in node.inputs)
    if scale.ndim:
        shape = [1] * codes.ndim
        shape[node.attributes["axis"]] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return ((codes.astype(np.float32) - zero_point.astype(np.float32)) * scale).astype(np.float32)


def quantize_in_float(graph: Graph, node: Node) -> list[Node]:
    """A ``FakeQuantize`` as standard operators on floats."""
    x, scale, zero_point = node.inputs
    given, name = node.attributes, node.output
    if given.get("binary"):
        zero, minus = graph.constant(np.float32(0), "zero"), graph.constant(-graph.constants[scale], "minus")
        positive = graph.fresh(f"{name}.positive")
        return [Node("GreaterOrEqual", [x, zero], [positive]), Node("Where", [positive, scale, minus], [name])]
    shift = graph.constants[zero_point].astype(np.float32)
    low, high = (graph.constant(np.asarray(np.float32(given[end]) - shift), f"{name}.{end}") for end in ("lo", "hi"))
    ratio, rounded, codes = (graph.fresh(f"{name}.{part}") for part in ("ratio", "rounded", "codes"))
    return [
        Node("Div", [x, scale], [ratio]),
        Node("Round", [ratio], [rounded]),
        Node("Clip", [rounded, low, high], [codes]),
        Node("Mul", [codes, scale], [name]),
    ]


def _node(proto: onnx.NodeProto) -> Node:
    found = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    op = f"{proto.domain}.{proto.op_type}" if proto.domain else proto.op_type
    return Node(op, list(proto.input), list(proto.output), attributes)


def _proto(node: Node) -> onnx.NodeProto:
    domain, _, op = node.op.rpartition(".")
    return helper.make_node(op, node.inputs, node.outputs, name=node.output, domain=domain, **node.attributes)
