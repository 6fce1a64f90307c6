"""The consistency objective: the student on one view agrees with the teacher on another (arXiv 2402.13497)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from crcore._divergences import confidence, kl_divergence, same_shape
from crcore._errors import CRCoreError
from crcore._schedules import Constant, as_schedule
from crcore._typing import Array, Divergence, Schedule


@dataclass(frozen=True)
class Consistency:
    """``lambda(t) * mean(sample_weight * mask * D(student(a(x)), teacher(b(x))))``, added to the task loss.

    Args:
        divergence: D, one value per prediction; `kl_divergence`, `js_divergence`, `mse_divergence`, or your own.
        weight: lambda, a number or a schedule of the optimizer step, at least 0.
        temperature: both logits are divided by it before the softmax, > 0.
        threshold: in [0, 1]; predictions whose teacher is less confident (largest probability at temperature 1)
            contribute zero. They still count in the mean's denominator, as in FixMatch (arXiv 2001.07685, eq. 4), so an
            unsure teacher weakens the term. None keeps every prediction.

    Raises:
        CRCoreError: a value outside those ranges.
    """

    divergence: Divergence = kl_divergence
    weight: float | Schedule = 1.0
    temperature: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.divergence):
            raise CRCoreError(f"divergence must be a function such as kl_divergence, got {self.divergence!r}")
        schedule = as_schedule("weight", self.weight)
        lowest = min(getattr(schedule, name, 0.0) for name in ("value", "peak", "start"))
        if lowest < 0.0:
            raise CRCoreError(f"weight must not be negative, got {self.weight!r}; 0 turns the term off")
        object.__setattr__(self, "weight", schedule)  # one spelling per behaviour: 1.0 is constant(1.0)
        if not _is_number(self.temperature) or not 0.0 < self.temperature < math.inf:
            raise CRCoreError(f"temperature must be a finite number above 0, got {self.temperature!r}")
        if self.threshold is not None and not (_is_number(self.threshold) and 0.0 <= self.threshold <= 1.0):
            raise CRCoreError(f"threshold must be None or lie in [0, 1], got {self.threshold!r}")
        if not self.threshold:  # a probability is never below 0: the same as no threshold
            object.__setattr__(self, "threshold", None)
        if schedule == Constant(0.0):  # off, whatever the divergence
            for name, default in (("divergence", kl_divergence), ("temperature", 1.0), ("threshold", None)):
                object.__setattr__(self, name, default)

    def weight_at(self, step: Any, *, xp: Any = np) -> Any:
        """lambda at optimizer step ``step``; a number for a number, a tensor for a tensor."""
        return self.weight(step, xp=xp)  # type: ignore[operator]  # a schedule since __post_init__

    def distance(
        self, student: Array, teacher: Array, *, axis: int = -1, sample_weight: Array | None = None, xp: Any = np
    ) -> Array:
        """The term before lambda: the mean over all predictions, 0-d.

        Args:
            student, teacher: logits of one shape and dtype, classes on ``axis``. No gradient is stopped here: the
                backend hands in a teacher that has none.
            axis: the class axis.
            sample_weight: one factor per sample ``[N]``, or per prediction (the logits' shape without ``axis``).
            xp: the array namespace.

        Raises:
            CRCoreError: shapes that do not belong together.
        """
        values = self.divergence(student, teacher, axis=axis, temperature=self.temperature, xp=xp)
        if self.threshold is not None:
            values = xp.where(confidence(teacher, axis=axis, xp=xp) >= self.threshold, values, 0.0)
        if sample_weight is not None:
            if not same_shape(sample_weight.shape, values.shape):
                # Broadcasting [N, 1] against [N] would weigh every sample with every weight.
                if not same_shape(sample_weight.shape, values.shape[:1]):
                    raise CRCoreError(
                        f"sample_weight must have one entry per sample, {tuple(values.shape[:1])}, or per prediction, "
                        f"{tuple(values.shape)}; got {tuple(sample_weight.shape)}"
                    )
                sample_weight = xp.reshape(sample_weight, (-1,) + (1,) * (values.ndim - 1))
            values = values * sample_weight
        return xp.mean(values, axis=tuple(range(values.ndim))) if values.ndim else values

    def __call__(
        self,
        student: Array,
        teacher: Array,
        *,
        step: Any,
        axis: int = -1,
        sample_weight: Array | None = None,
        xp: Any = np,
    ) -> Array:
        """``weight_at(step) * distance(...)``, 0-d. Arguments as there; ``step``: optimizer steps made so far."""
        distance = self.distance(student, teacher, axis=axis, sample_weight=sample_weight, xp=xp)
        return self.weight_at(step, xp=xp) * distance


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
