"""The consistency term and the average, on Keras tensors; both may be traced."""

from __future__ import annotations

from typing import Any

from keras import ops

from crcore import Consistency, CRCoreError, ema_update
from crcore_keras._bind import stop_gradient
from crcore_keras._xp import xp


def consistency_loss(
    consistency: Consistency,
    student: Any,
    teacher: Any,
    *,
    step: Any,
    axis: int = -1,
    sample_weight: Any = None,
) -> tuple[Any, Any]:
    """``lambda(step) * D(student || teacher)`` and ``lambda(step)``. The gradient reaches the student alone.

    Args:
        consistency: divergence, weight, temperature and threshold.
        student: logits of the student on one view.
        teacher: logits of the teacher on the other view, of the same shape.
        step: optimizer steps made so far, an int or a 0-d tensor.
        axis: the class axis.
        sample_weight: ``[N]``, or one per prediction.

    Raises:
        CRCoreError: shapes that differ.
    """
    if tuple(student.shape[1:]) != tuple(teacher.shape[1:]):
        raise CRCoreError(
            f"student and teacher logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "the teacher must be of the student's architecture, or a float network for the same classes"
        )
    dtype = "float64" if student.dtype == "float64" else "float32"
    weight = (
        consistency.weight_at(step) if isinstance(step, int) else consistency.weight_at(ops.cast(step, dtype), xp=xp)
    )
    if isinstance(weight, int | float) and weight == 0.0:  # plain QAT, to the bit: no graph, and no 0 * inf
        return ops.zeros((), dtype), weight
    distance = consistency.distance(
        ops.cast(student, dtype),
        stop_gradient(ops.cast(teacher, dtype)),
        axis=axis,
        sample_weight=None if sample_weight is None else ops.cast(sample_weight, dtype),
        xp=xp,
    )
    return weight * distance, weight


def ema_update_(averages: list[Any], values: list[Any], decay: Any) -> None:
    """`crcore.ema_update` for all variables, in place."""
    for average, value in zip(averages, values, strict=True):
        mixing = ops.cast(decay, average.dtype)
        average.assign(ema_update(ops.copy(average), stop_gradient(ops.copy(value)), mixing))
