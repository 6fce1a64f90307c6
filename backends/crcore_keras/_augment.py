"""The augmentation: a layer, a function or another callable; applied, and kept track of."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import keras

from crcore import CRCoreError


def apply(augment: Any, x: Any) -> Any:
    """``augment(x)`` in train mode; each call draws anew."""
    if isinstance(augment, keras.layers.Layer) and "training" in inspect.signature(augment.call).parameters:
        return augment(x, training=True)
    return augment(x)


def seeds_of(augment: Any) -> list[Any]:
    """The seed generators and layers that a function, or an object of the user's own, draws from.

    On JAX one that the model does not know would give the same draws in both views and in every step.
    """
    if augment is None or isinstance(augment, keras.layers.Layer):
        return []
    held: list[Any] = []
    if isinstance(augment, functools.partial):
        held += [*augment.args, *augment.keywords.values()]
        augment = augment.func
    if not inspect.isroutine(augment):
        augment = type(augment).__call__.__get__(augment)
    if inspect.ismethod(augment):
        held += vars(augment.__self__).values()
        augment = augment.__func__
    if inspect.isfunction(augment):
        found = inspect.getclosurevars(augment)
        held += [*found.nonlocals.values(), *found.globals.values(), *(augment.__defaults__ or ())]
    kinds = (keras.random.SeedGenerator, keras.layers.Layer)
    return [leaf for value in held for leaf in _flat(value) if isinstance(leaf, kinds)]


def check_savable(augment: Any) -> None:
    """Raises CRCoreError where a file could not say what the augmentation is."""
    if augment is None or hasattr(augment, "get_config"):
        return
    name = keras.saving.get_registered_name(augment) if hasattr(augment, "__name__") else None
    if name is None or keras.saving.get_registered_object(name) is not augment:
        raise CRCoreError(
            f"augment={augment!r} cannot be saved; make it a keras layer, or decorate the function with "
            "@keras.saving.register_keras_serializable(), or save model.student alone"
        )


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
