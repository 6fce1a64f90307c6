"""Weights that jump between two integers: how to see it, and two remedies (Nagel et al., 2022, arXiv 2203.11086).

The straight-through gradient of a latent weight is that of the integer it is rounded to. Where the loss wants a value
between two integers, that gradient changes its sign with the rounding, and the weight oscillates for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from crcore._errors import CRCoreError
from crcore._packing import code_limits
from crcore._schedules import as_schedule
from crcore._typing import Array, Quantizer, Schedule

MOMENTUM = 0.01  # of the frequency; about a hundred optimizer steps are remembered
OSCILLATING = 0.005  # the frequency above which the paper counts a weight as oscillating


class Oscillation(NamedTuple):
    """What is known of a weight tensor's integers; four arrays of its shape and of one float type.

    Made by `start`; the next one by `oscillation_update`.
    """

    codes: Array  # the integers, as floats
    direction: Array  # of the last change: 1 up, -1 down, 0 where there was none yet
    frequency: Array  # in [0, 1), the average of "it oscillated at this step"
    average: Array  # of the integers

    @classmethod
    def start(cls, codes: Array, *, xp: Any = np) -> Oscillation:
        """Nothing has moved yet."""
        zero = xp.zeros_like(codes)
        return cls(codes, zero, zero, codes)


def oscillation_update(state: Oscillation, codes: Array, momentum: float = MOMENTUM, *, xp: Any = np) -> Oscillation:
    """The state after an optimizer step that left the integers ``codes`` (section 4).

        oscillated = codes differ from those before, in the opposite direction of their last change
        frequency <- momentum * oscillated + (1 - momentum) * frequency
        average   <- momentum * codes      + (1 - momentum) * average

    >>> import numpy as np
    >>> state = Oscillation.start(np.array([0.0, 0.0]))
    >>> for codes in ([1.0, 1.0], [0.0, 2.0], [1.0, 3.0]):
    ...     state = oscillation_update(state, np.array(codes), 0.5)
    >>> state.frequency  # the first went up, down, up; the second only up
    array([0.75, 0.  ])
    """
    zero = xp.zeros_like(codes)
    change = xp.clip(codes - state.codes, -1.0, 1.0)  # the sign, since codes are whole numbers
    oscillated = xp.where(change * state.direction < 0.0, 1.0 + zero, zero)
    return Oscillation(
        codes,
        xp.where(change * change > 0.0, change, state.direction),
        # Not by `ema_update`, whose 1 - (1 - momentum) is not quite momentum, which thresholds are compared with.
        state.frequency + momentum * (oscillated - state.frequency),
        state.average + momentum * (codes - state.average),
    )


@dataclass(frozen=True)
class OscillationRates:
    """How many of ``weights`` integer weights moved in a window of training, as fractions."""

    weights: int
    flipped: float  # their integer changed at least once
    oscillating: float  # their frequency ended above 0.005

    @classmethod
    def of(cls, *states: Oscillation, xp: Any = np) -> OscillationRates:
        """Of one or several weight tensors together, since their `Oscillation.start`.

        >>> import numpy as np
        >>> start = Oscillation.start(np.zeros(4))
        >>> OscillationRates.of(oscillation_update(start, np.array([0.0, 1.0, 0.0, 0.0])))
        OscillationRates(weights=4, flipped=0.25, oscillating=0.0)
        """
        weights = sum(math.prod(state.codes.shape) for state in states)
        flipped = sum(_count(state.direction * state.direction > 0.0, state.direction, xp) for state in states)
        oscillating = sum(_count(state.frequency > OSCILLATING, state.frequency, xp) for state in states)
        return cls(weights, flipped / max(weights, 1), oscillating / max(weights, 1))


@dataclass(frozen=True)
class Dampening:
    """Oscillation dampening: pulls each weight to the middle of its bin (section 4).

        weight_at(t) * sum over layers of || quantized - clip(weight, lo * scale, hi * scale) ||^2

    with ``quantized`` a constant. The gradient reaches weights inside the grid and no scale.

    Args:
        weight: of the term, at least 0; a number, or a schedule of the optimizer step. The paper anneals it upwards,
            ``cosine_ramp(1e-3, steps)``, so that weights may move between bins first.

    Raises:
        CRCoreError: a value outside that range.
    """

    weight: float | Schedule

    def __post_init__(self) -> None:
        schedule = as_schedule("weight", self.weight)
        if min(_ends(schedule), default=0.0) < 0.0:
            raise CRCoreError(f"weight must not be negative, got {self.weight!r}; 0 turns dampening off")
        object.__setattr__(self, "weight", schedule)  # one spelling per behaviour: 1.0 is constant(1.0)

    def weight_at(self, step: Any, *, xp: Any = np) -> Any:
        """The factor at optimizer step ``step``; a number for a number, a tensor for a tensor."""
        return self.weight(step, xp=xp)  # type: ignore[operator]  # a schedule since __post_init__

    def check(self, quantizer: Quantizer) -> None:
        """Raises CRCoreError for a weight's quantizer without a learned scale."""
        _check_learned("dampening", quantizer)

    def distance(
        self, weight: Array, quantized: Array, quantizer: Quantizer, *parameters: Array, xp: Any = np
    ) -> Array:
        """The term of one weight tensor before its factor, 0-d. Frameworks may differentiate it.

        Args:
            weight: the latent weight.
            quantized: ``quantizer.forward(weight, *parameters)``, without a gradient.
            quantizer: of a learned scale, LSQ for one.
            parameters: its arrays, as for `Quantizer.forward`.
            xp: the array namespace.

        Raises:
            CRCoreError: the quantizer has no learned scale.
        """
        self.check(quantizer)
        scale, zero_point = quantizer.affine(*parameters, xp=xp)
        low, high = ((limit - zero_point) * scale for limit in code_limits(quantizer))
        # Outside of the grid the clipped weight is the quantized one. A selection has one gradient on every framework.
        distance = xp.where((weight >= low) & (weight <= high), quantized - weight, xp.zeros_like(weight))
        return xp.sum(xp.reshape(distance * distance, (-1,)), axis=0)


