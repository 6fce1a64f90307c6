"""The exponential moving average (EMA) that makes the teacher out of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from crcore._errors import CRCoreError
from crcore._schedules import Constant, as_schedule
from crcore._typing import Array, Schedule


def ema_update(average: Array, value: Array, decay: Any) -> Array:
    """``average + (1 - decay) * (value - average)``: one step of the average.

    A convex combination, so an average of positive scales stays positive. ``average`` and ``value`` share shape and
    dtype; ``decay`` is a number in [0, 1]. Backends fuse it; this line is what they are tested against.

    >>> ema_update(1.0, 2.0, 0.75)
    1.25
    """
    return average + (1.0 - decay) * (value - average)


@dataclass(frozen=True)
class EMA:
    """How the teacher follows the student.

        teacher <- decay_at(t) * teacher + (1 - decay_at(t)) * student        after each optimizer step
        decay_at(t) = min(decay(t), (1 + t) / (10 + t))  while t < warmup, then decay(t)

    ``t`` counts the updates made before this one, so the first update has ``t = 0``. The warm-up lets the average
    forget the network it started from; without it the teacher of a short run is mostly that network.

    Args:
        decay: in [0, 1]; a number, or a schedule such as ``cosine_ramp(1.0, steps, start=0.996)``.
        warmup: optimizer steps during which the decay is capped. At ``decay=0.999`` the cap is reached at step 8990;
            a shorter warm-up ends in a jump to ``decay``.
        quantized: whether the teacher's forward pass is fake-quantized with the average's own scales, as the student's
            is. False gives a float teacher that averages quantized students.
        batchnorm: what becomes of BatchNorm's running mean and variance: ``"average"`` averages them like the weights,
            ``"copy"`` takes the student's after each update, as Mean Teacher's code does for all buffers. An average
            of weights has statistics of its own, which neither is: see ``reestimate_batchnorm`` of the backends.

    Raises:
        CRCoreError: a number outside [0, 1], a warm-up that is not a whole number of steps, or another ``batchnorm``.

    >>> ema = EMA(decay=0.999, warmup=2_000)
    >>> [round(float(ema.decay_at(t)), 4) for t in (0, 90, 1_999, 2_000)]
    [0.1, 0.91, 0.9955, 0.999]
    """

    decay: float | Schedule = 0.999
    warmup: int = 0
    quantized: bool = True
    batchnorm: Literal["average", "copy"] = "average"

    def __post_init__(self) -> None:
        schedule = as_schedule("decay", self.decay)
        for end in ("value", "start", "peak"):
            if not 0.0 <= getattr(schedule, end, 0.0) <= 1.0:
                raise CRCoreError(f"decay must lie in [0, 1], got {self.decay!r}; 0.99 to 0.9999 are usual")
        if isinstance(schedule, Constant):
            object.__setattr__(self, "decay", schedule.value)  # EMA(constant(0.9)) == EMA(0.9)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise CRCoreError(f"warmup must be a whole number of optimizer steps, at least 0, got {self.warmup!r}")
        if not isinstance(self.quantized, bool):
            raise CRCoreError(f"quantized must be True or False, got {self.quantized!r}")
        if self.batchnorm not in ("average", "copy"):
            raise CRCoreError(f"batchnorm must be 'average' or 'copy', got {self.batchnorm!r}")
        if isinstance(schedule, Constant):
            # The cap only rises: a warm-up that outlasts it acts no longer than to where it reaches the decay.
            object.__setattr__(self, "warmup", _end_of_cap(schedule.value, self.warmup))

    def decay_at(self, step: Any, *, xp: Any = np) -> Any:
        """The decay of the update that follows ``step`` updates; a number for a number, a tensor for a tensor."""
        decay = self.decay(step, xp=xp) if callable(self.decay) else self.decay
        if not self.warmup:
            return decay
        cap = _cap(step)
        return xp.where((step < self.warmup) & (cap < decay), cap, decay)


def _cap(step: Any) -> Any:
    return (1.0 + step) / (10.0 + step)


def _end_of_cap(decay: float, latest: int) -> int:
    """The first step at which the cap is no lower than ``decay``, but at most ``latest``."""
    if decay >= 1.0:
        return latest
    step = min(latest, max(0, math.floor((10.0 * decay - 1.0) / (1.0 - decay)) - 1))
    while step < latest and _cap(step) < decay:
        step += 1
    return step
