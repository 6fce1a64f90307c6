"""What LiteRT has for each operator of a graph, as TensorFlow's operators that its converter knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf, prod
from typing import Any

import numpy as np

from crcore.deploy._graph import Node
from crcore.deploy._litert_grids import FIXED
from crcore.deploy._litert_network import Network, Operator, Tensor, Weight
from crcore.deploy._litert_shapes import CHANNELS_LAST, concat, pad, reshape, transpose
from crcore.deploy._litert_windows import average_pool, conv, max_pool


def _gemm(net: Network, node: Node) -> Tensor:
    given = node.attributes
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise net.error(node, "has transA, alpha or beta, which LiteRT has not; leave them out")
    weight = net.weight(node, channels=0 if given.get("transB") else 1)
    return Tensor(_product(net, node, replace(weight, codes=weight.codes.T) if given.get("transB") else weight))


def _matmul(net: Network, node: Node) -> Tensor:
    weight = net.weight(node, channels=1)
    if weight.codes.ndim != 2:
        raise net.error(node, f"has a weight of {weight.codes.ndim} axes; LiteRT's integer kernel takes a matrix")
    return Tensor(_product(net, node, weight))


def _product(net: Network, node: Node, weight: Weight) -> Any:
    """``x @ weight + bias`` as a convolution over one pixel.

    LiteRT's matrix product takes one scale for all of its weights, in older runtimes and in TensorFlow's converter.
    """
    value = net.plain(net.tensor(node.inputs[0]))
    *rows, _ = (int(size) for size in value.shape[1:])
    inputs, outputs = weight.codes.shape
    filters = net.weight_values(replace(weight, codes=weight.codes.reshape(1, 1, inputs, outputs)))
    value = net.tf.nn.conv2d(net.tf.reshape(value, [-1, prod(rows), 1, inputs]), filters, 1, "VALID")
    return net.tf.reshape(net.with_bias(node, value), [-1, *rows, outputs])


def _elementwise(net: Network, node: Node) -> Tensor:
    """``Add``, ``Sub``, ``Mul`` and ``Div`` of two tensors, or of a tensor and a constant."""
    left, right = (net.constant(node, i) for i in (0, 1))
    if left is None and right is None:
        return _of_tensors(net, node)
    name, constant = (node.inputs[0], right) if left is None else (node.inputs[1], left)
    if node.op == "Div" and left is not None:
        raise net.error(node, "divides a constant by a tensor, which LiteRT's integers cannot; multiply instead")
    tensor = net.tensor(name)
    constant = np.asarray(constant, np.float32)
    rank = len(tensor.value.shape)
    constant = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
    if tensor.channels_last or (rank == 4 and constant.size == constant.shape[1] > 1):
        net.channels_last(name)
        tensor, constant = net.tensor(name), constant.transpose(0, 2, 3, 1)
    along_channels = constant.size > 1 and constant.size == constant.shape[-1] == int(tensor.value.shape[-1])
    if net.is_integer and along_channels and tensor.grid is not None:
        factor, shift = _affine(node.op, constant.reshape(-1), constant_first=left is not None)
        return Tensor(_per_channel(net, tensor.value, factor, shift), tensor.channels_last)
    if constant.size == 1:
        constant = constant.reshape(())
    operands = (constant, tensor.value) if left is not None else (tensor.value, constant)
    return Tensor(_arithmetic(net, node.op)(*operands), tensor.channels_last)


def _of_tensors(net: Network, node: Node) -> Tensor:
    if node.op == "Div":
        raise net.error(node, "divides by a tensor, which LiteRT's integers cannot; multiply instead")
    operate = _arithmetic(net, node.op)
    if all(len(net.tensor(name).value.shape) == 4 for name in node.inputs) and any(
        net.tensor(name).channels_last for name in node.inputs
    ):
        return Tensor(operate(*(net.channels_last(name) for name in node.inputs)), channels_last=True)
    return Tensor(operate(*(net.plain(net.tensor(name)) for name in node.inputs)))


def _arithmetic(net: Network, op: str) -> Any:
    tf = net.tf
    return {"Add": tf.add, "Sub": tf.subtract, "Mul": tf.multiply, "Div": tf.divide}[op]


def _affine(op: str, constant: Any, *, constant_first: bool) -> tuple[Any, Any | None]:
    """An operator with a constant as ``x * factor + shift``."""
    one = np.ones_like(constant)
    match op:
        case "Add":
            return one, constant
        case "Sub":
            return (-one, constant) if constant_first else (one, -constant)
        case "Mul":
            return constant, None
        case _:
            return one / constant, None


def _per_channel(net: Network, value: Any, factor: Any, shift: Any | None) -> Any:
    """``value * factor + shift`` along the last axis, each channel with a scale of its own.

    Constants of LiteRT's sums and products have 8 bits for all channels together, which would show in the results. The
    weights of a depthwise convolution have a scale for each, and its bias 32 bits.
    """
    *rows, channels = (int(size) for size in value.shape[1:])
    weight = Weight(np.sign(factor).reshape(1, 1, 1, -1) * 127, np.abs(factor) / np.float32(127), "")
    filters = net.tf.reshape(net.weight_values(weight), [1, 1, channels, 1])
    pixels = value if len(rows) == 2 else net.tf.reshape(value, [-1, prod(rows), 1, channels])
    pixels = net.tf.nn.depthwise_conv2d(pixels, filters, [1, 1, 1, 1], "VALID")
    if shift is not None:
        pixels = net.tf.nn.bias_add(pixels, shift)
    return pixels if len(rows) == 2 else net.tf.reshape(pixels, [-1, *rows, channels])


def _relu(net: Network, node: Node) -> Tensor:
    tensor = net.tensor(node.inputs[0])
    if net.grids.leave_clip(node, 0.0, inf):
        return tensor
    return replace(tensor, value=net.tf.nn.relu(tensor.value))


def _clip(net: Network, node: Node) -> Tensor:
    tensor = net.tensor(node.inputs[0])
    low, high = (
        float(end) if (end := net.constant(node, i)) is not None else bound for i, bound in ((1, -inf), (2, inf))
    )
    if net.grids.leave_clip(node, low, high):
        return tensor
    if (low, high) == (0.0, 6.0):
        return replace(tensor, value=net.tf.nn.relu6(tensor.value))
    return replace(tensor, value=net.tf.clip_by_value(tensor.value, np.float32(low), np.float32(high)))


def _hard_sigmoid(net: Network, node: Node) -> Tensor:
    tensor = net.tensor(node.inputs[0])
    alpha, beta = (np.float32(node.attributes.get(name, value)) for name, value in (("alpha", 0.2), ("beta", 0.5)))
    if not net.is_integer:
        return Tensor(net.tf.clip_by_value(tensor.value * alpha + beta, 0.0, 1.0), tensor.channels_last)
    channels = int(tensor.value.shape[-1])
    if not net.grids.leave_clip(node, 0.0, 1.0):
        raise net.error(node, "must be rounded to one grid right away; give its result a single quantizer")
    line = _per_channel(net, tensor.value, np.full(channels, alpha), np.full(channels, beta))
    return Tensor(line, tensor.channels_last)


def _unary(net: Network, node: Node) -> Tensor:
    """Functions of one number, which int8 kernels look up in a table."""
    tensor, tf, given = net.tensor(node.inputs[0]), net.tf, node.attributes
    functions = {
        "Gelu": lambda x: tf.nn.gelu(x, approximate=given.get("approximate") == "tanh"),
        "HardSwish": lambda x: x * tf.nn.relu6(x + np.float32(3)) * np.float32(1 / 6),
        "LeakyRelu": lambda x: tf.nn.leaky_relu(x, given.get("alpha", 0.01)),
        "Sigmoid": tf.sigmoid,
        "Tanh": tf.tanh,
    }
    return _fixed(net, node, Tensor(functions[node.op](tensor.value), tensor.channels_last))


def _fixed(net: Network, node: Node, tensor: Tensor) -> Tensor:
    """Rounded to the grid that an operator's kernel insists on, if it does."""
    grid = FIXED.get(node.op)
    if grid is None or not net.is_integer:
        return tensor
    return replace(tensor, value=net.rounded(tensor.value, grid, source=None), grid=grid)