class FreezingState(NamedTuple):
    """What `Freezing` knows of a weight tensor; arrays of its shape."""

    oscillation: Oscillation
    frozen: Array  # bool

    @classmethod
    def start(cls, codes: Array, *, xp: Any = np) -> FreezingState:
        """Nothing is frozen yet."""
        return cls(Oscillation.start(codes, xp=xp), xp.zeros_like(codes) > 0.0)


@dataclass(frozen=True)
class Freezing:
    """Iterative weight freezing: a weight that oscillates too often keeps its integer for good (section 4).

        frozen <- frozen or frequency > threshold_at(t)
        a weight that is newly frozen takes the integer nearest to the average of its integers
        weight  = integer * scale,  after every optimizer step

    Only the integer is frozen: ``scale`` goes on training.

    Args:
        threshold: of the frequency, in [0, 1); a number, or a schedule of the optimizer step. The paper anneals it
            downwards, ``cosine_ramp(0.01, steps, start=0.04)``, so that few weights are frozen early.
        momentum: of the averages, in (0, 1].

    Raises:
        CRCoreError: a value outside those ranges.
    """

    threshold: float | Schedule
    momentum: float = MOMENTUM

    def __post_init__(self) -> None:
        schedule = as_schedule("threshold", self.threshold)
        if not all(0.0 <= end < 1.0 for end in _ends(schedule)):
            raise CRCoreError(f"threshold must lie in [0, 1), got {self.threshold!r}; 0.01 to 0.04 are usual")
        object.__setattr__(self, "threshold", schedule)
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, (int, float)) or not 0 < self.momentum <= 1:
            raise CRCoreError(f"momentum must be a number in (0, 1], got {self.momentum!r}; 0.01 is usual")
        object.__setattr__(self, "momentum", float(self.momentum))

    def threshold_at(self, step: Any, *, xp: Any = np) -> Any:
        """The threshold of the update that follows ``step`` updates; a number for a number, a tensor for a tensor."""
        return self.threshold(step, xp=xp)  # type: ignore[operator]  # a schedule since __post_init__

    def check(self, quantizer: Quantizer) -> None:
        """Raises CRCoreError for a weight's quantizer without a learned scale."""
        _check_learned("freezing", quantizer)

    def update(
        self,
        state: FreezingState,
        weight: Array,
        quantizer: Quantizer,
        *parameters: Array,
        step: Any,
        xp: Any = np,
    ) -> FreezingState:
        """The state after an optimizer step that left ``weight``; what it freezes is written by `apply`.

        Args:
            state: before the step.
            weight: the latent weight.
            quantizer: of a learned scale, LSQ for one.
            parameters: its arrays, as for `Quantizer.forward`.
            step: the updates made before this one.
            xp: the array namespace.

        Raises:
            CRCoreError: the quantizer has no learned scale.
        """
        self.check(quantizer)
        before, frozen = state
        codes = xp.where(frozen, before.codes, quantizer.codes(weight, *parameters, xp=xp))
        oscillation = oscillation_update(before, codes, self.momentum, xp=xp)
        too_often = oscillation.frequency > self.threshold_at(step, xp=xp)
        # By the quantizer, which knows its integers: those of one bit are -1 and 1.
        scale, zero_point = quantizer.affine(*parameters, xp=xp)
        nearest = quantizer.codes((oscillation.average - zero_point) * scale, *parameters, xp=xp)
        codes = xp.where(frozen, codes, xp.where(too_often, nearest, codes))
        return FreezingState(oscillation._replace(codes=codes), frozen | too_often)

    def apply(self, state: FreezingState, weight: Array, quantizer: Quantizer, *parameters: Array, xp: Any = np) -> Any:
        """``weight`` with ``integer * scale`` where it is frozen; arguments as in `update`."""
        scale, zero_point = quantizer.affine(*parameters, xp=xp)
        return xp.where(state.frozen, (state.oscillation.codes - zero_point) * scale, weight)


def _check_learned(remedy: str, quantizer: Quantizer) -> None:
    # Only there a weight that equals its quantized value stays where it is.
    if not quantizer.learned:
        raise CRCoreError(
            f"{remedy} holds weights to the grid of a learned scale, but {quantizer!r} takes its grid from the weights "
            "themselves; use LSQ for weights, or leave it out"
        )


def _ends(schedule: Any) -> list[float]:
    """The values between which one of crcore's own schedules stays."""
    return [getattr(schedule, name) for name in ("value", "peak", "start") if hasattr(schedule, name)]


def _count(mask: Array, like: Array, xp: Any) -> int:
    ones = xp.where(mask, 1.0 + xp.zeros_like(like), xp.zeros_like(like))
    # By the mean: a sum of float32 stops counting at 2^24. Rounded, so that small tensors are counted exactly.
    mean = xp.mean(xp.reshape(ones, (-1,)), axis=0)
    return round(float(mean) * math.prod(like.shape))
