"""A mean over random draws, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """The mean over independent draws of what is random, with its 95 % confidence interval ``mean +- half_width``.

    The interval is Student's t, ``half_width = t(0.975, draws - 1) * std / sqrt(draws)``: where the mean of many more
    draws would be. It tells nothing about samples: these are fixed, and that other samples have other losses is not in
    it. A single draw stands for something that is not random, with ``half_width`` 0.

    Attributes:
        mean, half_width: numbers, or arrays of one shape.
        draws: how many were made.
    """

    mean: Any
    half_width: Any
    draws: int

    @property
    def low(self) -> Any:
        """``mean - half_width``."""
        return self.mean - self.half_width

    @property
    def high(self) -> Any:
        """``mean + half_width``."""
        return self.mean + self.half_width

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mean": np.asarray(self.mean).tolist(),
            "half_width": np.asarray(self.half_width).tolist(),
            "draws": self.draws,
        }


def estimate(draws: Sequence[Any] | NDArray[Any]) -> Estimate:
    """The `Estimate` of numbers or arrays ``[draws, ...]``."""
    values: NDArray[np.float64] = np.asarray(draws, np.float64)
    n = len(values)
    # The mean of equal values can be off by rounding; what does not vary has that value.
    mean = np.where((values == values[0]).all(axis=0), values[0], values.mean(axis=0))
    half_width = np.zeros_like(mean)
    if n > 1:
        half_width = stdtrit(n - 1, 0.975) * np.sqrt(((values - mean) ** 2).sum(axis=0) / (n - 1) / n)
    if values.ndim == 1:
        return Estimate(float(mean), float(half_width), n)
    return Estimate(mean, half_width, n)