def _softmax(net: Network, node: Node) -> Tensor:
    value = net.plain(net.tensor(node.inputs[0]))
    if node.attributes.get("axis", -1) not in (-1, len(value.shape) - 1):
        raise net.error(node, f"is along axis {node.attributes['axis']}; LiteRT's is along the last one")
    probabilities = net.tf.nn.softmax
    return _fixed(net, node, Tensor(probabilities(value)))


def _mean(net: Network, node: Node) -> Tensor:
    """``ReduceMean``, and ``GlobalAveragePool`` as one over height and width."""
    if node.op == "GlobalAveragePool":
        return Tensor(net.tf.reduce_mean(net.channels_last(node.inputs[0]), [1, 2], keepdims=True), channels_last=True)
    tensor = net.tensor(node.inputs[0])
    rank = len(tensor.value.shape)
    given = net.constant(node, 1) if len(node.inputs) > 1 else node.attributes.get("axes")
    axes = sorted(int(axis) % rank for axis in (range(1, rank) if given is None else given))
    if node.attributes.get("keepdims", 1):
        places = [CHANNELS_LAST[axis] for axis in axes] if tensor.channels_last else axes
        return Tensor(net.tf.reduce_mean(tensor.value, places, keepdims=True), tensor.channels_last)
    if tensor.channels_last and axes == [2, 3]:
        return Tensor(net.tf.reduce_mean(tensor.value, [1, 2]))
    return Tensor(net.tf.reduce_mean(net.plain(tensor), axes))


def _same(net: Network, node: Node) -> Tensor:
    return net.tensor(node.inputs[0])


OPERATORS: Mapping[str, Operator] = {
    "AveragePool": average_pool,
    "Conv": conv,
    "MaxPool": max_pool,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Clip": _clip,
    "Concat": concat,
    "HardSigmoid": _hard_sigmoid,
    "Pad": pad,
    "Relu": _relu,
    "Softmax": _softmax,
    "Transpose": transpose,
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _elementwise),
    **dict.fromkeys(("Gelu", "HardSwish", "LeakyRelu", "Sigmoid", "Tanh"), _unary),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
    **dict.fromkeys(("Dropout", "Identity"), _same),
}
