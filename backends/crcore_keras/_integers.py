"""A weight as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from crcore import LayerQuantizers, Quantizer, code_dtype, code_limits
from crcore_keras._fake_quantize import FakeQuantize, decode, encode


@keras.saving.register_keras_serializable("crcore")
class IntegerWeight(keras.layers.Layer):
    """A weight as integers: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: int8 where the grid fits, else uint8, int16 or int32; the shape of the weight. The values play no part in
            that choice, so that converted checkpoints load into each other.
        scale: float32 (float64 for float64 models), > 0; 0-d, or one per channel as broadcast against the weight.
        zero_point: int32, of the shape of ``scale``.
        quantizer: what the weight was trained with; ``bits`` is its width.
        limits: the lowest and the highest code that it can give.
    """

    def __init__(
        self,
        *,
        quantizer: Quantizer,
        shape: Any,
        scale_shape: Any,
        dtype: str = "float32",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False, trainable=False)
        self.quantizer = quantizer
        self.limits = code_limits(quantizer)
        self.codes, self.scale, self.zero_point = (
            self.add_weight(
                shape=tuple(shape), dtype=kind, initializer="zeros", trainable=False, name=name, autocast=False
            )
            for name, kind, shape in (
                ("codes", code_dtype(quantizer), shape),
                ("scale", dtype, scale_shape),
                ("zero_point", "int32", scale_shape),
            )
        )
        self.built = True

    @classmethod
    def of(cls, weight: Any, quantizer: FakeQuantize) -> IntegerWeight:
        """The integers of a float weight."""
        scale, zero_point = (ops.convert_to_numpy(value) for value in quantizer.affine(weight))
        made = cls(
            quantizer=quantizer.quantizer,
            shape=weight.shape,
            scale_shape=scale.shape,
            dtype=quantizer.compute_dtype,
        )
        made.codes.assign(ops.convert_to_numpy(quantizer.codes(weight)).astype(made.codes.dtype))
        made.scale.assign(scale)
        made.zero_point.assign(zero_point)
        return made

    @property
    def bits(self) -> int:
        """The width that was trained."""
        return self.quantizer.bits

    def values(self) -> Any:
        """The weight, in the dtype of the scale."""
        codes, zero_point = (ops.cast(each, self.compute_dtype) for each in (self.codes, self.zero_point))
        return (codes - zero_point) * self.scale

    def get_config(self) -> Mapping[str, Any]:
        """For ``from_config``."""
        return {
            "name": self.name,
            "quantizer": encode(LayerQuantizers(self.quantizer, None)),
            "shape": tuple(self.codes.shape),
            "scale_shape": tuple(self.scale.shape),
            "dtype": self.compute_dtype,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IntegerWeight:
        """The layer that `get_config` described, without its variables."""
        quantizer: Any = decode(config["quantizer"]).weights
        return cls(quantizer=quantizer, **{key: config[key] for key in config if key != "quantizer"})
