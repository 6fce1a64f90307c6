"""The trained grids of a network, as int8 tensors of LiteRT hold them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from crcore import CRCoreError
from crcore.deploy._graph import Graph, Node

_STEPS = 255  # from the bottom of int8 to its top
_FUSING = ("Add", "Conv", "Gemm", "HardSigmoid", "MatMul", "Mul", "Sub")  # int8 kernels with a ReLU of their own


@dataclass(frozen=True)
class Grid:
    """The ends of a trained grid in steps from real zero, and the step."""

    low: int
    high: int
    scale: float

    @property
    def lowest(self) -> Any:
        """The smallest value, float32."""
        return np.float32(self.low * self.scale)

    @property
    def highest(self) -> Any:
        """The largest value, float32."""
        return np.float32(self.high * self.scale)

    @property
    def is_narrow(self) -> bool:
        """Whether int8 holds more codes than the grid has."""
        return self.high - self.low < _STEPS

    def ending_at_top(self) -> tuple[Any, Any]:
        """The range of an int8 tensor with this step whose last code is the last of the grid."""
        return np.float32((self.high - _STEPS) * self.scale), self.highest

    def starting_at_bottom(self) -> tuple[Any, Any]:
        """The range of an int8 tensor with this step whose first code is the first of the grid."""
        return self.lowest, np.float32((self.low + _STEPS) * self.scale)


# The one grid that LiteRT's int8 kernels have for the result of an operator.
FIXED = {"Sigmoid": Grid(0, 255, 1 / 256), "Softmax": Grid(0, 255, 1 / 256), "Tanh": Grid(-128, 127, 1 / 128)}


class Grids:
    """The grids of a graph's tensors."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._makers, self._readers = graph, graph.makers(), graph.readers()
        # Clips that were left to the rounding behind them: the tensor that they make, and the ends as real numbers.
        self._clips: dict[str, tuple[float, float]] = {}
        for name in graph.inputs:
            grids = {self.of(node) for node in self._readers[name] if node.is_quantizer}
            if len(grids) > 1:
                raise CRCoreError(
                    f"input {name!r} is rounded to {len(grids)} different grids; an int8 input has one: share a "
                    "quantizer between the layers that read it"
                )

    def of(self, quantizer: Node) -> Grid:
        """The grid of a ``FakeQuantize``, with the clips that were left to it."""
        scale, zero_point = (self._graph.constants[name] for name in quantizer.inputs[1:])
        lo, hi, layer = (quantizer.attributes[name] for name in ("lo", "hi", "layer"))
        if quantizer.attributes.get("binary"):
            raise CRCoreError(
                f"the input of layer {layer!r} has the codes -1 and 1 alone, and LiteRT has no integer sign function; "
                "train activations with 2 bits or more, or export to ONNX"
            )
        if hi - lo > _STEPS:
            raise CRCoreError(
                f"the input of layer {layer!r} has codes from {lo} to {hi}, which int8 cannot hold; train activations "
                "with at most 8 bits, or export to ONNX"
            )
        low, high = lo - int(zero_point), hi - int(zero_point)
        if not low <= 0 <= high:
            raise CRCoreError(
                f"the input of layer {layer!r} has codes from {lo} to {hi} with zero at {int(zero_point)}, outside of "
                "them; LiteRT's grids contain zero: train with a quantizer that represents it"
            )
        floor, ceiling = (
            end if abs(end) == inf else round(float(np.float32(end) / np.float32(scale)))
            for end in self._clips.get(quantizer.inputs[0], (-inf, inf))
        )
        return Grid(int(max(low, floor)), int(min(high, ceiling)), float(scale))

    def ahead(self, tensor: str) -> Grid | None:
        """The grid that a tensor is rounded to right away; None where something else reads it too."""
        readers = self._readers[tensor]
        is_alone = len(readers) == 1 and tensor not in self._graph.outputs
        return self.of(readers[0]) if is_alone and readers[0].is_quantizer else None

    def leave_clip(self, node: Node, low: float, high: float) -> bool:
        """Leave a clip around zero to the rounding right behind it, as nearer ends; False where there is none.

        Rounding is monotone: to clip and then to round is to round and then to clip at the rounded ends.
        """
        can_be_left = low <= 0 <= high and self.ahead(node.output) is not None
        if can_be_left:
            self._clips[node.output] = low, high
        return can_be_left

    def takes_relu(self, tensor: str) -> bool:
        """Whether the kernel that makes a tensor has a ReLU of its own, and nothing but a rounding reads its result."""
        maker = self._makers.get(tensor)
        while maker is not None and maker.output in self._clips and maker.op != "HardSigmoid":
            tensor, maker = maker.inputs[0], self._makers.get(maker.inputs[0])
        return maker is not None and maker.op in _FUSING and len(self._readers[tensor]) == 1
