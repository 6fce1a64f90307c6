"""The layer that holds a quantizer's arrays and applies it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from crcore import CRCoreError, LayerQuantizers, Quantizer, Recipe
from crcore_keras._bind import fake_quantize, stop_gradient
from crcore_keras._xp import xp

# Places in the variable `flags`.
_INITIALIZED, _SIGNED, _FROZEN = range(3)
_UNKNOWN_SIGN = -1


@keras.saving.register_keras_serializable("crcore")
class FakeQuantize(keras.layers.Layer):
    """Quantize and dequantize a tensor, with the straight-through gradient of ``quantizer``.

    `prepare` puts one on each weight and each input; use it yourself where a layer's own code multiplies with tensors
    that `prepare` cannot see.

    Learned arrays are trainable variables, observed ones are not; they have the names that the quantizer gives them
    (``scale``; ``alpha`` for PACT; ``low``, ``high`` for MinMax). They are set from data once: from the first tensor
    that arrives in train mode outside of a compiled function, or by `initialize`. ``initialized`` is saved, so that
    loading or resuming never sets them again.

    Arithmetic is float32 (float64 for float64 models), whatever the dtype policy says; the result has the input's
    dtype.

    Args:
        quantizer: what to apply.
        role: "activation" quantizes per tensor and takes its first axis for the batch; "weight" has no batch.
        shape: of the arrays: ``()``, or one per channel as broadcast against the tensor, such as ``(1, 1, 1, 64)``.
        dtype: "float32" or "float64".

    Raises:
        CRCoreError: the quantizer does not suit the role; or, when called, it has not been initialized and is in
            inference mode or being compiled.

    >>> import crcore, numpy
    >>> quantize = FakeQuantize(crcore.LSQ(bits=2, signed=True)).initialize(numpy.array([-1.0, 1.0]))
    >>> keras.ops.convert_to_numpy(quantize(numpy.array([-9.0, 0.9, 2.2], "float32")))
    array([-4.,  0.,  2.], dtype=float32)
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        role: Literal["weight", "activation"] = "activation",
        shape: tuple[int, ...] = (),
        dtype: str = "float32",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.quantizer = self._given = quantizer.for_role(role)
        if self.quantizer.per_channel and not shape:
            raise CRCoreError(
                f"{self.quantizer!r} needs the shape of its scales; give shape=(1, 1, 1, channels) for a convolution's "
                "kernel, or use per_channel=False"
            )
        self.role = role
        self.shape = tuple(shape)
        self.where = ""  # where it sits in the model, for error messages; `prepare` sets it
        self.enabled = True  # a float teacher switches it off
        self.arrays = [
            self.add_weight(
                shape=shape, initializer="ones", trainable=self.quantizer.learned, name=name, autocast=False
            )
            for name in self.quantizer.parameters
        ]
        self.flags = self.add_weight(shape=(3,), dtype="int8", initializer="zeros", trainable=False, name="flags")
        sign = _UNKNOWN_SIGN if self.quantizer.signed is None else int(self.quantizer.signed)
        self.flags.assign(np.array([not self.quantizer.parameters and sign >= 0, sign, False], "int8"))
        self.built = True
        self.read_flags()

    def call(self, x: Any, training: bool = False) -> Any:
        """The quantized values, of the shape and dtype of ``x``."""
        if not self.enabled:
            return x
        if not self._initialized:
            self._initialize_from_first_batch(x, training)
        wide = self._widen(x)
        arrays = self.arrays_for(wide, training)
        return ops.cast(fake_quantize(wide, self.quantizer, arrays, self._elements(x)), x.dtype)

    def codes(self, x: Any) -> Any:
        """The integers of ``x``, as floats: ``call(x) == (codes(x) - zero_point) * scale``."""
        wide = self._widen(x)
        return self.quantizer.codes(wide, *self.arrays_for(wide), xp=xp)

    def code_limits(self, x: Any) -> tuple[int, int]:
        """The lowest and the highest code that a tensor like ``x`` can get, however large its values."""
        wide = self._widen(x)
        arrays = self.arrays_for(wide)
        far = ops.full_like(wide, float(np.finfo(self.compute_dtype).max))  # far outside are the ends of the grid
        ends = [ops.convert_to_numpy(self.quantizer.codes(end, *arrays, xp=xp)) for end in (-far, far)]
        return int(ends[0].min()), int(ends[1].max())

    def affine(self, x: Any = None) -> tuple[Any, Any]:
        """``(scale, zero_point)`` in use, in the arrays' shape; for ``x`` where they are recomputed from the tensor.

        float32 and int32 tensors.
        """
        if x is not None and self._recomputed:
            arrays = tuple(ops.reshape(array, self.shape) for array in self.arrays_for(self._widen(x)))
        else:
            arrays = tuple(ops.convert_to_tensor(array) for array in self.arrays)
        scale, zero_point = self.quantizer.affine(*arrays, xp=xp)
        return ops.convert_to_tensor(scale, self.compute_dtype), ops.cast(zero_point, "int32")

    @property
    def scale(self) -> Any:
        """The step between two codes, > 0: the value in use, which a stored one below zero would not be. Read only."""
        return self.affine()[0]

    @property
    def zero_point(self) -> Any:
        """The code of real zero, int32. Read only."""
        return self.affine()[1]

    @property
    def initialized(self) -> bool:
        """Whether the arrays have been set from data."""
        self.read_flags()
        return self._initialized

    @property
    def frozen(self) -> bool:
        """Whether the ranges (MinMax) stay as they are, also in training."""
        return bool(ops.convert_to_numpy(self.flags)[_FROZEN])

    def initialize(self, x: Any) -> FakeQuantize:
        """Set the arrays from the data ``x``, now; returns itself.

        Raises:
            CRCoreError: ``x`` is empty, or holds NaN or infinity.
        """
        # In NumPy, so that every engine starts from the same bits.
        data = np.asarray(ops.convert_to_numpy(ops.cast(x, self.compute_dtype)))
        if data.size == 0 or not np.isfinite(data).all():
            what = "an empty tensor" if data.size == 0 else "a tensor with NaN or infinity"
            raise CRCoreError(f"{self._label()} cannot take its scale from {what}; give it a batch of real data first")
        if self.quantizer.signed is None:
            self.quantizer = replace(self.quantizer, signed=bool((data < 0).any()))  # type: ignore[type-var]
        fresh = self.quantizer.init(data, axes=self._axes(data.ndim))
        for array, value in zip(self.arrays, fresh, strict=True):
            array.assign(np.reshape(value, array.shape))
        self.flags.assign(np.array([True, bool(self.quantizer.signed), self.frozen], "int8"))
        self._initialized = True
        return self

    def freeze(self, frozen: bool = True) -> FakeQuantize:
        """Stop observing (MinMax): the ranges stay as they are, also in training. Saved; returns itself.

        A weight's range stays that of its last forward in train mode.
        """
        flags = ops.convert_to_numpy(self.flags).copy()
        flags[_FROZEN] = frozen
        self.flags.assign(flags)
        return self

    def adopt(self, source: FakeQuantize) -> None:
        """Take over the arrays and flags of ``source``."""
        for mine, theirs in zip([*self.arrays, self.flags], [*source.arrays, source.flags], strict=True):
            mine.assign(ops.convert_to_numpy(theirs))  # a copy: JAX donates buffers, and each only once
        self.read_flags()

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras; refuses the variables of another quantizer."""
        names = [*self.quantizer.parameters, "flags"]
        shapes = [tuple(store[key].shape) for key in sorted(store.keys(), key=int)]
        if shapes != [tuple(array.shape) for array in [*self.arrays, self.flags]]:
            raise CRCoreError(
                f"{self._label()}: the saved variables have the shapes {shapes}, {self._given!r} has {names}; load "
                "into a model that was prepared with the recipe that was saved"
            )
        signed = int(store[str(len(names) - 1)][_SIGNED])
        if self._given.signed is not None and signed not in (int(self._given.signed), _UNKNOWN_SIGN):
            raise CRCoreError(f"{self._label()}: the saved quantizer is another than {self._given!r}")
        super().load_own_variables(store)
        self.read_flags()

    def get_config(self) -> dict[str, Any]:
        """For `from_config`."""
        config = {"name": self.name, "role": self.role, "shape": self.shape, "dtype": self.compute_dtype}
        quantizers = (self._given, None) if self.role == "weight" else (None, self._given)
        return config | {"quantizer": encode(LayerQuantizers(*quantizers))}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FakeQuantize:
        """The layer that `get_config` described, without its variables."""
        given = decode(config["quantizer"])
        quantizer: Any = given.weights or given.activations
        return cls(quantizer, **{key: config[key] for key in config if key != "quantizer"})

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape

    @property
    def _recomputed(self) -> bool:
        """Whether the arrays are a function of the tensor at hand: weights whose range is not learned."""
        return self.role == "weight" and not self.quantizer.learned and bool(self.arrays)

    def arrays_for(self, x: Any, training: bool = False) -> tuple[Any, ...]:
        """The arrays to use for ``x``, broadcast against it; observing happens here, in train mode."""
        stored = tuple(self._broadcast(array, x) for array in self.arrays)
        observe = getattr(self.quantizer, "observe", None)
        if self._recomputed:
            values = self.quantizer.init(stop_gradient(x), axes=self._axes(x.ndim), xp=xp)
        elif observe is not None and training:
            values = observe(stop_gradient(x), *stored, axes=self._axes(x.ndim), xp=xp)
        else:
            return stored
        frozen = self.flags[_FROZEN] != 0
        values = tuple(xp.where(frozen, old, new) for old, new in zip(stored, values, strict=True))
        if training:
            for array, value in zip(self.arrays, values, strict=True):
                array.assign(ops.reshape(value, array.shape))
        return values

    def _axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that share one scale."""
        return tuple(axis for axis in range(ndim) if not self.shape or self.shape[axis] == 1)

    def _broadcast(self, array: Any, x: Any) -> Any:
        # A copy: TensorFlow's convert_to_tensor returns the variable itself, which custom_gradient refuses.
        value = ops.copy(array)
        return ops.reshape(value, (1,) * x.ndim) if not self.shape else value

    def _elements(self, x: Any) -> Any:
        if self.role == "weight":
            return math.prod(x.shape) // math.prod(self.shape)
        shape = ops.shape(x)[1:] if x.ndim > 1 else ops.shape(x)
        if all(isinstance(size, int) for size in shape):
            return math.prod(shape)
        return math.prod(ops.cast(size, self.compute_dtype) for size in shape)

    def _widen(self, x: Any) -> Any:
        if hasattr(x, "assign"):  # a variable, see _broadcast
            x = ops.copy(x)
        return ops.cast(ops.convert_to_tensor(x), self.compute_dtype)

    def _initialize_from_first_batch(self, x: Any, training: bool) -> None:
        try:
            self.read_flags()  # set_weights may have brought them
            if self._initialized:
                return
            data = ops.convert_to_numpy(x)
        except Exception:  # each engine has an error of its own for values that are not there yet
            raise CRCoreError(
                f"{self._label()} is not initialized; call the student once on a batch of training data, "
                "student(batch, training=True), before it is compiled into a step or a model of your own"
            ) from None
        if not training:
            raise CRCoreError(
                f"{self._label()} is not initialized; call the student once on a batch of training data, "
                "student(batch, training=True), or load a checkpoint, before inference"
            )
        self.initialize(data)

    def read_flags(self) -> None:
        """Act by the flags that the variable holds; called after it was assigned."""
        initialized, signed, _ = ops.convert_to_numpy(self.flags)
        self._initialized = bool(initialized)
        if self._given.signed is None and signed != _UNKNOWN_SIGN:
            self.quantizer = replace(self._given, signed=bool(signed))  # type: ignore[type-var]

    def _label(self) -> str:
        return f"FakeQuantize {self.where or self.name!r}"


def encode(quantizers: LayerQuantizers) -> dict[str, Any]:
    """The quantizers of one layer as a dictionary for JSON, in the form that recipes are saved in."""
    return Recipe(quantizers.weights, quantizers.activations, first_last_bits=None).to_dict()


def decode(data: Mapping[str, Any]) -> LayerQuantizers:
    """The quantizers that `encode` described."""
    try:
        recipe = Recipe.from_dict(data)
    except CRCoreError as error:
        raise CRCoreError(
            f"the saved quantizers cannot be read ({error}); load the file with the version of crcore that saved it, "
            "or upgrade crcore where that is newer"
        ) from None
    return LayerQuantizers(recipe.weights, recipe.activations)
