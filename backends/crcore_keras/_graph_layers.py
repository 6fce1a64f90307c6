"""What each kind of Keras layer is in a graph; those with a window to slide are in `_graph_windows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import layers
from onnx import TensorProto

from crcore_keras import _graph_windows as windows
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._graph_activations import activated, activation, activation_layer, prelu
from crcore_keras._graph_network import Inputs, Network, Shape, Tensor, numbers
from crcore_keras._layers import Kernel, kernels_of

# Writes a layer: the network, the layer, the shape of what it gives, and what it is given.
Writer = Callable[..., Tensor]


def _dense(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    (kernel,) = kernels_of(layer)
    x = net.as_in_keras(x)
    x = net.quantized(x, getattr(layer, kernel.input_quantizer, None), net.layer)
    bias = layer.bias if layer.use_bias else None
    if x.rank == 2:
        weight = net.weight(layer, kernel, np.transpose, 0)
        inputs: Inputs = [x, weight] if bias is None else [x, weight, net.constant(bias, "bias")]
        return activated(net, layer.activation, net.add("Gemm", inputs, shape, attributes={"transB": 1}))
    return _product(net, layer, kernel, bias, shape, x)


def _einsum_dense(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    (kernel,) = kernels_of(layer)
    inputs, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    inputs, weight = inputs.split(",")
    if len(weight) != 2 or not inputs.endswith(weight[0]) or output != inputs[:-1] + weight[1]:
        raise net.error(
            f"computes {layer.equation!r}; exported graphs have the product of the last axis with a matrix, such as "
            "'abc,cd->abd': write the layer as Dense and Reshape"
        )
    x = net.as_in_keras(x)
    x = net.quantized(x, getattr(layer, kernel.input_quantizer, None), net.layer)
    return _product(net, layer, kernel, layer.bias, shape, x)


def _product(net: Network, layer: Any, kernel: Kernel, bias: Any, shape: Shape, x: Tensor) -> Tensor:
    """The last axis times a matrix ``[in, out]``."""
    y = net.add("MatMul", [x, net.weight(layer, kernel, np.asarray, 1)], shape)
    if bias is not None:
        y = net.add("Add", [y, net.constant(bias, "bias")], shape)
    return activated(net, layer.activation, y)


def _embedding(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    (kernel,) = kernels_of(layer)
    if layer.mask_zero:
        raise net.error("has mask_zero=True; exported graphs have no masks: use mask_zero=False")
    weight = net.weight(layer, kernel, np.asarray, 0)
    if x.dtype not in (TensorProto.INT32, TensorProto.INT64):
        x = net.add("Cast", [x], x.shape, attributes={"to": TensorProto.INT32})
    return net.add("Gather", [weight, x], shape, attributes={"axis": 0})


def _batch_normalization(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    axis = layer.axis % x.rank
    if axis not in (1, x.rank - 1):
        raise net.error(f"has axis={layer.axis}; exported graphs normalize channels, axis 1 or the last one")
    x = net.channels_first(x) if axis == x.rank - 1 else net.as_in_keras(x)
    size: Any = x.shape[axis]
    values = {
        "gamma": layer.gamma if layer.scale else np.ones(size, np.float32),
        "beta": layer.beta if layer.center else np.zeros(size, np.float32),
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
    }
    inputs: Inputs = [x, *(net.constant(value, name) for name, value in values.items())]
    return net.add("BatchNormalization", inputs, shape, moved=x.moved, attributes={"epsilon": float(layer.epsilon)})


def _layer_normalization(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    axes = sorted(a % x.rank for a in ([layer.axis] if isinstance(layer.axis, int) else layer.axis))
    if axes != list(range(axes[0], x.rank)) or layer.rms_scaling:
        raise net.error("has rms_scaling or other axes than the last ones, which exported graphs do not know")
    x = net.as_in_keras(x)
    sizes: Any = x.shape[axes[0] :]
    inputs: Inputs = [x, net.constant(np.ones(sizes, np.float32) if layer.gamma is None else layer.gamma, "gamma")]
    if layer.beta is not None:
        inputs.append(net.constant(layer.beta, "beta"))
    attributes = {"axis": axes[0] - x.rank, "epsilon": float(layer.epsilon)}
    return net.add("LayerNormalization", inputs, shape, attributes=attributes)


def _rescaling(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    scale, offset = (np.asarray(value, np.float32) for value in (layer.scale, layer.offset))
    if scale.ndim and keras.config.image_data_format() == "channels_first":  # as the layer itself does
        scale = scale.reshape(scale.shape + (1,) * (3 - scale.ndim))
    return _line(net, x, scale, offset)


def _normalization(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    mean = numbers(layer.mean)
    deviation = np.maximum(np.sqrt(numbers(layer.variance)), keras.config.epsilon())
    if layer.invert:
        return _line(net, x, deviation, mean)
    if mean.any():
        x = net.add("Sub", [x, net.beside(x, mean, "mean")], x.shape, moved=x.moved)
    return _line(net, x, 1 / deviation, np.float32(0))


def _line(net: Network, x: Tensor, factor: Any, shift: Any) -> Tensor:
    """``x * factor + shift``; a factor of one and a shift of zero are left out."""
    if (np.asarray(factor) != 1).any():
        x = net.add("Mul", [x, net.beside(x, factor, "factor")], x.shape, moved=x.moved)
    if np.asarray(shift).any():
        x = net.add("Add", [x, net.beside(x, shift, "shift")], x.shape, moved=x.moved)
    return x


def _merged(net: Network, op: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """Tensors one after the other, element by element."""
    if len({x.rank for x in inputs}) != 1:
        raise net.error(f"is given tensors of {[x.rank for x in inputs]} axes; reshape them to equally many")
    total, *others = net.alike(inputs)
    for other in others:
        sizes = tuple(_larger(a, b) for a, b in zip(total.shape, other.shape, strict=True))
        total = net.add(op, [total, other], sizes, moved=total.moved)
    return total


def _larger(a: int | None, b: int | None) -> int | None:
    return b if a == 1 else a


def _average(net: Network, layer: Any, shape: Shape, *inputs: Tensor) -> Tensor:
    return _line(net, _merged(net, "Add", inputs), np.float32(1 / len(inputs)), np.float32(0))


def _elementwise(op: str) -> Writer:
    return lambda net, layer, shape, *inputs: _merged(net, op, inputs)


def _concatenate(net: Network, layer: Any, shape: Shape, *inputs: Tensor) -> Tensor:
    tensors = net.alike(inputs)
    attributes = {"axis": tensors[0].axis(layer.axis)}
    return net.add("Concat", tensors, shape, moved=tensors[0].moved, attributes=attributes)


def _flatten(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    if layer.data_format == "channels_first" and x.rank > 2:
        x = net.as_in_keras(x)  # which has the channels at axis 1, and they go to the end
        sizes = (x.shape[0], *x.shape[2:], x.shape[1])
        x = net.add("Transpose", [x], sizes, attributes={"perm": (0, *range(2, x.rank), 1)})
    return net.add("Flatten", [_in_order(net, x)], shape, attributes={"axis": 1})


def _reshaped(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    x, sizes = _in_order(net, x), shape[1:]
    # Images of one pixel, as squeeze-and-excite makes them, are the same numbers in both layouts.
    moved = len(shape) == 4 and all(size == 1 for size in shape[1:-1])
    sizes = (sizes[-1], *sizes[:-1]) if moved else sizes
    target = [-1, *sizes] if None not in sizes else [0, *(-1 if size is None else size for size in sizes)]
    return net.add("Reshape", [x, net.constant(np.array(target, np.int64), "shape")], shape, moved=moved)


def _in_order(net: Network, x: Tensor) -> Tensor:
    """The tensor with its elements in the order that they have in Keras."""
    return x if x.is_pixel else net.as_in_keras(x)


def _permute(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    return net.add("Transpose", [net.as_in_keras(x)], shape, attributes={"perm": (0, *layer.dims)})


def _same(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    return x


def _fake_quantize(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    return net.quantized(x, layer, net.layer)


WRITERS: Mapping[type, Writer] = MappingProxyType(
    {
        layers.Activation: activation,
        layers.Average: _average,
        layers.BatchNormalization: _batch_normalization,
        layers.Concatenate: _concatenate,
        layers.Dense: _dense,
        layers.EinsumDense: _einsum_dense,
        layers.Embedding: _embedding,
        layers.Flatten: _flatten,
        layers.LayerNormalization: _layer_normalization,
        layers.Normalization: _normalization,
        layers.Permute: _permute,
        layers.PReLU: prelu,
        layers.Rescaling: _rescaling,
        layers.Reshape: _reshaped,
        FakeQuantize: _fake_quantize,
        **dict.fromkeys((layers.ELU, layers.LeakyReLU, layers.ReLU, layers.Softmax), activation_layer),
        **{
            kind: _elementwise(op)
            for kind, op in {
                layers.Add: "Add",
                layers.Maximum: "Max",
                layers.Minimum: "Min",
                layers.Multiply: "Mul",
                layers.Subtract: "Sub",
            }.items()
        },
        # What acts in training alone.
        **dict.fromkeys(
            (
                layers.ActivityRegularization,
                layers.AlphaDropout,
                layers.Dropout,
                layers.GaussianDropout,
                layers.GaussianNoise,
                layers.Identity,
                layers.RandomBrightness,
                layers.RandomContrast,
                layers.RandomFlip,
                layers.RandomRotation,
                layers.RandomTranslation,
                layers.RandomZoom,
                layers.SpatialDropout1D,
                layers.SpatialDropout2D,
            ),
            _same,
        ),
        **windows.WRITERS,
    }
)
MERGING = (
    layers.Average,
    layers.Add,
    layers.Concatenate,
    layers.Maximum,
    layers.Minimum,
    layers.Multiply,
    layers.Subtract,
)
