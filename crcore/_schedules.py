"""Numbers that change with the optimizer step: lambda(t) of the consistency term, the decay of the average.

Every schedule is free of branches on the step, because ``if step < steps`` dies under ``jit`` and ``tf.function``.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from crcore._errors import CRCoreError
from crcore._typing import Schedule


@dataclass(frozen=True)
class Constant:
    """The same ``value`` at every step. Made by `constant`."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _number("value", self.value))

    def __call__(self, step: Any, *, xp: Any = np) -> Any:
        return self.value


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``peak`` and, where ``down`` is given, back. Made by `linear_ramp` and its siblings."""

    shape: Literal["linear", "sigmoid", "cosine"]
    peak: float
    steps: int  # optimizer steps from start to peak
    start: float = 0.0
    hold: int = 0  # optimizer steps at the peak, before the way down
    down: int | None = None  # optimizer steps from the peak back to start; None: stay at the peak

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "sigmoid", "cosine"):
            raise CRCoreError(f"a ramp is linear, sigmoid or cosine, got {self.shape!r}")
        for name in ("peak", "start"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        _steps("steps", self.steps, least=1)
        _steps("hold", self.hold, least=0)
        if self.down is not None:
            _steps("down", self.down, least=1)
        elif self.hold:
            raise CRCoreError(
                f"hold={self.hold} has no effect without a way down; give down=<optimizer steps>, or leave hold out"
            )

    def __call__(self, step: Any, *, xp: Any = np) -> Any:
        fraction = self._rise(xp.clip(step / self.steps, 0.0, 1.0), xp)
        if self.down is not None:
            descent = (step - (self.steps + self.hold)) / self.down
            fraction = fraction * self._rise(1.0 - xp.clip(descent, 0.0, 1.0), xp)
        return self.start + (self.peak - self.start) * fraction

    def _rise(self, t: Any, xp: Any) -> Any:
        """The shape of the way up, ``t`` in [0, 1], reaching 1 at ``t = 1``."""
        if self.shape == "linear":
            return t
        if self.shape == "sigmoid":
            return xp.exp(-5.0 * (1.0 - t) * (1.0 - t))
        return 0.5 - 0.5 * xp.cos(math.pi * t)


def constant(value: float) -> Schedule:
    """The same value at every step.

    >>> constant(0.5)(1_000)
    0.5
    """
    return Constant(value)


def linear_ramp(peak: float, steps: int, *, start: float = 0.0, hold: int = 0, down: int | None = None) -> Schedule:
    """``start + (peak - start) * t`` with ``t = clip(step / steps, 0, 1)``.

    Args:
        peak: the value reached at ``step = steps``.
        steps: length of the way up, in optimizer steps, at least 1.
        start: the value at step 0.
        hold: optimizer steps at the peak before the way down; only with ``down``.
        down: length of the way back to ``start``, the way up mirrored; None stays at the peak.

    Raises:
        CRCoreError: a value is not a finite number, or a length is not a whole number of steps.

    >>> [float(linear_ramp(1.0, steps=4)(step)) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    >>> [float(linear_ramp(1.0, steps=2, hold=1, down=2)(step)) for step in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return _ramp("linear", peak, steps, start, hold, down)


def sigmoid_ramp(peak: float, steps: int, *, start: float = 0.0, hold: int = 0, down: int | None = None) -> Schedule:
    """``start + (peak - start) * exp(-5 (1 - t)^2)`` with ``t = clip(step / steps, 0, 1)``.

    The ramp of Laine & Aila (2017, arXiv 1610.02242, section 2.1) and of Mean Teacher. At step 0 it stands at
    ``exp(-5) = 0.0067`` of the way, not at ``start``. Arguments and errors as in `linear_ramp`.

    >>> [round(float(sigmoid_ramp(1.0, steps=4)(step)), 4) for step in (0, 2, 4, 9)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    return _ramp("sigmoid", peak, steps, start, hold, down)


def cosine_ramp(peak: float, steps: int, *, start: float = 0.0, hold: int = 0, down: int | None = None) -> Schedule:
    """``start + (peak - start) * (1 - cos(pi t)) / 2`` with ``t = clip(step / steps, 0, 1)``.

    As the decay of an average, ``cosine_ramp(1.0, steps, start=0.996)`` is BYOL's (arXiv 2006.07733, section 3.2).
    Arguments and errors as in `linear_ramp`.

    >>> [round(float(cosine_ramp(1.0, steps=4)(step)), 4) for step in (0, 2, 4)]
    [0.0, 0.5, 1.0]
    """
    return _ramp("cosine", peak, steps, start, hold, down)


def as_schedule(name: str, value: float | Schedule) -> Schedule:
    """A number as a constant schedule; a schedule as it is. ``name`` is the argument that an error should name."""
    return value if callable(value) else Constant(_number(name, value))


def _ramp(shape: Any, peak: float, steps: int, start: float, hold: int, down: int | None) -> Schedule:
    ramp = Ramp(shape, peak, steps, start, hold, down)
    # One spelling per behaviour, so that equal recipes compare equal.
    return Constant(ramp.peak) if ramp.peak == ramp.start else ramp


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise CRCoreError(f"{name} must be a finite number or a schedule such as linear_ramp(...), got {value!r}")
    return float(value)


def _steps(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CRCoreError(f"{name} must be a whole number of optimizer steps, at least {least}, got {value!r}")
