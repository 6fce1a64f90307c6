"""What the tests of deployment share: marker graphs, made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from crcore.deploy import DOMAIN, FAKE_QUANTIZE, INTEGER_WEIGHT, marker_model


class GraphMaker:
    """Makes a marker graph, node by node; each method returns the name of the tensor that it makes."""

    def __init__(self, inputs: Mapping[str, tuple[int, ...]]) -> None:
        """`inputs`: shapes without the batch, by name."""
        self.inputs = dict(inputs)
        self.random = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, domain: str = "", name: str = "", **attributes: Any) -> str:
        name = name or f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def floats(self, value: Any) -> str:
        return self.constant(np.asarray(value, np.float32))

    def quantized(
        self,
        x: str,
        scale: float,
        *,
        lo: int = 0,
        hi: int = 255,
        zero_point: int = 0,
        layer: str = "",
        **attributes: Any,
    ) -> str:
        parameters = self.floats(scale), self.constant(np.int32(zero_point))
        return self.node(FAKE_QUANTIZE, x, *parameters, domain=DOMAIN, lo=lo, hi=hi, layer=layer, **attributes)

    def signed(self, x: str, scale: float, *, bits: int = 8, layer: str = "") -> str:
        return self.quantized(x, scale, lo=-(2 ** (bits - 1)), hi=2 ** (bits - 1) - 1, layer=layer)

    def weight(
        self,
        codes: Any,
        scale: Any,
        *,
        layer: str = "layer",
        zero_point: int = 0,
        axis: int | None = None,
        limits: tuple[int, int] = (-127, 127),
    ) -> str:
        scale = np.asarray(scale, np.float32)
        parameters = self.floats(scale), self.constant(np.full(scale.shape, zero_point, np.int32))
        attributes = {} if axis is None else {"axis": axis}
        return self.node(
            INTEGER_WEIGHT,
            self.constant(np.asarray(codes)),
            *parameters,
            domain=DOMAIN,
            lo=limits[0],
            hi=limits[1],
            layer=layer,
            **attributes,
        )

    def codes(self, *shape: int, bits: int = 8) -> Any:
        """Random codes of a narrow grid, the ends among them."""
        end = 2 ** (bits - 1) - 1
        codes = self.random.integers(-end, end + 1, shape).astype(np.int8)
        codes.flat[:2] = -end, end
        return codes

    def scales(self, n: int, largest: float = 0.01) -> Any:
        """Random scales, one per channel."""
        return self.random.uniform(0.2 * largest, largest, n).astype(np.float32)

    def conv(
        self,
        x: str,
        shape: tuple[int, int, int, int],
        *,
        layer: str = "conv",
        bits: int = 8,
        scale: Any = None,
        bias: bool = True,
        **attributes: Any,
    ) -> str:
        """A convolution with random integers ``[outputs, inputs / group, height, width]``, a scale for each output."""
        found = self.scales(shape[0]) if scale is None else np.asarray(scale, np.float32)
        axis = 0 if found.ndim else None
        end = 2 ** (bits - 1) - 1
        weight = self.weight(self.codes(*shape, bits=bits), found, layer=layer, axis=axis, limits=(-end, end))
        biases = [self.floats(self.random.normal(0, 0.2, shape[0]))] if bias else []
        return self.node("Conv", x, weight, *biases, **attributes)

    def gemm(self, x: str, inputs: int, outputs: int, *, layer: str = "dense", scale: Any = None) -> str:
        """A matrix product with random integers ``[outputs, inputs]``."""
        found = self.scales(outputs) if scale is None else np.asarray(scale, np.float32)
        weight = self.weight(self.codes(outputs, inputs), found, layer=layer, axis=0 if found.ndim else None)
        return self.node("Gemm", x, weight, self.floats(self.random.normal(0, 0.2, outputs)), transB=1)

    def model(self, *outputs: str) -> onnx.ModelProto:
        described = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in self.inputs.items()
        ]
        found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        return marker_model(self._nodes, inputs=described, outputs=found, constants=self._constants)

    def sample(self, n: int = 4, spread: float = 1.0) -> dict[str, Any]:
        """Random inputs by name."""
        return {
            name: self.random.normal(0, spread, (n, *shape)).astype(np.float32) for name, shape in self.inputs.items()
        }
