"""A converted network as the graph that is exported: walked as Keras walks it, written layer by layer.

Nothing here knows the engine: the graph of a Functional or Sequential model is plain data, and so are its variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from onnx import TensorProto, helper

from crcore import CRCoreError, deploy
from crcore_keras._graph_activations import KINDS, by_name
from crcore_keras._graph_layers import MERGING, WRITERS
from crcore_keras._graph_network import FLOAT, Inputs, Network, Shape, Tensor, described
from crcore_keras._graph_windows import PADDED
from crcore_keras._layers import base_class
from crcore_keras._tree import walk

# Functions on tensors in a Functional model, such as ``x + y``, by the name of Keras' class; its ``Divide`` is special.
_ARITHMETIC: dict[str, str] = {"Add": "Add", "Maximum": "Max", "Minimum": "Min", "Multiply": "Mul", "Subtract": "Sub"}
_DIVISIONS = ("Divide", "TrueDivide")
# What a subclass of a known layer may define anew without computing something else.
_HARMLESS = {
    "build",
    "build_from_config",
    "compute_mask",
    "compute_output_shape",
    "compute_output_spec",
    "from_config",
    "get_build_config",
    "get_config",
}


def marker_graph(model: Any) -> Any:
    """Write a converted network as a graph.

    Args:
        model: Functional or Sequential, from `convert`; models in it may be those too.

    Returns:
        an ``onnx.ModelProto``, see `crcore.deploy`. Inputs have the names and the axes that they have in Keras.

    Raises:
        CRCoreError: a layer has no form in an exported graph (the message names it), or a model is subclassed.
    """
    net = Network()
    function = graph_of(model, model.name)
    named = {id(layer): name for name, layer in walk(model)}
    has_images = any(getattr(layer, "data_format", None) == "channels_last" for _, layer in walk(model))
    inputs = [Tensor(net.fresh(each.name), tuple(each.shape), dtype=_dtype(each.dtype)) for each in function.inputs]
    started = [_started(net, each, has_images) for each in inputs]
    outputs = [net.as_in_keras(each) for each in _run(net, function, started, named, "")]
    outputs = [_renamed(net, each, [*inputs, *outputs[:i]]) for i, each in enumerate(outputs)]
    graph = deploy.marker_model(
        net.nodes, inputs=map(described, inputs), outputs=map(described, outputs), constants=net.constants
    )
    ends = {value.name for value in graph.graph.output}
    graph.graph.value_info.extend(value for value in net.values if value.name not in ends)
    return graph


def graph_of(model: Any, name: str) -> Any:
    """The graph of operations of a model.

    Raises:
        CRCoreError: it is subclassed, or was never given an input.
    """
    found = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    definer = next(kind for kind in base_class(model).__mro__ if "call" in vars(kind))
    if not isinstance(found, keras.Function) or not definer.__module__.startswith("keras."):
        raise CRCoreError(
            f"model {name!r} ({base_class(model).__name__}) computes with code of its own, of which there is no graph; "
            "write it as a Functional model, keras.Model(inputs, outputs), or as a Sequential model with a keras.Input"
        )
    return found


def _dtype(name: str) -> int:
    return FLOAT if "float" in name else helper.np_dtype_to_tensor_dtype(np.dtype(name))


def _started(net: Network, x: Tensor, has_images: bool) -> Tensor:
    """An input as the layers read it: images have their channels at axis 1 from the start."""
    net.layer = x.name
    return net.channels_first(_in_float(net, x)) if x.rank == 4 and has_images else x


def _in_float(net: Network, x: Tensor) -> Tensor:
    return x if x.dtype == FLOAT else net.add("Cast", [x], x.shape, attributes={"to": TensorProto.FLOAT})


def _renamed(net: Network, x: Tensor, taken: Sequence[Tensor]) -> Tensor:
    """An output that is an input too, or another output, under a name of its own."""
    return net.add("Identity", [x], x.shape) if any(x.name == each.name for each in taken) else x


def _run(net: Network, function: Any, inputs: Sequence[Tensor], named: Mapping[int, str], place: str) -> list[Tensor]:
    """What a graph of operations gives; ``place``: the name of the model that it belongs to."""
    found = {id(each): given for each, given in zip(function.inputs, inputs, strict=True)}
    for depth in sorted(function._nodes_by_depth, reverse=True):
        for node in function._nodes_by_depth[depth]:
            if node.is_input or any(id(each) not in found for each in node.input_tensors):
                continue
            args, kwargs = node.arguments.fill_in(found)
            operation = node.operation
            own = f"{place}.{operation.name}" if place else operation.name
            net.layer, net.kind = named.get(id(operation), own), base_class(operation).__name__
            given = [each for each in keras.tree.flatten((args, kwargs)) if isinstance(each, Tensor)]
            shape = tuple(node.outputs[0].shape)
            if isinstance(operation, keras.Model):
                made = _run(net, graph_of(operation, net.layer), given, named, net.layer)
            elif isinstance(operation, keras.layers.Layer):
                made = [_layer(net, operation, shape, given)]
            else:
                made = [_function(net, operation, shape, args, kwargs)]
            found |= {id(each): tensor for each, tensor in zip(node.outputs, made, strict=True)}
    return [found[id(each)] for each in function.outputs]


def _layer(net: Network, layer: Any, shape: Shape, given: Sequence[Tensor]) -> Tensor:
    kind = base_class(layer)
    known = next((each for each in kind.__mro__ if each in WRITERS), None)
    if known is None:
        names = ", ".join(sorted(each.__name__ for each in WRITERS))
        raise net.error(
            "has no form in an exported graph. Build it from layers that have, or export the part of the model before "
            f"it, keras.Model(model.inputs, model.get_layer(...).input), converted. Known are {names}"
        )
    pads = issubclass(known, PADDED) and hasattr(layer, "explicit_padding")
    changed = _changed(kind, known) - ({"call"} if pads else set())
    if changed:
        raise net.error(
            f"is a {known.__name__} with code of its own ({', '.join(sorted(changed))}), which exported graphs do not "
            "know. Write it as layers of Keras; or, if it is a convolution that first puts zeros around what it is "
            "given, say so in the attribute explicit_padding = ((top, bottom), (left, right))"
        )
    if len(given) != 1 and not issubclass(known, MERGING):
        raise net.error(f"is called with {len(given)} tensors; in exported graphs {known.__name__} takes one")
    if not all(x.dtype == FLOAT for x in given) and not issubclass(known, keras.layers.Embedding):
        given = [_in_float(net, x) for x in given]
    return WRITERS[known](net, layer, shape, *given)


def _changed(kind: type, known: type) -> set[str]:
    """The parts of a known class that a subclass defines anew."""
    before = kind.__mro__[: kind.__mro__.index(known)]
    names = {name for each in before for name in vars(each) if name == "__call__" or not name.startswith("__")}
    return {name for name in names if hasattr(known, name)} - _HARMLESS


def _function(net: Network, operation: Any, shape: Shape, args: Any, kwargs: Any) -> Tensor:
    """A function on tensors in a Functional model."""
    name = type(operation).__name__
    operands = [*args, *kwargs.values()]
    tensors = [_in_float(net, each) for each in operands if isinstance(each, Tensor)]
    if type(operation).__module__.startswith("keras."):
        if name.lower() in KINDS and len(operands) == 1:
            return by_name(net, name, vars(operation), tensors[0])
        if name in _ARITHMETIC and len(operands) == 2:
            return _arithmetic(net, _ARITHMETIC[name], shape, operands, tensors)
        if name in _DIVISIONS and len(operands) == 2 and len(tensors) == 1 and isinstance(operands[0], Tensor):
            factor = 1 / np.asarray(keras.ops.convert_to_numpy(operands[1]), np.float64)
            return _arithmetic(net, "Mul", shape, [operands[0], factor], tensors)
    raise net.error(
        "is a function that exported graphs do not know; they know +, -, * with tensors and numbers, / by a number, "
        f"maximum, minimum and {', '.join(sorted(KINDS))}"
    )


def _arithmetic(net: Network, op: str, shape: Shape, operands: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
    """Two operands, either of which may be a constant."""
    alike = iter(net.alike(tensors))
    first = next(alike)
    if len(tensors) == 2:
        return net.add(op, [first, next(alike)], shape, moved=first.moved)
    names: Inputs = [first if isinstance(each, Tensor) else net.beside(first, each, "operand") for each in operands]
    return net.add(op, names, shape, moved=first.moved)
