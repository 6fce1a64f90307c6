"""Operators of LiteRT that slide a window over images: convolutions and pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from crcore.deploy._graph import Node
from crcore.deploy._litert_network import Network, Tensor, Weight

_Pair = tuple[int, int]


@dataclass(frozen=True)
class _Window:
    """A window that slides over height and width, given here in this order."""

    image: _Pair
    sizes: _Pair
    strides: _Pair
    dilations: _Pair
    pads: tuple[_Pair, _Pair]  # before and after, for each axis

    def spans(self) -> list[int]:
        """From the first element of the window to behind its last."""
        return [(size - 1) * dilation + 1 for size, dilation in zip(self.sizes, self.dilations, strict=True)]

    def same(self) -> tuple[_Pair, _Pair]:
        """The pads of ``SAME`` in TensorFlow, and of ``SAME_UPPER`` in ONNX."""
        pads = []
        for size, span, stride in zip(self.image, self.spans(), self.strides, strict=True):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            pads.append((total // 2, total - total // 2))
        return pads[0], pads[1]

    def rounded_up(self) -> _Window:
        """With what ``ceil_mode`` adds, as padding: a last window that starts inside of the image."""
        pads = []
        for size, span, stride, (before, after) in zip(self.image, self.spans(), self.strides, self.pads, strict=True):
            last = -(-(size + before + after - span) // stride) * stride
            if last >= size + before:
                last -= stride
            pads.append((before, max(after, last + span - size - before)))
        return replace(self, pads=(pads[0], pads[1]))


def conv(net: Network, node: Node) -> Tensor:
    """``Conv`` over images."""
    weight = net.weight(node, channels=0)
    if weight.codes.ndim != 4:
        raise net.error(node, f"is over {weight.codes.ndim - 2} axes; in LiteRT it is over images, [N, C, H, W]")
    window = _window(net, node, weight.codes.shape[2:])
    value, padding = _padded(net, node, window, 0.0)
    groups, outputs = node.attributes.get("group", 1), weight.codes.shape[0]
    strides, dilations = [1, *window.strides, 1], [1, *window.dilations, 1]
    filters = net.weight_values(replace(weight, codes=weight.codes.transpose(2, 3, 1, 0)))
    if groups > 1 and weight.codes.shape[1] == 1:
        # As the raw operator: tf.nn.depthwise_conv2d rearranges the image where it is dilated.
        filters = net.tf.reshape(filters, [*window.sizes, groups, outputs // groups])
        value = net.tf.raw_ops.DepthwiseConv2dNative(
            input=value, filter=filters, strides=strides, padding=padding, dilations=dilations
        )
    else:
        value = net.tf.nn.conv2d(value, filters, strides, padding, dilations=dilations)
    return Tensor(net.with_bias(node, value), channels_last=True)


def max_pool(net: Network, node: Node) -> Tensor:
    """``MaxPool`` over images."""
    window = _window(net, node, node.attributes["kernel_shape"])
    if window.dilations != (1, 1) or len(node.outputs) > 1:
        raise net.error(node, "is dilated or gives indices, which LiteRT's has not; pool without")
    if node.attributes.get("ceil_mode"):
        window = window.rounded_up()
    grid = net.tensor(node.inputs[0]).grid
    value, padding = _padded(net, node, window, np.finfo(np.float32).min if grid is None else grid.lowest)
    return Tensor(net.tf.nn.max_pool2d(value, window.sizes, window.strides, padding), channels_last=True, grid=grid)


def average_pool(net: Network, node: Node) -> Tensor:
    """``AveragePool`` over images."""
    window = _window(net, node, node.attributes["kernel_shape"])
    if window.dilations != (1, 1) or (node.attributes.get("ceil_mode") and window.rounded_up() != window):
        raise net.error(node, "is dilated or needs its ceil_mode, which LiteRT's has not; pad the image before it")
    if not (node.attributes.get("count_include_pad") or window.pads == ((0, 0), (0, 0))):
        if window.pads != window.same():
            raise net.error(node, f"leaves its padding {window.pads} out of the mean, as LiteRT does for 'same' alone")
        value = net.channels_last(node.inputs[0])
        return Tensor(net.tf.nn.avg_pool2d(value, window.sizes, window.strides, "SAME"), channels_last=True)
    value, padding = _padded(net, node, window, 0.0)
    if not net.is_integer:
        return Tensor(net.tf.nn.avg_pool2d(value, window.sizes, window.strides, padding), channels_last=True)
    # The integer kernel gives the mean in the grid of what it reads; a convolution rounds to the grid behind it.
    channels = int(value.shape[-1])
    scale = np.full(1, 1 / (127 * prod(window.sizes)), np.float32)
    filters = net.weight_values(Weight(np.full((*window.sizes, 1, channels), 127), scale, ""))
    filters = net.tf.reshape(filters, [*window.sizes, channels, 1])
    value = net.tf.nn.depthwise_conv2d(value, filters, [1, *window.strides, 1], padding)
    return Tensor(value, channels_last=True)


def _window(net: Network, node: Node, sizes: Any) -> _Window:
    given = node.attributes
    if len(sizes) != 2:
        raise net.error(node, f"is over {len(sizes)} axes; in LiteRT it is over images, [N, C, H, W]")
    height, width = (int(size) for size in net.channels_last(node.inputs[0]).shape[1:3])
    strides, dilations = (tuple(given.get(name, (1, 1))) for name in ("strides", "dilations"))
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    window = _Window((height, width), tuple(sizes), strides, dilations, ((top, bottom), (left, right)))
    match given.get("auto_pad", "NOTSET"):
        case "SAME_UPPER":
            return replace(window, pads=window.same())
        case "SAME_LOWER":
            (top, bottom), (left, right) = window.same()
            return replace(window, pads=((bottom, top), (right, left)))
        case _:
            return window


def _padded(net: Network, node: Node, window: _Window, fill: Any) -> tuple[Any, str]:
    """What an operator reads, and how TensorFlow should pad it: padded here where it has no name for that.

    ``SAME`` leaves the padding out of a mean; one that is padded here counts it.
    """
    value = net.channels_last(node.inputs[0])
    if window.pads == ((0, 0), (0, 0)):
        return value, "VALID"
    if window.pads == window.same() and node.op != "AveragePool":
        return value, "SAME"
    return net.tf.pad(value, [(0, 0), *window.pads, (0, 0)], constant_values=fill), "VALID"
