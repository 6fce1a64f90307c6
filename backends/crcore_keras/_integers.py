"""A weight as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from crcore_keras._fake_quantize import FakeQuantize


@keras.saving.register_keras_serializable("crcore")
class IntegerWeight(keras.layers.Layer):
    """A weight as integers: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: int8 where the grid fits, else uint8, int16 or int32; the shape of the weight. The values play no part in
            that choice, so that converted checkpoints load into each other.
        scale: float32 (float64 for float64 models), > 0; 0-d, or one per channel as broadcast against the weight.
        zero_point: int32, of the shape of ``scale``.
        bits: the width that was trained.
    """

    def __init__(
        self, *, bits: int, shape: Any, storage: str, scale_shape: Any, dtype: str = "float32", name: str | None = None
    ) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False, trainable=False)
        self.bits = bits
        self.codes, self.scale, self.zero_point = (
            self.add_weight(
                shape=tuple(shape), dtype=kind, initializer="zeros", trainable=False, name=name, autocast=False
            )
            for name, kind, shape in (
                ("codes", storage, shape),
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
            bits=quantizer.quantizer.bits,
            shape=weight.shape,
            storage=_storage(*quantizer.code_limits(weight)),
            scale_shape=scale.shape,
            dtype=quantizer.compute_dtype,
        )
        made.codes.assign(ops.convert_to_numpy(quantizer.codes(weight)).astype(made.codes.dtype))
        made.scale.assign(scale)
        made.zero_point.assign(zero_point)
        return made

    def values(self) -> Any:
        """The weight, in the dtype of the scale."""
        codes, zero_point = (ops.cast(each, self.compute_dtype) for each in (self.codes, self.zero_point))
        return (codes - zero_point) * self.scale

    def get_config(self) -> Mapping[str, Any]:
        """For ``from_config``."""
        return {
            "name": self.name,
            "bits": self.bits,
            "shape": tuple(self.codes.shape),
            "storage": self.codes.dtype,
            "scale_shape": tuple(self.scale.shape),
            "dtype": self.compute_dtype,
        }


def _storage(lowest: int, highest: int) -> str:
    for dtype in ("int8", "uint8", "int16"):
        limits = np.iinfo(dtype)
        if limits.min <= lowest and highest <= limits.max:
            return dtype
    return "int32"
