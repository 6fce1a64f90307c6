"""A Keras network while it is written as a graph: its tensors, their layouts, its weights and quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from keras import ops
from onnx import TensorProto, helper, numpy_helper

from crcore import CRCoreError, deploy
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import Kernel

Shape = tuple[int | None, ...]
Inputs = list["str | Tensor"]  # what an operator reads: constants by name, and tensors
FLOAT = int(TensorProto.FLOAT)
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Tensor:
    """What a layer gives.

    ``shape`` is what Keras says. ``moved``: whether the channels, the last axis in Keras, are axis 1 in the graph:
    ``[N, C, H, W]`` where Keras has ``[N, H, W, C]``.
    """

    name: str
    shape: Shape
    moved: bool = False
    dtype: int = FLOAT

    @property
    def rank(self) -> int:
        """The number of axes, the batch among them."""
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """Where an axis of Keras is in the graph."""
        axis %= self.rank
        if not self.moved or axis == 0:
            return axis
        return 1 if axis == self.rank - 1 else axis + 1

    @property
    def is_pixel(self) -> bool:
        """Whether nothing but the channels has more than one element, so that layouts differ in shape alone."""
        return all(size == 1 for size in self.shape[1:-1])


class Network:
    """The parts of a graph. ``layer``, ``kind``: the layer that is being written and its class."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.layer = self.kind = ""
        self._taken: set[str] = set()
        self._twins: dict[str, Tensor] = {}  # the same tensor in the other layout
        self._weights: dict[tuple[int, str, int], str] = {}
        self._grids: dict[int, list[str]] = {}

    def error(self, what: str) -> CRCoreError:
        """An error that names the layer."""
        return CRCoreError(f"layer {self.layer!r} ({self.kind}) {what}")

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet: ``hint`` itself where it is free."""
        name, count = hint, 1
        while name in self._taken:
            name, count = f"{hint}.{count}", count + 1
        self._taken.add(name)
        return name

    def constant(self, value: Any, hint: str) -> str:
        """The name of a new constant, in float32 where it is a number with a fraction."""
        array = numbers(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        name = self.fresh(f"{self.layer}.{hint}")
        self.constants.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def add(
        self,
        op: str,
        inputs: Sequence[str | Tensor],
        shape: Shape,
        *,
        moved: bool = False,
        attributes: Mapping[str, Any] = _NONE,
        domain: str = "",
        hint: str = "",
    ) -> Tensor:
        """What a new operator gives; ``shape`` and ``moved`` describe it as those of a `Tensor`."""
        made = Tensor(self.fresh(hint or f"{self.layer}.{op}"), shape, moved)
        names = [each if isinstance(each, str) else each.name for each in inputs]
        self.nodes.append(helper.make_node(op, names, [made.name], name=made.name, domain=domain, **attributes))
        self.values.append(described(made))
        return made

    # Layouts

    def channels_first(self, x: Tensor) -> Tensor:
        """The tensor with its channels, the last axis in Keras, at axis 1."""
        order = (0, x.rank - 1, *range(1, x.rank - 1))
        return x if x.moved or x.rank < 3 else self._twin(x, order, moved=True)

    def as_in_keras(self, x: Tensor) -> Tensor:
        """The tensor with its axes in the order of Keras."""
        return self._twin(x, (0, *range(2, x.rank), 1), moved=False) if x.moved else x

    def images(self, x: Tensor, data_format: str) -> Tensor:
        """The tensor as ONNX has images: channels at axis 1."""
        return self.channels_first(x) if data_format == "channels_last" else self.as_in_keras(x)

    def alike(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that are computed with element by element, in one layout."""
        if any(each.moved for each in tensors) and len({each.rank for each in tensors}) == 1:
            return [self.channels_first(each) for each in tensors]
        return [self.as_in_keras(each) for each in tensors]

    def beside(self, x: Tensor, value: Any, hint: str) -> str:
        """A constant that broadcasts against the tensor, given as it does in Keras."""
        array = np.asarray(numbers(value), np.float32)
        if x.moved and array.ndim:
            array = np.moveaxis(array.reshape((1,) * (x.rank - array.ndim) + array.shape), -1, 1)
        return self.constant(array, hint)

    def _twin(self, x: Tensor, order: tuple[int, ...], *, moved: bool) -> Tensor:
        if x.name not in self._twins:
            twin = self.add(
                "Transpose", [x], x.shape, moved=moved, attributes={"perm": order}, hint=f"{x.name}.transposed"
            )
            self._twins |= {x.name: twin, twin.name: x}
        return self._twins[x.name]

    # What was trained

    def part(self, kernel: Kernel) -> str:
        """What the weight's layer is called: a separable convolution is two."""
        return f"{self.layer}.{kernel.part}".removeprefix(".") if kernel.part else self.layer

    def weight(self, layer: Any, kernel: Kernel, arrange: Callable[[Any], Any], axis: int) -> str:
        """The name of a weight: integers, or a float constant for a layer that was left in float.

        Args:
            layer: the layer that is being written.
            kernel: which of its weights.
            arrange: from the axes that Keras has to those that the operator takes.
            axis: the output channels there.
        """
        key = (id(layer), kernel.part, axis)
        if key not in self._weights:
            self._weights[key] = self._new_weight(layer, kernel, arrange, axis)
        return self._weights[key]

    def _new_weight(self, layer: Any, kernel: Kernel, arrange: Callable[[Any], Any], axis: int) -> str:
        integers, name = getattr(layer, kernel.integer_weight, None), self.part(kernel)
        if integers is None:
            return self.constant(arrange(numbers(kernel.variable(layer))), kernel.attribute)
        scale, zero_point = numbers(integers.scale), numbers(integers.zero_point)
        flat: tuple[int, ...] = (-1,) if scale.size > 1 else ()
        lowest, highest = integers.limits
        attributes = {"lo": lowest, "hi": highest, "layer": name} | ({"axis": axis} if flat else {})
        codes = arrange(numbers(integers.codes))
        parts = {"integers": codes, "step": scale.reshape(flat), "zero": zero_point.reshape(flat)}
        made = self.fresh(f"{self.layer}.{kernel.attribute}")
        inputs = [self.constant(value, f"{kernel.attribute}.{part}") for part, value in parts.items()]
        self.nodes.append(
            helper.make_node(deploy.INTEGER_WEIGHT, inputs, [made], name=made, domain=deploy.DOMAIN, **attributes)
        )
        return made

    def quantized(self, x: Tensor, quantizer: FakeQuantize | None, layer: str) -> Tensor:
        """The tensor, rounded to a trained grid; as it is where there is none.

        Raises:
            CRCoreError: a quantizer of the user's own with a scale per channel, or with one for each tensor.
        """
        if quantizer is None or not quantizer.enabled:
            return x
        if quantizer.shape or quantizer._recomputed:
            raise self.error(
                "is a FakeQuantize with a scale per channel, or for weights, which exported graphs have for the "
                "weights of layers alone; use FakeQuantize(quantizer, role='activation')"
            )
        lowest, highest = quantizer.code_limits(np.zeros(1, np.float32))
        if id(quantizer) not in self._grids:
            parts = dict(zip(("step", "zero"), map(numbers, quantizer.affine()), strict=True))
            self._grids[id(quantizer)] = [self.constant(value, f"input.{part}") for part, value in parts.items()]
        binary = {"binary": 1} if (lowest, highest) == (-1, 1) and quantizer.quantizer.bits == 1 else {}
        return self.add(
            deploy.FAKE_QUANTIZE,
            [x, *self._grids[id(quantizer)]],
            x.shape,
            moved=x.moved,
            attributes={"lo": lowest, "hi": highest, "layer": layer} | binary,
            domain=deploy.DOMAIN,
            hint=f"{layer}.input",
        )


def numbers(value: Any) -> Any:
    """A variable, a tensor or a number in NumPy."""
    return np.asarray(ops.convert_to_numpy(value))


def described(x: Tensor) -> onnx.ValueInfoProto:
    """Type and sizes of a tensor, as the graph has it."""
    _, *sizes = (x.shape[0], x.shape[-1], *x.shape[1:-1]) if x.moved else x.shape or (None,)
    return helper.make_tensor_value_info(x.name, x.dtype, ["N", *sizes])
