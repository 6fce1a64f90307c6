"""Layers that slide a window over images or sequences, and those that change their sizes, in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from keras import layers

from crcore_keras._graph_activations import activated
from crcore_keras._graph_network import Inputs, Network, Shape, Tensor
from crcore_keras._layers import kernels_of

# Subclasses of these may put zeros around what they are given, and say how many in ``explicit_padding``.
PADDED = (layers.Conv1D, layers.Conv2D, layers.DepthwiseConv1D, layers.DepthwiseConv2D)
# Zeros before and after, for each axis of the image.
Pads = Sequence[tuple[int, int]]


def _conv(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    (kernel,) = kernels_of(layer)
    x = net.quantized(_images(net, layer, x), getattr(layer, kernel.input_quantizer, None), net.layer)
    weight = net.weight(layer, kernel, _filters, 0)
    attributes = _window(net, layer, x, layer.kernel_size) | {"group": layer.groups}
    return _convolved(net, layer, shape, x, "Conv", weight, attributes)


def _depthwise(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    (kernel,) = kernels_of(layer)
    x = net.quantized(_images(net, layer, x), getattr(layer, kernel.input_quantizer, None), net.layer)
    weight = net.weight(layer, kernel, _depthwise_filters, 0)
    attributes = _window(net, layer, x, layer.kernel_size) | {"group": _channels(x)}
    return _convolved(net, layer, shape, x, "Conv", weight, attributes)


def _separable(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    """Two convolutions, and a quantizer for each."""
    depthwise, pointwise = kernels_of(layer)
    x = net.quantized(_images(net, layer, x), getattr(layer, depthwise.input_quantizer, None), net.part(depthwise))
    inputs: Inputs = [x, net.weight(layer, depthwise, _depthwise_filters, 0)]
    attributes = _window(net, layer, x, layer.kernel_size) | {"group": _channels(x)}
    channels = None if _channels(x) is None else _channels(x) * layer.depth_multiplier
    sizes = (*shape[:-1], channels) if layer.data_format == "channels_last" else (shape[0], channels, *shape[2:])
    x = net.add("Conv", inputs, sizes, moved=x.moved, attributes=attributes)
    x = net.quantized(x, getattr(layer, pointwise.input_quantizer, None), net.part(pointwise))
    return _convolved(net, layer, shape, x, "Conv", net.weight(layer, pointwise, _filters, 0), {})


def _transposed_conv(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    if layer.output_padding is not None:
        raise net.error(f"has output_padding={layer.output_padding}, which exported graphs do not know; leave it out")
    (kernel,) = kernels_of(layer)
    x = net.quantized(_images(net, layer, x), getattr(layer, kernel.input_quantizer, None), net.layer)
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    # How much longer each axis is before it is cropped than what Keras gives; negative: it is filled up at its end.
    beyond = [span - stride for span, stride in zip(spans, layer.strides, strict=True)]
    crops = [(max(n, 0) // 2, max(n, 0) - max(n, 0) // 2) if layer.padding == "same" else (0, 0) for n in beyond]
    attributes = {
        "strides": layer.strides,
        "dilations": layer.dilation_rate,
        "pads": _in_onnx(crops),
        "output_padding": [max(-n, 0) for n in beyond],
    }
    weight = net.weight(layer, kernel, _filters, 1)
    return _convolved(net, layer, shape, x, "ConvTranspose", weight, attributes)


def _convolved(
    net: Network, layer: Any, shape: Shape, x: Tensor, op: str, weight: str, attributes: Mapping[str, Any]
) -> Tensor:
    """A convolution with the bias and the activation of its layer."""
    inputs: Inputs = [x, weight, net.constant(layer.bias, "bias")] if layer.use_bias else [x, weight]
    return activated(net, layer.activation, net.add(op, inputs, shape, moved=x.moved, attributes=attributes))


def _pool(op: str) -> Callable[..., Tensor]:
    def write(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
        x = _images(net, layer, x)
        attributes = _window(net, layer, x, layer.pool_size) | {"kernel_shape": layer.pool_size}
        return net.add(op, [x], shape, moved=x.moved, attributes=attributes)

    return write


def _global_pool(op: str) -> Callable[..., Tensor]:
    def write(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
        x = _images(net, layer, x)
        ones = (1,) * (x.rank - 2)
        sizes = (x.shape[0], *ones, _channels(x)) if layer.data_format == "channels_last" else (*x.shape[:2], *ones)
        pooled = net.add(op, [x], sizes, moved=x.moved)
        return pooled if layer.keepdims else net.add("Flatten", [pooled], shape, attributes={"axis": 1})

    return write


def _zero_padding(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    x = _images(net, layer, x)
    pads = [0, 0, *(before for before, _ in layer.padding), 0, 0, *(after for _, after in layer.padding)]
    return net.add("Pad", [x, net.constant(np.array(pads, np.int64), "pads")], shape, moved=x.moved)


def _cropping(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    x = _images(net, layer, x)
    starts = [before for before, _ in layer.cropping]
    ends = [-after if after else np.iinfo(np.int64).max for _, after in layer.cropping]
    axes = range(2, 2 + len(starts))
    parts = {"starts": starts, "ends": ends, "axes": axes}
    inputs: Inputs = [x, *(net.constant(np.array(value, np.int64), name) for name, value in parts.items())]
    return net.add("Slice", inputs, shape, moved=x.moved)


def _up_sampling(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    if layer.interpolation != "nearest":
        raise net.error(f"has interpolation={layer.interpolation!r}; exported graphs have 'nearest'")
    x = _images(net, layer, x)
    scales = net.constant(np.array([1, 1, *layer.size], np.float32), "scales")
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return net.add("Resize", [x, "", scales], shape, moved=x.moved, attributes=attributes)


def _images(net: Network, layer: Any, x: Tensor) -> Tensor:
    return net.images(x, layer.data_format)


def _channels(x: Tensor) -> Any:
    """How many channels an image has, as `Network.images` gave it."""
    return x.shape[-1] if x.moved else x.shape[1]


def _sizes(x: Tensor) -> Shape:
    """Height and width of an image, as `Network.images` gave it."""
    return x.shape[1:-1] if x.moved else x.shape[2:]


def _window(net: Network, layer: Any, x: Tensor, window: Sequence[int]) -> dict[str, Any]:
    """Strides, dilations and pads of a convolution or of pooling."""
    ones = (1,) * len(window)
    dilations = getattr(layer, "dilation_rate", ones)
    given: Pads = getattr(layer, "explicit_padding", [(0, 0)] * len(window))
    sizes = [None if size is None else size + sum(pad) for size, pad in zip(_sizes(x), given, strict=True)]
    own = [_padding(net, layer.padding, *axis) for axis in zip(sizes, window, layer.strides, dilations, strict=True)]
    pads = [(a + c, b + d) for (a, b), (c, d) in zip(given, own, strict=True)]
    found = {"strides": layer.strides, "pads": _in_onnx(pads)}
    return found if dilations == ones else found | {"dilations": dilations}


def _padding(net: Network, padding: str, size: int | None, window: int, stride: int, dilation: int) -> tuple[int, int]:
    """The zeros before and after one axis; with "same", the far side gets the odd one."""
    span = (window - 1) * dilation + 1
    if padding == "causal":
        return span - 1, 0
    if padding != "same":
        return 0, 0
    if size is None and stride > 1:
        raise net.error(
            "pads images of any size with padding='same' and strides, which has no fixed number of zeros; give the "
            "model an input of fixed size, such as keras.Input((224, 224, 3))"
        )
    total = max(span - stride if size is None else (-(-size // stride) - 1) * stride + span - size, 0)
    return total // 2, total - total // 2


def _in_onnx(pads: Pads) -> list[int]:
    return [before for before, _ in pads] + [after for _, after in pads]


def _filters(kernel: Any) -> Any:
    """``[*k, in, out]`` as ``[out, in, *k]``; of a transposed convolution ``[*k, out, in]`` as ``[in, out, *k]``."""
    n = kernel.ndim
    return kernel.transpose(n - 1, n - 2, *range(n - 2))


def _depthwise_filters(kernel: Any) -> Any:
    """``[*k, channels, multiplier]`` as ``[channels * multiplier, 1, *k]``."""
    n = kernel.ndim
    return kernel.transpose(n - 2, n - 1, *range(n - 2)).reshape(-1, 1, *kernel.shape[:-2])


WRITERS: Mapping[type, Callable[..., Tensor]] = MappingProxyType(
    {
        **dict.fromkeys((layers.Conv1D, layers.Conv2D), _conv),
        **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise),
        **dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), _separable),
        **dict.fromkeys((layers.Conv1DTranspose, layers.Conv2DTranspose), _transposed_conv),
        **dict.fromkeys((layers.MaxPooling1D, layers.MaxPooling2D), _pool("MaxPool")),
        **dict.fromkeys((layers.AveragePooling1D, layers.AveragePooling2D), _pool("AveragePool")),
        **dict.fromkeys(
            (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D), _global_pool("GlobalAveragePool")
        ),
        **dict.fromkeys((layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D), _global_pool("GlobalMaxPool")),
        layers.Cropping2D: _cropping,
        layers.UpSampling2D: _up_sampling,
        layers.ZeroPadding2D: _zero_padding,
    }
)
