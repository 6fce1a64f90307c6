"""Operators of LiteRT that only move numbers about."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from crcore.deploy._graph import Node
from crcore.deploy._litert_network import Network, Tensor

# Where the axes N, C, H, W of a graph stand in what TensorFlow computes, N, H, W, C.
CHANNELS_LAST = (0, 3, 1, 2)


def reshape(net: Network, node: Node) -> Tensor:
    """``Reshape``, ``Flatten``, ``Squeeze`` and ``Unsqueeze``, all of what is left of the batch axis apart."""
    tensor = net.tensor(node.inputs[0])
    sizes = tensor.sizes
    target = _target(net, node, sizes)
    # A map of one pixel has its elements in the same order in both layouts.
    value = tensor.value if tensor.channels_last and prod(sizes[1:]) == 1 else net.plain(tensor)
    return Tensor(net.tf.reshape(value, [-1, *target]), grid=tensor.grid)


def _target(net: Network, node: Node, sizes: list[int]) -> list[int]:
    """The sizes behind the batch that a node reshapes to."""
    constant = net.constant(node, 1)
    given = None if constant is None else [int(entry) for entry in np.atleast_1d(constant)]
    match node.op:
        case "Flatten":
            axis = node.attributes.get("axis", 1) % (len(sizes) + 1)
            found = [prod(sizes)] if axis == 1 else None
        case "Squeeze":
            axes = {axis % (len(sizes) + 1) for axis in given or []}
            found = [size for axis, size in enumerate(sizes, 1) if axis not in axes] if 0 not in axes and axes else None
        case "Unsqueeze":
            rank = len(sizes) + 1 + len(given or [])
            axes = {axis % rank for axis in given or []}
            left = iter(sizes)
            found = [1 if axis in axes else next(left) for axis in range(1, rank)] if 0 not in axes else None
        case _:
            found = _reshaped(given, sizes)
    if found is None:
        raise net.error(node, "moves the batch axis; reshape what is behind it")
    return found


def _reshaped(given: list[int] | None, sizes: list[int]) -> list[int] | None:
    """The target of ``Reshape`` without its batch: 0 is an axis as it was, -1 is what is left."""
    if not given:
        return None
    found = [sizes[i] if size == 0 and i < len(sizes) else size for i, size in enumerate(given[1:])]
    if found.count(-1) == 1:
        known = -prod(found)
        found[found.index(-1)] = prod(sizes) // known if known and prod(sizes) % known == 0 else -1
    return found if prod(found) == prod(sizes) and min(found, default=1) > 0 else None


def transpose(net: Network, node: Node) -> Tensor:
    """``Transpose``; between the layouts of images it is a matter of names."""
    tensor = net.tensor(node.inputs[0])
    order = tuple(node.attributes.get("perm", range(len(tensor.value.shape))[::-1]))
    if not tensor.channels_last and order == (0, 3, 1, 2):
        return replace(tensor, channels_last=True)
    if tensor.channels_last and order == (0, 2, 3, 1):
        return replace(tensor, channels_last=False)
    if order[0] != 0:
        raise net.error(node, f"moves the batch axis (perm {order}); move the others alone")
    return Tensor(net.tf.transpose(net.plain(tensor), order), grid=tensor.grid)


def concat(net: Network, node: Node) -> Tensor:
    """``Concat``, of tensors that are rounded to the grid of the result first: the kernel has one grid for all."""
    axis, grid = node.attributes["axis"], net.grids.ahead(node.output)
    channels_last = all(len(net.tensor(name).value.shape) == 4 for name in node.inputs)
    values = [net.channels_last(name) if channels_last else net.plain(net.tensor(name)) for name in node.inputs]
    if grid is not None:
        sources = [net.tensor(name).grid for name in node.inputs]
        values = [net.rounded(value, grid, source=source) for value, source in zip(values, sources, strict=True)]
    return Tensor(net.tf.concat(values, CHANNELS_LAST[axis % 4] if channels_last else axis), channels_last, grid)


def pad(net: Network, node: Node) -> Tensor:
    """``Pad`` with a number, or by reflection."""
    tensor, given = net.tensor(node.inputs[0]), net.constant(node, 1)
    rank, mode = len(tensor.value.shape), node.attributes.get("mode", "constant")
    axes, fill = net.constant(node, 3), net.constant(node, 2)
    if given is None or mode not in ("constant", "reflect"):
        raise net.error(node, f"has computed pads or mode {mode!r}; LiteRT has constant pads, 'constant' and 'reflect'")
    pads = [(0, 0)] * rank
    half = len(given) // 2
    for place, axis in enumerate(range(rank) if axes is None else axes):
        at = int(axis) % rank
        pads[CHANNELS_LAST[at] if tensor.channels_last else at] = (int(given[place]), int(given[half + place]))
    value = net.tf.pad(
        tensor.value, pads, mode.upper(), constant_values=0.0 if fill is None else np.float32(np.asarray(fill).item())
    )
    return replace(tensor, value=value)
