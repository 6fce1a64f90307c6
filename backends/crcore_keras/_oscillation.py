"""Weights that oscillate between integers: the two remedies of Nagel et al. (2022), on tensors that may be traced."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from crcore import CRCoreError, Dampening, Freezing, FreezingState, Oscillation
from crcore_keras._bind import stop_gradient
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import QuantizedLayer, kernels_of
from crcore_keras._tree import walk
from crcore_keras._xp import xp


class QuantizedWeight(NamedTuple):
    """A weight that is read through a quantizer."""

    name: str  # of the layer, as `prepare` gives it
    variable: Any
    quantizer: FakeQuantize

    def arguments(self) -> tuple[Any, ...]:
        """The latent weight, its quantizer, and the quantizer's arrays as constants: what the core takes."""
        x = ops.copy(self.variable)
        return x, self.quantizer.quantizer, *map(stop_gradient, self.quantizer.arrays_for(x))


def quantized_weights(student: Any) -> list[QuantizedWeight]:
    """The quantized weights of a prepared model, each once.

    Raises:
        CRCoreError: there are none.
    """
    found: dict[int, QuantizedWeight] = {}
    for name, layer in walk(student):
        for kernel in kernels_of(layer) if isinstance(layer, QuantizedLayer) else ():
            quantizer = getattr(layer, kernel.weight_quantizer)
            if quantizer is not None:
                variable = kernel.variable(layer)
                place = f"{name}.{kernel.part}".strip(".")
                found.setdefault(id(variable), QuantizedWeight(place, variable, quantizer))
    if not found:
        raise CRCoreError(
            f"{type(student).__name__} has no quantized weight; give a student from crcore_keras.prepare(model, recipe)"
        )
    return list(found.values())


def dampening_loss(dampening: Dampening, student: Any, *, step: Any) -> Any:
    """The weighted term, 0-d. The gradient reaches the latent weights, and no scale.

    Args:
        dampening: its weight.
        student: a prepared model.
        step: optimizer steps made so far, a 0-d tensor.
    """
    terms = []
    for weight in quantized_weights(student):
        x, quantizer, *arrays = weight.arguments()
        quantized = stop_gradient(quantizer.forward(x, *arrays, xp=xp))
        terms.append(dampening.distance(x, quantized, quantizer, *arrays, xp=xp))
    return dampening.weight_at(ops.cast(step, terms[0].dtype), xp=xp) * sum(terms)


class Freezer:
    """Iterative weight freezing of a student, its state in variables of the model that trains it.

    On JAX a compiled step keeps nothing that is written to a trained variable. Frozen weights are therefore written at
    the start of every step, from what is kept, and once more when training ends.
    """

    def __init__(self, owner: Any, student: Any, freezing: Freezing) -> None:
        self._freezing = freezing
        self._weights = quantized_weights(student)
        self._states = [_variables(owner, weight, index) for index, weight in enumerate(self._weights)]

    def start(self) -> None:
        """Begin with the weights as they are; not traced."""
        for weight, state in zip(self._weights, self._states, strict=True):
            codes = ops.convert_to_numpy(weight.quantizer.codes(weight.variable))
            for variable, value in zip(state, _flat(FreezingState.start(codes)), strict=True):
                variable.assign(value.copy())  # JAX donates buffers, and each only once

    def update(self, updates: Any, *, is_due: Any) -> None:
        """Track and freeze, where an optimizer step was made since the last time, and write frozen weights.

        Args:
            updates: those made before this one.
            is_due: whether this is one; a bool tensor.
        """
        for weight, variables in zip(self._weights, self._states, strict=True):
            x, quantizer, *arrays = weight.arguments()
            state = FreezingState(Oscillation(*map(ops.copy, variables[:-1])), ops.copy(variables[-1]))
            step = ops.cast(updates, x.dtype)
            moved = self._freezing.update(state, stop_gradient(x), quantizer, *arrays, step=step, xp=xp)
            kept = [ops.where(is_due, new, old) for new, old in zip(_flat(moved), _flat(state), strict=True)]
            for variable, value in zip(variables, kept, strict=True):
                variable.assign(value)
            state = FreezingState(Oscillation(*kept[:-1]), kept[-1])
            weight.variable.assign(self._freezing.apply(state, x, quantizer, *arrays, xp=xp))

    @property
    def frozen(self) -> float:
        """The fraction of the quantized weights that are frozen."""
        masks = [ops.convert_to_numpy(variables[-1]) for variables in self._states]
        return float(sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks))


def _variables(owner: Any, weight: QuantizedWeight, index: int) -> list[Any]:
    """Of the fields of `Oscillation`, and the mask."""
    dtypes = dict.fromkeys(Oscillation._fields, weight.quantizer.compute_dtype) | {"frozen": "bool"}
    return [
        owner.add_weight(
            shape=weight.variable.shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
            name=f"{field}_{index}",
        )
        for field, dtype in dtypes.items()
    ]


def _flat(state: FreezingState) -> list[Any]:
    return [*state.oscillation, state.frozen]
