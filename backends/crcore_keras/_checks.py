"""What `ConsistencyModel` takes, and what it says of anything else."""

from __future__ import annotations

from typing import Any

import keras

from crcore import CRCoreError, Recipe
from crcore_keras._layers import quantizers_in
from crcore_keras._oscillation import quantized_weights


def check_arguments(student: Any, recipe: Any, augment: Any, teacher: Any) -> None:
    """Raises CRCoreError for what `ConsistencyModel` cannot be made of."""
    if not isinstance(recipe, Recipe):
        raise CRCoreError(
            f"ConsistencyModel takes a crcore.Recipe, got {type(recipe).__name__}; for example "
            "Recipe(LSQ(4), LSQ(4), consistency=Consistency(), ema=EMA())"
        )
    if not isinstance(student, keras.Model) or not quantizers_in(student):
        raise CRCoreError(
            f"ConsistencyModel takes a student from crcore_keras.prepare(model, recipe), got {type(student).__name__}"
        )
    for remedy in (recipe.dampening, recipe.freezing):
        if remedy is not None:
            for weight in quantized_weights(student):
                remedy.check(weight.quantizer.quantizer)
    if augment is not None and not callable(augment):
        raise CRCoreError(f"augment must be a layer or a function of a batch, or None for two views; got {augment!r}")
    if teacher is None:
        return
    if recipe.consistency is None or recipe.ema is not None:
        raise CRCoreError(
            "distillation from a frozen teacher takes Recipe(consistency=..., ema=None); the average and a teacher of "
            "another kind cannot both be followed"
        )
    if not isinstance(teacher, keras.Model) or not teacher.built:
        raise CRCoreError(f"teacher must be a built keras.Model, got {teacher!r}")
    shapes = [[getattr(t, "shape", None) for t in getattr(m, "outputs", None) or [None]] for m in (student, teacher)]
    if None not in shapes[0] + shapes[1] and shapes[0] != shapes[1]:
        raise CRCoreError(
            f"the teacher's outputs have the shapes {shapes[1]}, the student's {shapes[0]}; give a teacher for the "
            "same classes"
        )
