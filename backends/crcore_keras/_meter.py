"""`OscillationMeter`: how many integer weights change while a model trains."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from crcore import Oscillation, OscillationRates, oscillation_update
from crcore_keras._consistency_model import ConsistencyModel
from crcore_keras._oscillation import quantized_weights


class OscillationMeter(keras.callbacks.Callback):
    """How many integer weights change, and how many oscillate, in a window of training.

    As a callback of ``fit`` it looks after each batch, and its window is the epoch: afterwards it holds the last one's.
    In a loop of your own, call `update` after each step, and `reset` for a new window; where the recipe freezes,
    call ``meter.set_model(model)`` before, so that it sees frozen weights.

    It reads the weights back after each batch, which on JAX and on a GPU takes longer than that of a small network: use
    it for the epochs that you want to know of. With ``steps_per_execution`` it sees the last step of each execution.

    Args:
        student: a model from `prepare`; not changed.

    Raises:
        CRCoreError: the student has no quantized weight.

    >>> import crcore as cr, keras
    >>> from crcore_keras import prepare
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> OscillationMeter(prepare(net, cr.Recipe(cr.LSQ(4), None))).total()
    OscillationRates(weights=8, flipped=0.0, oscillating=0.0)
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self._weights = quantized_weights(student)
        self._states: list[Oscillation] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._states = [Oscillation.start(codes) for codes in self._codes()]

    def update(self) -> None:
        """Look at the integers."""
        self._states = [
            oscillation_update(state, codes) for state, codes in zip(self._states, self._codes(), strict=True)
        ]

    def layers(self) -> dict[str, OscillationRates]:
        """The rates of each layer, by its name; where layers share a weight, by that of the first."""
        names = [weight.name for weight in self._weights]
        return {name: OscillationRates.of(state) for name, state in zip(names, self._states, strict=True)}

    def total(self) -> OscillationRates:
        """The rates of all quantized weights together."""
        return OscillationRates.of(*self._states)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Called by Keras."""
        self.reset()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called by Keras."""
        self.update()

    def _codes(self) -> list[Any]:
        """The integers of each weight, in NumPy."""
        model = self.model  # which on JAX brings the variables up to date
        if isinstance(model, ConsistencyModel) and model.recipe.freezing is not None:
            model.update_teacher()  # writes frozen weights
        return [ops.convert_to_numpy(weight.quantizer.codes(weight.variable)) for weight in self._weights]
