"""What `prepare` makes of a model: the same model, which sets its scales from data before the first compiled step."""

from __future__ import annotations

import itertools
from typing import Any

import keras

from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import PACKAGE, QuantizedComposite, quantizers_in


@keras.saving.register_keras_serializable(PACKAGE)
class QuantizedModel(QuantizedComposite):
    """Mixed into a model's class by `prepare`.

    ``fit`` and ``train_on_batch`` set the scales that are still missing from their first batch, outside of the compiled
    step; ``compile`` keeps weight decay away from the scales.
    """

    def fit(self, x: Any = None, y: Any = None, batch_size: int | None = None, **options: Any) -> Any:
        """As `keras.Model.fit`."""
        if not is_calibrated(self):
            batch, x = first_batch(x, batch_size)
            calibrate(self, batch)
        return super().fit(x, y, batch_size, **options)  # type: ignore[misc]

    def train_on_batch(self, x: Any, *args: Any, **options: Any) -> Any:
        """As `keras.Model.train_on_batch`."""
        calibrate(self, x)
        return super().train_on_batch(x, *args, **options)  # type: ignore[misc]

    def compile(self, optimizer: Any = "rmsprop", *args: Any, **options: Any) -> None:
        """As `keras.Model.compile`."""
        super().compile(optimizer, *args, **options)  # type: ignore[misc]
        spare_scales(self, self.optimizer)  # type: ignore[attr-defined]

    def compile_from_config(self, config: Any) -> None:
        """Called by Keras on loading, which does not do this itself for a class with a ``compile`` of its own."""
        recompile(self, config)


QuantizedModel._root = QuantizedModel


def is_calibrated(model: Any) -> bool:
    """Whether every quantizer in the model has been set from data."""
    return all(quantizer.initialized for quantizer in quantizers_in(model))


def calibrate(model: Any, batch: Any) -> None:
    """Set the scales that are not initialized yet from one batch; nothing else changes, neither statistics nor seeds.

    Args:
        model: a prepared model, or one that holds one.
        batch: what ``model(batch, training=True)`` takes.
    """
    waiting = [quantizer for quantizer in quantizers_in(model) if not quantizer.initialized]
    if not waiting:
        return
    with keras.StatelessScope() as scope:  # which keeps every assignment to itself
        model(keras.tree.map_structure(keras.ops.convert_to_tensor, batch), training=True)
        found = {id(v): scope.get_current_value(v) for quantizer in waiting for v in quantizer.variables}
    for quantizer in waiting:
        for variable in quantizer.variables:
            if found[id(variable)] is not None:  # None: not met by this call
                variable.assign(found[id(variable)])
    refresh(model)


def refresh(model: Any) -> None:
    """Let the layers that compute with copies of their variables see what ``set_weights`` or a file assigned."""
    for layer in model._flatten_layers():
        if isinstance(layer, FakeQuantize):
            layer.read_flags()
        elif isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def first_batch(x: Any, batch_size: int | None) -> tuple[Any, Any]:
    """The inputs of the first batch of what was given to ``fit``, and what to give to Keras in its place."""
    if isinstance(x, keras.utils.PyDataset):
        return keras.utils.unpack_x_y_sample_weight(x[0])[0], x
    if all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x)):
        return keras.tree.map_structure(lambda array: array[: batch_size or 32], x), x
    batches = iter(x)
    first = next(batches)
    if batches is x:  # a generator, which would not give this batch again
        x = itertools.chain([first], batches)
    return keras.utils.unpack_x_y_sample_weight(first)[0], x


def recompile(model: Any, config: Any) -> None:
    """Compile a loaded model as it was, the optimizer's variables included."""
    model.compile(**keras.saving.deserialize_keras_object(config))
    model.optimizer.build(model.trainable_variables)


def spare_scales(model: Any, optimizer: Any) -> None:
    """Exclude the quantizers' variables from weight decay, beside what the user has excluded.

    Weight decay pulls a scale towards zero, and with it the range that the layer can represent.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    if not getattr(optimizer, "weight_decay", None) or optimizer.built:
        return
    variables = [variable for quantizer in quantizers_in(model) for variable in quantizer.trainable_variables]
    excluded: set[Any] = getattr(optimizer, "_exclude_from_weight_decay", set())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    optimizer.exclude_from_weight_decay(var_list=variables)
    optimizer._exclude_from_weight_decay |= excluded
    optimizer._exclude_from_weight_decay_pattern = pattern
