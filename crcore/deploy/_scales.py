"""Scales of weights within what integer kernels take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crcore.deploy._fold import LINEAR
from crcore.deploy._graph import Graph
from crcore.deploy._regions import result_of

_LARGEST_MULTIPLIER = 254.0  # XNNPACK, which runs LiteRT's int8 kernels, takes less than 256


def make_room_for_biases(graph: Graph, finer: Mapping[str, int] | None = None) -> None:
    """Let every bias fit the accumulator of 32 bits, whose step is the product of the scales.

    A channel that batch normalization has all but switched off has a scale near zero and a bias that is not: its scale
    is raised to where the bias takes 30 bits, which leaves what the channel's weights contribute negligible.

    Args:
        graph: changed in place.
        finer: by weight, by what whole number its scale is going to be divided.
    """
    makers = graph.makers()
    for node in graph.nodes:
        if node.op not in LINEAR or len(node.inputs) < 3 or node.inputs[2] not in graph.constants:
            continue
        if node.op == "ConvTranspose":  # without an integer kernel
            continue
        data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
        if data is None or not data.is_quantizer or weight is None or not weight.is_weight:
            continue
        scale = graph.constants[weight.inputs[1]]
        step = graph.constants[data.inputs[1]] / np.float32((finer or {}).get(weight.output, 1))
        least = np.abs(graph.constants[node.inputs[2]]) / (step * np.float32(2**30))
        least = np.maximum(least if scale.ndim else least.max(), np.float32(2.0**-100)).astype(np.float32)
        if (np.abs(scale) < least).any():
            raised = np.where(np.abs(scale) < least, least, scale)
            weight.inputs[1] = graph.constant(raised.astype(np.float32), f"{weight.inputs[1]}.raised")


def bound_multipliers(graph: Graph) -> None:
    """Keep the step of an accumulator below 254 steps of the result, since XNNPACK refuses a network with more.

    Such a channel has next to no variance, by which batch normalization divided: its result is one value, or clipped on
    either side of its grid, with a step of 254 as well.
    """
    makers, readers = graph.makers(), graph.readers()
    for node in graph.nodes:
        data, weight = (makers.get(name) for name in node.inputs[:2]) if node.op in LINEAR else (None, None)
        if data is None or weight is None or not (data.is_quantizer and weight.is_weight):
            continue
        after = readers[result_of(graph, node)]
        if len(after) != 1 or not after[0].is_quantizer:
            continue
        most = _LARGEST_MULTIPLIER * graph.constants[after[0].inputs[1]] / graph.constants[data.inputs[1]]
        scale = graph.constants[weight.inputs[1]]
        if (np.abs(scale) > most).any():
            bounded = np.clip(scale, -most, most).astype(np.float32)
            weight.inputs[1] = graph.constant(bounded, f"{weight.inputs[1]}.bounded")
