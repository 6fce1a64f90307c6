"""A marker graph, computed with TensorFlow's operators: tensors, their layouts and their grids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from onnx import helper
from onnx.reference import ReferenceEvaluator

from crcore import CRCoreError
from crcore.deploy._graph import Graph, Node
from crcore.deploy._litert_grids import Grid, Grids
from crcore.deploy._loading import one_line

LARGEST = 127  # int8 kernels take weights from -127 to 127
# The converter takes channels that span less than 1e-6 for zeros. Normalization can switch a channel off to below that.
_LEAST_SCALE = 2.0**-27


@dataclass(frozen=True, eq=False)
class Tensor:
    """What TensorFlow computes for a tensor of the graph."""

    value: Any
    # Whether its axes stand as N, H, W, C where the graph says N, C, H, W.
    channels_last: bool = False
    # What it was rounded to.
    grid: Grid | None = None

    @property
    def sizes(self) -> list[int]:
        """The sizes of the axes but the batch, as the graph orders them."""
        sizes = [int(size) for size in self.value.shape[1:]]
        return [sizes[-1], *sizes[:-1]] if self.channels_last else sizes


@dataclass(frozen=True, eq=False)
class Weight:
    """``codes * scale``, or values in float."""

    codes: Any  # from -127 to 127; float32 values where there is no scale
    scale: Any | None  # [1] or [channels], float32, >= 0
    layer: str


Operator = Callable[["Network", Node], Tensor]


class Network:
    """Computes a graph inside a ``tf.function``.

    Args:
        tf: the module ``tensorflow``.
        graph: prepared.
        operators: what computes a node, by its operator.
        is_integer: whether every tensor between operators has a grid.
    """

    def __init__(self, tf: Any, graph: Graph, operators: Mapping[str, Operator], *, is_integer: bool) -> None:
        self.tf, self.is_integer = tf, is_integer
        self._graph, self._operators = graph, operators
        self._makers, self.grids = graph.makers(), Grids(graph)
        self._constants = dict(graph.constants)
        self._tensors: dict[str, Tensor] = {}
        self._products = 0

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The graph's outputs, in its layout."""
        self._tensors = {name: Tensor(value) for name, value in zip(self._graph.inputs, inputs, strict=True)}
        for node in self._graph.nodes:
            if not node.is_weight:
                with self.tf.name_scope(re.sub(r"[^A-Za-z0-9.]+", "_", node.output).strip("_") or "tensor"):
                    self._compute(node)
        return [self.plain(self.tensor(name)) for name in self._graph.outputs]

    def _compute(self, node: Node) -> None:
        if all(name in self._constants or not name for name in node.inputs) and not node.is_quantizer:
            self._constants[node.output] = _computed(node, self._constants)
        elif node.op == "Shape":  # what reshapes are made of: -1 stands for the batch
            sizes = [-1, *self.tensor(node.inputs[0]).sizes]
            first, last = node.attributes.get("start", 0), node.attributes.get("end")
            self._constants[node.output] = np.array(sizes[first:last], np.int64)
        elif node.is_quantizer:
            self._tensors[node.output] = self._quantized(node)
        elif node.op in self._operators:
            self._tensors[node.output] = self._operators[node.op](self, node)
        else:
            raise self.error(node, f"has no form in LiteRT; it has {', '.join(sorted(self._operators))}")

    # What operators read

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not constant."""
        if name not in self._tensors:
            raise CRCoreError(f"{name!r} is a constant where LiteRT's operators take what the network computes")
        return self._tensors[name]

    def constant(self, node: Node, index: int) -> Any | None:
        """The constant that a node takes at a place; None where it takes nothing or no constant there."""
        name = node.inputs[index] if len(node.inputs) > index else ""
        return self._constants.get(name)

    def weight(self, node: Node, channels: int) -> Weight:
        """The second input of an operator, ``channels`` the axis of its output channels."""
        maker = self._makers.get(node.inputs[1])
        if maker is None or not maker.is_weight:
            values = self.constant(node, 1)
            if values is None:
                raise self.error(node, "takes a computed weight; LiteRT's integer kernels take a constant one")
            if self.is_integer:
                raise self.error(
                    node, "was left in float; quantize its layer (Recipe without skip for it), or export to ONNX"
                )
            return Weight(values, None, "")
        codes, scale, zero_point = (self._constants[name] for name in maker.inputs)
        layer = maker.attributes["layer"]
        if scale.size > 1 and maker.attributes["axis"] != channels:
            raise self.error(node, f"has a scale along axis {maker.attributes['axis']}, LiteRT needs axis {channels}")
        scale, zero_point = scale.reshape(-1).astype(np.float32), zero_point.reshape(-1).astype(np.int32)
        along = [-1 if axis == channels else 1 for axis in range(codes.ndim)]
        codes = codes.astype(np.int32) - zero_point.reshape(along)
        # The one code at the end of a grid that is not narrow becomes its neighbour; `write_litert` says how many did.
        beyond = np.count_nonzero(np.abs(codes) > LARGEST + 1)
        if beyond:
            raise CRCoreError(
                f"layer {layer!r}: {beyond} of {codes.size} weights lie outside of -127..127, which is what LiteRT's "
                f"int8 kernels hold (found {codes.min()}..{codes.max()} about zero); train it with symmetric weights, "
                "or with fewer bits"
            )
        codes = np.clip(codes, -LARGEST, LARGEST)
        return Weight(np.where(scale.reshape(along) < 0, -codes, codes), np.abs(scale), layer)

    def error(self, node: Node, what: str) -> CRCoreError:
        """An error that names the operator, and the layer at it or before it."""
        return CRCoreError(f"{node.op} (makes {node.output!r}{self._place(node)}) {what}")

    def _place(self, node: Node) -> str:
        waiting, seen = [node], {id(node)}
        while waiting:
            current = waiting.pop(0)
            if current.attributes.get("layer"):
                return f", {'in' if current in self._near(node) else 'behind'} layer {current.attributes['layer']!r}"
            for maker in self._near(current):
                if id(maker) not in seen:
                    seen.add(id(maker))
                    waiting.append(maker)
        return ""

    def _near(self, node: Node) -> Iterator[Node]:
        return (self._makers[name] for name in node.inputs if name in self._makers)

    # Layouts

    def plain(self, tensor: Tensor) -> Any:
        """The value with the axes that the graph says."""
        if not tensor.channels_last:
            return tensor.value
        channels, *spatial = tensor.sizes
        if prod(spatial) == 1:
            return self.tf.reshape(tensor.value, [-1, channels, 1, 1])
        return self.tf.transpose(tensor.value, [0, 3, 1, 2])

    def channels_last(self, name: str) -> Any:
        """The value of a tensor ``[N, C, H, W]`` as ``[N, H, W, C]``."""
        tensor = self.tensor(name)
        if not tensor.channels_last:
            channels, *spatial = tensor.sizes
            if prod(spatial) == 1:
                value = self.tf.reshape(tensor.value, [-1, 1, 1, channels])
            else:
                value = self.tf.transpose(tensor.value, [0, 2, 3, 1])
            self._tensors[name] = tensor = replace(tensor, value=value, channels_last=True)
        return tensor.value

    # Rounding

    def weight_values(self, weight: Weight) -> Any:
        """Weights as TensorFlow takes them, from codes with the output channels last."""
        if weight.scale is None:
            return self.tf.constant(weight.codes)
        scale = np.broadcast_to(np.maximum(weight.scale, np.float32(_LEAST_SCALE)), weight.codes.shape[-1:])
        return self.tf.quantization.fake_quant_with_min_max_vars_per_channel(
            (weight.codes * scale).astype(np.float32),
            -LARGEST * scale,
            LARGEST * scale,
            num_bits=8,
            narrow_range=True,
        )

    def with_bias(self, node: Node, value: Any) -> Any:
        """A product with the bias of its node, if it has one."""
        if len(node.inputs) < 3 or not node.inputs[2]:
            return value
        bias = self.constant(node, 2)
        if bias is None or np.size(bias) not in (1, value.shape[-1]):
            raise self.error(
                node, "has a bias that is computed, or not one number per channel; LiteRT's kernels need that"
            )
        return self.tf.nn.bias_add(value, np.broadcast_to(np.reshape(bias, -1), value.shape[-1:]).astype(np.float32))

    def rounded(self, value: Any, grid: Grid, *, source: Grid | None, relu: bool = False) -> Any:
        """A value on a trained grid.

        Kernels clip at the ends of int8, and nowhere else but at zero. So the top of the grid is put at the top of
        int8, and where it does not fill int8, its bottom is put at the bottom of int8 after that.

        Args:
            value: a tensor of TensorFlow.
            grid: to round to.
            source: the grid that the value is on already.
            relu: whether the bottom is zero, and the kernel that makes the value can clip there.
        """
        if source == grid:
            return value
        is_below = source is None or source.lowest < grid.lowest
        is_above = source is None or source.highest > grid.highest
        ranges = []
        if is_above or not (grid.is_narrow and is_below):
            ranges.append(grid.ending_at_top())
        if grid.is_narrow and is_below and not relu:
            ranges.append(grid.starting_at_bottom())
        value, is_rounded = self.tf.nn.relu(value) if relu else value, source is not None
        for ends in ranges:
            if is_rounded:
                value = value * self._almost_one()
            value, is_rounded = self.tf.quantization.fake_quant_with_min_max_vars(value, *ends), True
        return value

    def _almost_one(self) -> Any:
        """A factor that keeps two roundings apart; each time another one.

        The converter drops one of two roundings that follow each other, also where a product with 1 is between them,
        and makes one product of two equal ones, whose two roundings it then leaves in float. Integer products change
        grids more exactly than LiteRT's own QUANTIZE, whose multiplier has 8 bits in XNNPACK.
        """
        self._products += 1
        return np.float32(1 - self._products * 2.0**-24)

    def _quantized(self, node: Node) -> Tensor:
        """A ``FakeQuantize``."""
        tensor, grid = self.tensor(node.inputs[0]), self.grids.of(node)
        relu = tensor.grid is None and grid.low == 0 and grid.is_narrow and self.grids.takes_relu(node.inputs[0])
        value = self.rounded(tensor.value, grid, source=tensor.grid, relu=relu)
        return Tensor(value, tensor.channels_last, grid)


def _computed(node: Node, constants: Mapping[str, Any]) -> Any:
    """What a node makes of constants."""
    domain, _, op = node.op.rpartition(".")
    proto = helper.make_node(op, node.inputs, node.outputs, domain=domain, **node.attributes)
    try:
        outputs: Any = ReferenceEvaluator(proto).run(None, {name: constants[name] for name in node.inputs if name})
    except Exception as error:  # for instance sizes that depend on the batch, which no constant holds
        raise CRCoreError(
            f"operator {op} ({node.output!r}) has no form in LiteRT ({one_line(error)}); export to ONNX instead"
        ) from error
    return outputs[0]
