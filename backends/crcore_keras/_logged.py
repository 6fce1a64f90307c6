"""What `ConsistencyModel` logs in training, beside Keras' own."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from crcore import Recipe
from crcore_keras._layers import PACKAGE


def logs_of(recipe: Recipe, *, has_average: bool) -> dict[str, Any]:
    """Metrics by name: means of the losses, and the last values of what is scheduled."""
    losses = [name for name in ("dampening", "consistency") if getattr(recipe, name) is not None]
    means = [f"{name}_loss" for name in (["task", *losses] if losses else [])]
    latest = (["lambda"] if recipe.consistency is not None else []) + (["decay"] if has_average else [])
    return {name: keras.metrics.Mean(name) for name in means} | {name: _Latest(name) for name in latest}


def fresh(metric: Any) -> Any:
    """A metric of the same kind with a state of its own; names stay names."""
    return type(metric).from_config(metric.get_config()) if isinstance(metric, keras.metrics.Metric) else metric


@keras.saving.register_keras_serializable(PACKAGE)
class _Latest(keras.metrics.Metric):
    """The value of the last step."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.value = self.add_variable(shape=(), initializer="zeros", name="value")

    def update_state(self, value: Any) -> None:
        self.value.assign(ops.cast(value, self.value.dtype))

    def result(self) -> Any:
        return ops.copy(self.value)
